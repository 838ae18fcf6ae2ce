"""What compressing costs: statistics against a plain forward pass, and the whole way."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import PreTrainedModel

from ..calibration.checks import check_length
from ..calibration.statistics import Batch, forward_hidden
from ..compression.pipeline import compress
from ..compression.recipe import Recipe
from ..config import EigenAttentionConfig
from ..errors import EigenAttnError
from ..models.conversion import convert_attention, eigen_layers, restore_attention
from ..models.loading import Source, load_model
from ..models.placement import input_device
from ..progress import TokenProgress
from .shapes import random_model
from .timing import in_turns, machine


@torch.no_grad()
def _passes(
    model: PreTrainedModel, batches: list[Batch], config: EigenAttentionConfig, rounds: int
) -> dict[str, float]:
    """Seconds of a plain forward pass over the batches, and of one that collects statistics."""
    device = batches[0].input_ids.device

    def plain() -> None:
        for batch in batches:
            forward_hidden(model, batch)

    def statistics() -> None:
        originals = convert_attention(model)
        Recipe(model, eigen_layers(model), config, batches, TokenProgress(False)).moments  # noqa: B018 (made when asked for)
        restore_attention(model, originals)

    return in_turns({"forward": plain, "statistics": statistics}, device, rounds, warm_up=1)


def benchmark_calibration(
    name: str | None,
    *,
    shape: str | None = None,
    samples: int,
    length: int,
    config: EigenAttentionConfig | None = None,
    rounds: int = 3,
    dtype: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Compress a model on random tokens, and time it.

    Args:
        name: a model; or shape: one of `SHAPES` with random weights.
        samples, length: how much text: `samples` windows of `length` tokens.
        rounds: timings of the passes, over a quarter of the windows, of which the median counts.

    Returns:
        The machine, seconds of a forward pass and of statistics over the same tokens and their ratio, and of the whole
        way its seconds by stage and its peak memory.

    Raises:
        EigenAttnError: if not exactly one of a model and a shape is given, or it cannot be loaded.
    """
    if name is not None and shape is None:
        model = load_model(Source.of(name), dtype, device)
    elif shape is not None and name is None:
        model = random_model(shape, dtype, device)
    else:
        raise EigenAttnError("give a model, or --shape for one with random weights.")
    config = config or EigenAttentionConfig()
    where = input_device(model)
    size = model.config.get_text_config().vocab_size
    ids = torch.randint(3, size, (samples, length), generator=torch.Generator().manual_seed(0))
    batches = [Batch.of(row, where) for row in ids[: max(samples // 4, 1)].split(1)]
    check_length(model.config, length)
    passes = _passes(model, batches, config, rounds)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    weights = sum(x.numel() * x.element_size() for x in model.parameters())
    begun = time.perf_counter()
    report = compress(model, list(ids.split(1)), config)
    whole = time.perf_counter() - begun
    return {
        "kind": "calibration",
        **machine(where),
        "model": name or shape,
        "shape": shape,
        "dtype": str(model.dtype).removeprefix("torch."),
        "samples": samples,
        "length": length,
        "rounds": rounds,
        "kv_ratio": report.kv_ratio,
        "forward_seconds": passes["forward"],
        "statistics_seconds": passes["statistics"],
        "ratio": passes["statistics"] / passes["forward"],
        "seconds": whole,
        "stages": report.seconds,
        "weight_bytes": weights,
        "peak_memory_bytes": report.peak_memory_bytes,
    }
