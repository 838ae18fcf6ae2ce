"""From the names of models and a text to figures that compare them."""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass
from typing import Any

from ..cache.size import kv_ratio
from ..calibration.text import load_text, tokenize
from ..models.conversion import eigen_layers
from ..models.loading import Source, load_model, load_tokenizer
from ..progress import TokenProgress
from .perplexity import Perplexity, perplexity, windows_of


@dataclass(frozen=True)
class Evaluation:
    """Perplexity of a model on a text, and, if there is a baseline, of that on the same windows."""

    perplexity: float
    baseline_perplexity: float | None
    relative_increase: float | None
    tokens: int
    kv_ratio: float
    text: str
    length: int
    cached: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_checkpoint(
    name: str,
    *,
    against: str | None,
    text: str,
    tokens: int,
    length: int,
    cached: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    progress: bool = False,
) -> Evaluation:
    """Perplexity of a model on windows of `length` tokens from the beginning of a text.

    Args:
        name, against: a model and its baseline: folder, hub id, `.gguf` file or `smollm2`.
        tokens: how much of the text to read.
        cached: see `perplexity`.

    Raises:
        EigenAttnError: on a model or text that cannot be read.
    """
    held_out = load_text(text, "evaluation")
    bars = TokenProgress(progress)

    def measure(model_name: str) -> tuple[Perplexity, float]:
        source = Source.of(model_name)
        windows = windows_of(tokenize(load_tokenizer(source), held_out), tokens, length)
        model = load_model(source, dtype, device)
        with bars.bar(f"Reading with {model_name}", len(windows)) as bar:
            result = perplexity(model, windows, cached, lambda: bar.advance(0))
        ratio = kv_ratio(eigen_layers(model))
        del model
        gc.collect()
        return result, ratio

    result, ratio = measure(name)
    baseline = measure(against)[0].value if against else None
    return Evaluation(
        perplexity=result.value,
        baseline_perplexity=baseline,
        relative_increase=None if baseline is None else result.value / baseline - 1,
        tokens=result.tokens,
        kv_ratio=ratio,
        text=held_out.source,
        length=length,
        cached=cached,
    )
