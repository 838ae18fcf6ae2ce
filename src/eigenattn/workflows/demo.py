"""The demonstration: SmolLM2 compressed, saved, reloaded, measured and heard."""

from __future__ import annotations

import gc
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..calibration.text import load_text, tokenize
from ..config import EigenAttentionConfig
from ..errors import EigenAttnError
from ..evaluation.generation import Continuation, cache_bytes_used, continue_prompt
from ..evaluation.perplexity import perplexity, windows_of
from ..journal import check_new
from ..models.loading import Source, load_model, load_tokenizer
from ..progress import TASK, TokenProgress
from .compress import CalibrationText, compress_checkpoint

MODEL = "smollm2"
PROMPT = "A dictionary in Python is a mapping from keys to values. To add an item"
EVALUATION_TOKENS = 8192
TEXT = "python-docs"
LENGTH = 1024
NEW_TOKENS = 48


@dataclass(frozen=True)
class DemoColumn:
    """One column of the demonstration's table. Bytes are those allocated for `LENGTH` tokens, window included."""

    perplexity: float
    cache_bytes: int
    continuation: Continuation


@dataclass(frozen=True)
class Demonstration:
    """The original and the compressed model, measured alike."""

    original: DemoColumn
    compressed: DemoColumn
    kv_ratio: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The demonstration as plain JSON values."""
        return asdict(self)


def _measure(name: str, progress: bool) -> DemoColumn:
    source = Source.of(name)
    tokenizer, model = load_tokenizer(source), load_model(source, "float32")
    held_out = tokenize(tokenizer, load_text(TEXT, "evaluation"))
    windows = windows_of(held_out, EVALUATION_TOKENS, LENGTH)
    with TokenProgress(progress).bar("Evaluating", len(windows)) as bar:
        value = perplexity(model, windows, advance=lambda: bar.advance(TASK)).value
    allocated = cache_bytes_used(model, windows[:1])
    continuation = continue_prompt(model, tokenizer, PROMPT, max_new_tokens=NEW_TOKENS)
    del model
    gc.collect()
    return DemoColumn(value, allocated, continuation)


def run_demo(out: Path | None, progress: bool = True) -> Demonstration:
    """Compress SmolLM2 to 60% of its cache, reload it from disk, and compare the two.

    Args:
        out: where to keep the compressed checkpoint; by default it is thrown away.

    Raises:
        EigenAttnError: if the package that holds the model is absent, or `out` exists.
    """
    start = time.perf_counter()
    if out is not None:
        check_new(out)
    with tempfile.TemporaryDirectory() as scratch:
        folder = out or Path(scratch) / "compressed"
        report = compress_checkpoint(
            MODEL,
            folder,
            EigenAttentionConfig(kv_ratio=0.6),
            CalibrationText([TEXT], length=LENGTH),
            dtype="float32",
            progress=progress,
        )
        original, compressed = _measure(MODEL, progress), _measure(str(folder), progress)
    if compressed.cache_bytes >= original.cache_bytes:
        raise EigenAttnError("the compressed model's cache is not smaller: please report this.")
    return Demonstration(original, compressed, report.kv_ratio, time.perf_counter() - start)
