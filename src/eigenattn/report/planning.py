"""How many sequences fit on GPUs, before and after compression: arithmetic on `config.json`, without weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..cache.layout import Latent, Layout
from ..cache.packing import Widths
from ..cache.size import bytes_per_token, cache_bytes
from ..calibration.checks import check_length
from ..compression.quantise import ALLOTTED, GROUP
from ..compression.recipe import check_tied
from ..config import EigenAttentionConfig
from ..errors import EigenAttnError
from ..models.conversion import convert_attention, eigen_layers
from ..models.families import turns_keys
from ..models.loading import Source, dtype_of, empty_model, load_config
from .inspection import compression_of, layouts

GIB = 2**30


@dataclass(frozen=True)
class Occupancy:
    """How one of the two models fills the memory. Bytes and tokens are of one GPU, sequences of all of them.

    Args:
        weights: bytes of the weights it holds.
        cache: bytes that are left for the cache.
        bytes_per_token: what a token adds to it.
        sequence: bytes of one sequence of the context, the exact window and room to grow included.
        sequences: how many of them fit at once.
        longest: tokens of the longest single sequence that fits.
    """

    weights: int
    cache: int
    bytes_per_token: int
    sequence: int
    sequences: int
    longest: int


@dataclass(frozen=True)
class CapacityPlan:
    """What fits: see `plan_capacity` for the names."""

    model: str
    hypothetical: bool
    dtype: str
    context: int
    window: int
    gpus: int
    tensor_parallel_size: int
    gpu_memory: float
    gpu_memory_utilization: float
    budget: int
    original: Occupancy
    compressed: Occupancy


def plan_capacity(
    name: str,
    *,
    gpu_memory: float,
    context: int,
    config: EigenAttentionConfig | None = None,
    dtype: str | None = None,
    tensor_parallel_size: int = 1,
    gpus: int | None = None,
    gpu_memory_utilization: float = 0.9,
) -> CapacityPlan:
    """Count the sequences that fit beside the weights.

    Args:
        name: an original or a compressed model; its configuration alone is read.
        gpu_memory: GiB of each GPU.
        context: tokens of a sequence, prompt and answer.
        config: for an original, what it would be compressed to, by a `kv_ratio`.
        dtype: of weights and cache; the checkpoint's own by default.
        tensor_parallel_size: GPUs that share the heads of one copy of the model.
        gpus: all of them, a multiple of that: each further group holds a copy of its own.
        gpu_memory_utilization: the share of a GPU's memory that weights and cache may take; what remains is for
            activations and the engine.

    Raises:
        EigenAttnError: on a model that cannot be read, or numbers that make no sense.
    """
    size, gpus = tensor_parallel_size, gpus if gpus is not None else tensor_parallel_size
    if not 0 < gpu_memory_utilization <= 1:
        raise EigenAttnError(f"gpu_memory_utilization must lie in (0, 1], not {gpu_memory_utilization}.")
    if not 0 < gpu_memory < math.inf or context < 1 or size < 1 or gpus < 1:
        raise EigenAttnError("gpu_memory, context, tensor_parallel_size and gpus must be numbers above 0.")
    if gpus % size:
        raise EigenAttnError(f"{gpus} GPUs cannot be split into groups of tensor_parallel_size={size}.")
    chosen = None if dtype is None else dtype_of(dtype)
    source = Source.of(name)
    model_config = load_config(source)
    check_length(model_config, context)
    original = layouts(model_config, None)
    compression = compression_of(source, model_config)
    if compression is not None and config is not None:
        raise EigenAttnError(f"{name} is compressed already: what it is compressed to is its own.")
    if compression is None:
        asked = (config or EigenAttentionConfig()).for_model(turns_keys(model_config))
        compressed = _supposed(asked, original)
        centred = True
    else:
        compressed, centred = layouts(model_config, compression), compression.centred
    text = model_config.get_text_config(decoder=True)
    stored: torch.dtype = chosen or text.dtype or torch.float32
    budget = int(gpu_memory * GIB * gpu_memory_utilization)

    def occupancy(layers: list[Layout], model: nn.Module) -> Occupancy:
        held = [layer.split(size) for layer in layers]
        weights = weight_bytes(model, stored.itemsize, size)
        free = max(budget - weights, 0)

        def of(length: int) -> int:
            return _sequence_bytes(held, stored.itemsize, length, text)

        return Occupancy(
            weights=weights,
            cache=free,
            bytes_per_token=bytes_per_token(held, stored.itemsize),
            sequence=of(context),
            sequences=free // of(context) * (gpus // size),
            longest=_longest(of, free),
        )

    plain = empty_model(model_config)
    before = occupancy(original, plain)
    convert_attention(plain)
    for attention, layout in zip(eigen_layers(plain), compressed, strict=True):
        attention.allocate(layout, centred)
    return CapacityPlan(
        model=name,
        hypothetical=compression is None,
        dtype=str(stored).removeprefix("torch."),
        context=context,
        window=compressed[0].window,
        gpus=gpus,
        tensor_parallel_size=size,
        gpu_memory=gpu_memory,
        gpu_memory_utilization=gpu_memory_utilization,
        budget=budget,
        original=before,
        compressed=occupancy(compressed, plain),
    )


def weight_bytes(model: nn.Module, element_size: int, size: int = 1) -> int:
    """Bytes of a model's weights on one of `size` GPUs: matrices are split, vectors (norms, biases) are not."""
    counts = (-(-each.numel() // size) if each.dim() > 1 else each.numel() for each in model.parameters())
    return sum(counts) * element_size


def _sequence_bytes(layers: Sequence[Layout], element_size: int, length: int, text: Any) -> int:
    """`cache_bytes`, where layers that slide hold what they see."""
    types, sliding = getattr(text, "layer_types", None), getattr(text, "sliding_window", None)
    slide = [types[i] == "sliding_attention" if types else sliding is not None for i in range(len(layers))]
    seen = [min(length, sliding - 1) if slides and sliding else length for slides in slide]
    return cache_bytes(layers, element_size, seen)


def _longest(of: Any, free: int) -> int:
    """The most tokens of one sequence within so many bytes."""
    low, high = 0, 1
    while of(high) <= free and high < 2**40:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if of(middle) <= free else (low, middle)
    return low


def _supposed(config: EigenAttentionConfig, original: Sequence[Layout]) -> list[Layout]:
    """What compressing to a ratio would give: the same in all layers, up to whole channels."""
    kv_heads, head_dim = original[0].kv_heads, original[0].head_dim
    if config.kv_ratio is None:
        raise EigenAttnError("a plan needs a kv_ratio: other targets follow from the text.")
    if config.kv_ratio == 1:
        return list(original)
    check_tied(config, original)
    kinds = config.sharing.kinds_of(original[0].sides)
    if any(kv_heads % heads for _, heads in kinds):
        raise EigenAttnError(f"{max(heads for _, heads in kinds)} KV heads cannot share a latent, of {kv_heads}.")
    # The ratio is met over all layers, so elements that remain give the first latents a channel more.
    spare = int(config.kv_ratio * sum(layer.original_elements for layer in original))
    spare -= len(original) * sum(
        kv_heads // heads * max(int(config.kv_ratio * len(sides) * heads * head_dim), 1) for sides, heads in kinds
    )
    supposed = []
    for layer in original:
        latents = []
        for sides, heads in kinds:
            full = len(sides) * heads * head_dim
            rank, widths = max(int(config.kv_ratio * full), 1), None
            if config.coded:
                widths = _widths(16 * config.kv_ratio, full)
                rank = widths.channels
            elif spare >= kv_heads // heads:
                rank, spare = rank + 1, spare - kv_heads // heads
            latents.append(Latent(sides, heads, rank, head_dim, widths))
        supposed.append(layer.holding(latents, config.window))
    return supposed


def _widths(bits: float, channels: int) -> Widths:
    """Channels of two neighbouring widths that take `bits` a channel on average, the scale included."""
    bits = max(bits - 8 / channels, 0)
    lower, upper = next(pair for pair in itertools.pairwise(ALLOTTED) if bits <= pair[1])
    groups = channels // GROUP
    wide = max(int(groups * (bits - lower) / (upper - lower)), 0 if lower else 1)
    counts = {upper: wide * GROUP, lower: (groups - wide) * GROUP}
    return Widths.of({width: count for width, count in counts.items() if width}, scaled=True)
