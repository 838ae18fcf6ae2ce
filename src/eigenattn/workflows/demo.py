"""The demonstration: SmolLM2 compressed, its bases saved and read again, measured beside a rival, and heard."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from ..calibration.checks import checked
from ..calibration.text import DEFAULT_SOURCE, load_text, tokenize
from ..config import EigenAttentionConfig
from ..errors import EigenAttnError
from ..evaluation.generation import Continuation, cache_bytes_used, continue_prompt
from ..evaluation.paired import mean
from ..evaluation.reading import Logits, Predictions, Reading, read, uncached, windows_of
from ..evaluation.rivals import Rival
from ..journal import check_new
from ..models.bases_file import attach
from ..models.conversion import convert_attention, eigen_layers, restore_attention
from ..models.loading import Source, load_model, load_tokenizer
from ..progress import TASK, TokenProgress
from .calibrate import CalibrationText
from .compress import compress_checkpoint

MODEL = "smollm2"
PROMPT = "A dictionary in Python is a mapping from keys to values. To add an item"
# Of a kind that the default calibration text does not hold.
EVALUATION_SOURCE = "python-docs"
EVALUATION_TOKENS = 3072
LENGTH = 1024
NEW_TOKENS = 48
SAMPLES = 6
# The 4 bits that vLLM has.
RIVAL = "turboquant-4-nc"


@dataclass(frozen=True)
class DemoColumn:
    """One column of the demonstration's table.

    Args:
        perplexity: of held-out text.
        divergence: from the original's predictions, in nats a token; 0 of itself.
        cache_bytes: allocated for `LENGTH` tokens, window included; of a rival, which is not packed, None.
        bits: of an element outside the window, all counted.
        continuation: of the prompt; None of a rival.
    """

    perplexity: float
    divergence: float
    cache_bytes: int | None
    bits: float
    continuation: Continuation | None


@dataclass(frozen=True)
class Demonstration:
    """The original, a rival and the compressed model, measured alike."""

    original: DemoColumn
    rival: DemoColumn
    compressed: DemoColumn
    kv_ratio: float
    seconds: float


def _read(
    model: PreTrainedModel,
    windows: Tensor,
    progress: bool,
    original: Predictions | None = None,
    logits_of: Logits = uncached,
) -> Reading:
    with checked(model), TokenProgress(progress).bar("Evaluating", len(windows)) as bar:
        advance = lambda: bar.advance(TASK)  # noqa: E731
        return read(model, windows, logits_of=logits_of, original=original, keep=original is None, advance=advance)


def _column(reading: Reading, bits: float, cache: int | None, continuation: Continuation | None) -> DemoColumn:
    divergence = mean(reading.divergence).value if reading.divergence else 0.0
    return DemoColumn(reading.perplexity.value, divergence, cache, bits, continuation)


def run_demo(out: Path | None, progress: bool = True) -> Demonstration:
    """Compress SmolLM2 to a quarter of its cache, read the bases back, and compare it with the original and a rival.

    Args:
        out: where to keep the compressed checkpoint; by default it is thrown away.

    Raises:
        EigenAttnError: if the package that holds the model is absent, or `out` exists.
    """
    start = time.perf_counter()
    if out is not None:
        check_new(out)
    config, rival = EigenAttentionConfig(), Rival.of(RIVAL)
    with tempfile.TemporaryDirectory() as scratch:
        folder = out or Path(scratch) / "compressed"
        text = CalibrationText([DEFAULT_SOURCE], samples=SAMPLES, length=LENGTH)
        report = compress_checkpoint(MODEL, folder, config, text, dtype="float32", progress=progress)
        source = Source.of(MODEL)
        tokenizer, model = load_tokenizer(source), load_model(source, "float32")
        held_out = tokenize(tokenizer, load_text(EVALUATION_SOURCE, "evaluation"))
        windows = windows_of(held_out, EVALUATION_TOKENS, LENGTH)

        def heard(model: PreTrainedModel) -> tuple[int, Continuation]:
            used = cache_bytes_used(model, windows[:1])
            return used, continue_prompt(model, tokenizer, PROMPT, max_new_tokens=NEW_TOKENS)

        reading = _read(model, windows, progress)
        original = _column(reading, 16.0, *heard(model))
        originals = convert_attention(model)
        layers = eigen_layers(model)
        with rival.reading(layers, config.window) as logits_of:
            rounded = _read(model, windows, progress, reading.predictions, logits_of)
        beside = _column(rounded, rival.bits_per_element(layers[0].head_dim), None, None)
        restore_attention(model, originals)
        attach(model, folder)
        compressed = _column(_read(model, windows, progress, reading.predictions), 16 * report.kv_ratio, *heard(model))
    assert original.cache_bytes is not None and compressed.cache_bytes is not None
    if compressed.cache_bytes >= original.cache_bytes:
        raise EigenAttnError("the compressed model's cache is not smaller: please report this.")
    return Demonstration(original, beside, compressed, report.kv_ratio, time.perf_counter() - start)
