"""How many bytes a cache takes: planned from ranks, and counted on a cache in use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

BYTES_16_BIT = 2


class Layer(Protocol):
    """What a layer's size follows from."""

    kv_heads: int
    head_dim: int
    rank_k: int
    rank_v: int


def bytes_per_token(layers: Sequence[Layer]) -> int:
    """Bytes a token adds to the cache, all layers together, at 16 bits an element."""
    return sum(a.kv_heads * (a.rank_k + a.rank_v) for a in layers) * BYTES_16_BIT


def baseline_bytes_per_token(layers: Sequence[Layer]) -> int:
    """Bytes a token adds to the cache of the original model, at 16 bits an element."""
    return sum(2 * a.kv_heads * a.head_dim for a in layers) * BYTES_16_BIT


def allocated_bytes(cache: Any) -> int:
    """Bytes that the keys and values of a transformers cache occupy."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors)
