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


def cache_bytes(layers: Sequence[Layer], element_size: int, length: int, window: int) -> int:
    """Bytes of the cache of one sequence of `length` tokens in decoding, the exact window included.

    The window holds one token more than its size: the last one, which can still be taken back, displaces none.
    """
    exact = min(window + 1, length) if window else 0
    latents = max(length - window, 0)
    full = sum(2 * layer.kv_heads * layer.head_dim for layer in layers)
    return latents * bytes_per_token(layers, element_size) + exact * full * element_size


def kv_ratio(layers: Sequence[Layer]) -> float:
    """Size of the cache in proportion to the original's; 1 for a model without compressed layers."""
    return bytes_per_token(layers, 1) / baseline_bytes_per_token(layers, 1) if layers else 1.0


STATED_LENGTHS = (1024, 4096, 32768)


def ratio_at(layers: Sequence[Layer], window: int) -> dict[int, float]:
    """Size of the whole cache, window included, in proportion to the original's, at some lengths."""
    original = baseline_bytes_per_token(layers, 1)
    return {length: cache_bytes(layers, 1, length, window) / (length * original) for length in STATED_LENGTHS}


def allocated_bytes(cache: Any) -> int:
    """Bytes that a transformers cache holds for keys and values, the exact window included."""
    names = ("keys", "values", "window_keys", "window_values")
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in names]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)
