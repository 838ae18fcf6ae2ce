"""How many bytes a cache takes: planned from ranks, and counted on a cache in use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from ..config import ALONE, Sharing
from .packing import Widths
from .store import room_for


class Layer(Protocol):
    """What a layer's size follows from."""

    kv_heads: int
    head_dim: int
    rank_k: int
    rank_v: int
    widths_k: Widths | None
    widths_v: Widths | None
    sharing: Sharing


class Shape(NamedTuple):
    """A `Layer` without a module."""

    kv_heads: int
    head_dim: int
    rank_k: int
    rank_v: int
    widths_k: Widths | None = None
    widths_v: Widths | None = None
    sharing: Sharing = ALONE


# Bytes of an element of the original cache, where sizes are compared.
HALF = 2
# Bytes that tell which token a row is, where tokens were evicted.
COLUMN = 4


def bytes_of_layer(layer: Layer, element_size: int) -> int:
    """Bytes of a token's latents in one layer, packed if quantised, or in elements of `element_size` bytes."""
    latents_k, latents_v = (layer.kv_heads // heads for heads in layer.sharing)
    if layer.widths_k is None or layer.widths_v is None:
        return (latents_k * layer.rank_k + latents_v * layer.rank_v) * element_size
    return latents_k * layer.widths_k.bytes + latents_v * layer.widths_v.bytes


def bytes_per_token(layers: Sequence[Layer], element_size: int) -> int:
    """Bytes a token adds to the cache, all layers together, at `element_size` bytes an element."""
    return sum(bytes_of_layer(layer, element_size) for layer in layers)


def baseline_bytes_per_token(layers: Sequence[Layer], element_size: int) -> int:
    """Bytes a token adds to the cache of the original model."""
    return sum(2 * layer.kv_heads * layer.head_dim for layer in layers) * element_size


def cache_bytes(layers: Sequence[Layer], element_size: int, length: int, window: int, kept: int | None = None) -> int:
    """Bytes of the cache of one sequence of `length` tokens in decoding, the exact window included.

    The window holds one token more than its size: the last one, which can still be taken back, displaces none. Beside a
    window latents lie in a store with room behind them (`eigenattn.cache.store`), which counts too.

    Args:
        kept: tokens that a cache which evicts holds of them in every layer; None for other caches.
    """
    exact = min(window + 1, length) if window else 0
    evicts = kept is not None
    rows = max(min(kept, length) if evicts else length, window) - window
    latents = room_for(rows) if window or evicts else rows
    full = sum(2 * layer.kv_heads * layer.head_dim for layer in layers)
    a_token = bytes_per_token(layers, element_size)
    if evicts and kept < length:
        a_token += COLUMN * sum(min(heads_held(layer)) for layer in layers)
    return latents * a_token + exact * full * element_size


def heads_held(layer: Layer) -> tuple[int, int]:
    """Heads of what the cache holds of keys, and of values: latents, or KV heads, for at full rank none share."""
    apart = layer.widths_k is None and layer.rank_v > 0  # without a latent of both, or codes
    sides = zip((layer.rank_k, layer.rank_v), layer.sharing, strict=True)
    keys, values = (
        layer.kv_heads if apart and rank == shared * layer.head_dim else layer.kv_heads // shared
        for rank, shared in sides
    )
    return keys, values


def kv_ratio(layers: Sequence[Layer]) -> float:
    """Size of the cache in proportion to the original's at 16 bits; 1 for a model without compressed layers."""
    return bytes_per_token(layers, HALF) / baseline_bytes_per_token(layers, HALF) if layers else 1.0


STATED_LENGTHS = (1024, 4096, 32768)


def ratio_at(layers: Sequence[Layer], window: int) -> dict[int, float]:
    """Size of the whole cache, window included, in proportion to the original's at 16 bits, at some lengths."""
    original = baseline_bytes_per_token(layers, HALF)
    return {length: cache_bytes(layers, HALF, length, window) / (length * original) for length in STATED_LENGTHS}


def allocated_bytes(cache: Any) -> int:
    """Bytes that a transformers cache holds for keys and values, the exact window and room to grow included."""
    names = ("keys", "values", "columns", "window_keys", "window_values")
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in names]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)
