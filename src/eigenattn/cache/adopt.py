"""Having the layers of transformers' caches hold latents."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer, StaticLayer

from ..errors import EigenAttnError
from .context import CacheContext
from .evicting import EvictingLayer
from .hybrid import HybridLatentLayer, HybridStaticLatentLayer
from .layers import LatentLayer
from .sight import Far, Sight
from .static import StaticLatentLayer


def adopt(cache: Any, layer_idx: int, window: int, sliding_window: int | None) -> None:
    """Have one layer of a transformers cache hold latents, the first time it is met.

    A quantised cache of transformers stays as it is where there is no window: it quantises latents.

    Args:
        window: exact tokens, W.
        sliding_window: tokens visible at all to the layer, or None.

    Raises:
        EigenAttnError: if the layer is of a kind that cannot, or holds tokens already.
    """
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= layer_idx:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[layer_idx]
    if isinstance(layer, (LatentLayer, StaticLatentLayer)) or (is_quantised(layer) and not window):
        return
    if layer.is_initialized:
        raise EigenAttnError(
            "this cache was filled by another model, or by peft's prefix tuning, and holds whole heads: pass a new "
            "one, and tune prompts or LoRA instead."
        )
    context = CacheContext.of(cache)
    if isinstance(layer, StaticLayer):
        longest = max(getattr(each, "get_max_length", lambda: -1)() for each in cache.layers)
        if sliding_window is not None and longest == sliding_window and all(cache.is_sliding):
            raise EigenAttnError(
                "a static cache in which every layer slides has no room for latents: use a dynamic cache."
            )
        static = (context, layer_idx, window, longest, layer.is_sliding)
        has_states = isinstance(layer, LinearAttentionLayer)
        cache.layers[layer_idx] = (
            HybridStaticLatentLayer(*static).beside(layer) if has_states else StaticLatentLayer(*static)
        )
        return
    if isinstance(layer, LinearAttentionLayer):
        sliding = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
        cache.layers[layer_idx] = HybridLatentLayer(context, layer_idx, window, sliding).beside(layer)
        return
    if type(layer).__name__ not in ("DynamicLayer", "DynamicSlidingWindowLayer"):
        raise EigenAttnError(
            f"a cache of {type(layer).__name__} cannot hold the exact window: use a dynamic or a static cache "
            "(coded latents are held by both)."
        )
    sliding = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
    slides = sliding is not None or sliding_window is not None
    eviction = None if slides else getattr(cache, "eviction", None)
    make = LatentLayer if eviction is None else functools.partial(EvictingLayer, eviction=eviction)
    recording = any(getattr(each, "record_past", False) for each in cache.layers)
    cache.layers[layer_idx] = make(context, layer_idx, window, sliding)
    cache.layers[layer_idx].record_past = recording


def is_quantised(layer: Any) -> bool:
    """Whether a layer is of a quantised cache of transformers."""
    return "Quantized" in type(layer).__name__


def update_quantised(cache: Any, layer_idx: int, rows: tuple[Tensor, ...], position_ids: Tensor | None) -> Sight:
    """Add latents [B, G/N, T, R] to a quantised cache of transformers; as `LatentLayer.update`.

    Raises:
        EigenAttnError: if codes would be quantised again, or groups of a scale do not fit latents of any length.
    """
    layer, name = cache.layers[layer_idx], type(cache.layers[layer_idx]).__name__
    if rows[0].dtype == torch.uint8:
        raise EigenAttnError(f"the latents are coded already, and {name} would do it again: use a dynamic cache.")
    if len(rows) != 2:
        raise EigenAttnError(f"{name} cannot hold latents that keys and values share: use a dynamic cache.")
    group = getattr(layer, "q_group_size", 1)
    sizes = [row.shape[1] * row.shape[-1] for row in rows]  # elements of a token
    if any(size % group for size in sizes):
        raise EigenAttnError(
            f"{name} quantises {group} elements together, and a token's latents are of {sizes[0]} and {sizes[1]}: pass "
            f"a q_group_size that divides both, such as {math.gcd(*sizes, group)}, or compress with coded latents."
        )
    context, start, new = CacheContext.of(cache), layer.get_seq_length(), rows[0].shape[-2]
    if context.begin(layer_idx):
        context.write(start, position_ids, len(rows[0]))
    held = cache.update(*rows, layer_idx)
    return Sight(Far(tuple(held)), None, start, start + new, context.positions(0, start + new, rows[0].device))
