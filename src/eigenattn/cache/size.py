"""How many bytes a cache takes: planned from the layout of its layers, and counted on a cache in use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .layout import Layout
from .store import room_for

# Bytes of an element of the original cache, where sizes are compared.
HALF = 2
# Bytes that tell which token a row is, where tokens were evicted.
COLUMN = 4


def bytes_per_token(layers: Sequence[Layout], element_size: int) -> int:
    """Bytes a token adds to the cache, all layers together, at `element_size` bytes an element."""
    return sum(layer.bytes_per_token(element_size) for layer in layers)


def baseline_bytes_per_token(layers: Sequence[Layout], element_size: int) -> int:
    """Bytes a token adds to the cache of the original model."""
    return sum(layer.original_elements for layer in layers) * element_size


def cache_bytes(
    layers: Sequence[Layout], element_size: int, length: int | Sequence[int], kept: int | None = None
) -> int:
    """Bytes of the cache of one sequence of `length` tokens in decoding, the exact window included.

    The window holds one token more than its size: the last one, which can still be taken back, displaces none. Latents
    lie in a store with room behind them (`eigenattn.cache.store`), which counts too; an uncompressed model is counted
    as transformers' own cache has it, without.

    Args:
        length: tokens, or those that each layer sees.
        kept: tokens that a cache which evicts holds of them in every layer; None for other caches. The tally of a
            rule that has one, 4 bytes for each of them and head, comes on top.
    """
    lengths = [length] * len(layers) if isinstance(length, int) else length
    exactly = kept is None and all(layer.uncompressed and not layer.window for layer in layers)
    total = 0
    for layer, seen in zip(layers, lengths, strict=True):
        exact = min(layer.window + 1, seen) if layer.window else 0
        rows = max(seen if kept is None else min(kept, seen), layer.window) - layer.window
        a_token = layer.bytes_per_token(element_size)
        if kept is not None and kept < seen:
            a_token += COLUMN * layer.kv_heads // layer.together
        total += (rows if exactly else room_for(rows)) * a_token + exact * layer.original_elements * element_size
    return total


def kv_ratio(layers: Sequence[Layout]) -> float:
    """Size of the cache in proportion to the original's at 16 bits; 1 for a model without compressed layers."""
    return bytes_per_token(layers, HALF) / baseline_bytes_per_token(layers, HALF) if layers else 1.0


STATED_LENGTHS = (1024, 4096, 32768)


def ratio_at(layers: Sequence[Layout]) -> dict[int, float]:
    """Size of the whole cache, window included, in proportion to the original's at 16 bits, at some lengths."""
    original = baseline_bytes_per_token(layers, HALF)
    return {length: cache_bytes(layers, HALF, length) / (length * original) for length in STATED_LENGTHS}


def allocated_bytes(cache: Any) -> int:
    """Bytes that a transformers cache holds for keys and values, the exact window and room to grow included."""
    tensors = [
        tensor
        for layer in cache.layers
        for tensor in (layer.tensors() if hasattr(layer, "tensors") else (layer.keys, layer.values))
    ]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)
