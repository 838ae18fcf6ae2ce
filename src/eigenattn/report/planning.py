"""How many sequences fit on GPUs, before and after compression: arithmetic on `config.json`, without weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ..cache.packing import BITS, Widths
from ..cache.size import Shape, bytes_per_token, cache_bytes
from ..config import EigenAttentionConfig
from ..errors import EigenAttnError
from ..models.checkpoint import EigenAttnCheckpointConfig, allocate
from ..models.conversion import convert_attention, eigen_layers
from ..models.loading import DTYPES, Source, load_config
from .inspection import compression_of, shapes

GIB = 2**30
# Channels that share a width (see `compression.quantise`).
GROUP = 4


@dataclass(frozen=True)
class Side:
    """One of the two models that are compared. Bytes and tokens are of one GPU, sequences of all of them.

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
    original: Side
    compressed: Side

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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
        config: for an original, what it would be compressed to, by a `kv_ratio` or by `bits_per_element`.
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
    if gpu_memory <= 0 or context < 1 or size < 1 or gpus < 1:
        raise EigenAttnError("gpu_memory, context, tensor_parallel_size and gpus must be above 0.")
    if gpus % size:
        raise EigenAttnError(f"{gpus} GPUs cannot be split into groups of tensor_parallel_size={size}.")
    if dtype is not None and dtype not in DTYPES:
        raise EigenAttnError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}.")
    source = Source.of(name)
    model_config = load_config(source)
    original = shapes(model_config, None)
    compression = compression_of(source, model_config)
    if compression is not None and config is not None:
        raise EigenAttnError(f"{name} is compressed already: kv_ratio, bits_per_element and window are its own.")
    hypothetical = compression is None
    if compression is None:
        compression = _supposed(config or EigenAttentionConfig(), original)
    compressed = shapes(model_config, compression)
    for layer in (original[0], compressed[0]):
        if layer.kv_heads // layer.sharing.together % size:
            heads = layer.sharing.told(layer.kv_heads)
            raise EigenAttnError(f"{heads} cannot be split evenly over {size} GPUs.")
    text = model_config.get_text_config(decoder=True)
    stored = DTYPES[dtype] if dtype else (text.dtype or torch.float32)
    budget = int(gpu_memory * GIB * gpu_memory_utilization)
    window = compression.method["window"]

    def side(layers: list[Shape], window: int, model: nn.Module) -> Side:
        held = [_on_one(layer, size) for layer in layers]
        weights = weight_bytes(model, stored.itemsize, size)
        free = max(budget - weights, 0)

        def of(length: int) -> int:
            return _sequence_bytes(held, stored.itemsize, length, window, text)

        return Side(
            weights=weights,
            cache=free,
            bytes_per_token=bytes_per_token(held, stored.itemsize),
            sequence=of(context),
            sequences=free // of(context) * (gpus // size),
            longest=_longest(of, free),
        )

    plain = _meta(model_config)
    before = side(original, 0, plain)
    convert_attention(plain)
    allocate(eigen_layers(plain), compression)
    return CapacityPlan(
        model=name,
        hypothetical=hypothetical,
        dtype=str(stored).removeprefix("torch."),
        context=context,
        window=window,
        gpus=gpus,
        tensor_parallel_size=size,
        gpu_memory=gpu_memory,
        gpu_memory_utilization=gpu_memory_utilization,
        budget=budget,
        original=before,
        compressed=side(compressed, window, plain),
    )


def weight_bytes(model: nn.Module, element_size: int, size: int = 1) -> int:
    """Bytes of a model's weights on one of `size` GPUs: matrices are split, vectors (norms, biases) are not."""
    counts = (-(-each.numel() // size) if each.dim() > 1 else each.numel() for each in model.parameters())
    return sum(counts) * element_size


def _meta(config: Any) -> nn.Module:
    """The model without weights."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _on_one(layer: Shape, size: int) -> Shape:
    return layer._replace(kv_heads=layer.kv_heads // size)


def _sequence_bytes(layers: Sequence[Shape], element_size: int, length: int, window: int, text: Any) -> int:
    """`cache_bytes`, where layers that slide hold what they see."""
    types, sliding = getattr(text, "layer_types", None), getattr(text, "sliding_window", None)
    total = 0
    for index, layer in enumerate(layers):
        slides = types[index] == "sliding_attention" if types else sliding is not None
        seen = min(length, sliding - 1) if slides and sliding else length
        total += cache_bytes([layer], element_size, seen, window)
    return total


def _longest(of: Any, free: int) -> int:
    """The most tokens of one sequence within so many bytes."""
    low, high = 0, 1
    while of(high) <= free and high < 2**40:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if of(middle) <= free else (low, middle)
    return low


def _supposed(config: EigenAttentionConfig, original: Sequence[Shape]) -> EigenAttnCheckpointConfig:
    """What compressing to a ratio, or to bits, would give: the same in all layers, up to whole channels."""
    first, sides = original[0], 2 * len(original)
    entries: list[dict[str, Any]]
    if config.bits_per_element is not None:
        widths = _widths(config.bits_per_element, first.head_dim)
        both = {"widths_k": list(widths), "widths_v": list(widths)}
        entries = [{"rank_k": widths.channels, "rank_v": widths.channels, **both}] * len(original)
    elif config.kv_ratio is not None:
        # The ratio is met over all layers, so channels that remain go to the first sides.
        channels = max(int(config.kv_ratio * first.head_dim * sides), sides)
        ranks = [channels // sides + (side < channels % sides) for side in range(sides)]
        entries = [{"rank_k": ranks[2 * i], "rank_v": ranks[2 * i + 1]} for i in range(len(original))]
    else:
        raise EigenAttnError("a plan needs a kv_ratio or bits_per_element: other targets follow from the text.")
    return EigenAttnCheckpointConfig(entries, centred=config.basis == "attention", method=config.to_dict())


def _widths(bits: float, channels: int) -> Widths:
    """Channels of two neighbouring widths that take `bits` a channel on average."""
    lower, upper = next(pair for pair in ((0, 2), (2, 4), (4, 6), (6, 8)) if bits <= pair[1])
    groups = channels // GROUP
    wide = int(groups * (bits - lower) / (upper - lower))
    counts = {upper: wide * GROUP, lower: (groups - wide) * GROUP}
    found = Widths(*(counts.get(width, 0) for width in BITS))
    return found if found.channels else Widths(0, 0, 0, GROUP)
