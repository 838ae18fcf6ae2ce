"""How many bytes a cache takes: planned from ranks, and counted on a cache in use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Layer(Protocol):
    """What a layer's size follows from."""

    kv_heads: int
    head_dim: int
    rank_k: int
    rank_v: int


def bytes_per_token(layers: Sequence[Layer], element_size: int) -> int:
    """Bytes a token adds to the cache, all layers together, at `element_size` bytes an element."""
    return sum(layer.kv_heads * (layer.rank_k + layer.rank_v) for layer in layers) * element_size


def baseline_bytes_per_token(layers: Sequence[Layer], element_size: int) -> int:
    """Bytes a token adds to the cache of the original model."""
    return sum(2 * layer.kv_heads * layer.head_dim for layer in layers) * element_size


def kv_ratio(layers: Sequence[Layer]) -> float:
    """Size of the cache in proportion to the original's; 1 for a model without compressed layers."""
    return bytes_per_token(layers, 1) / baseline_bytes_per_token(layers, 1) if layers else 1.0


def allocated_bytes(cache: Any) -> int:
    """Bytes that the keys and values of a transformers cache occupy."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors)
