"""Attention with the exact window: the last W tokens as the original has them, everything earlier through latents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..cache.layers import Far, Near, with_window
from ..errors import EigenAttnError
from ..kernels import BACKENDS
from ..kernels.windowed import attend, attend_one, by_column, split_masks
from .projections import Heads
from .rotary import key_positions, rotate

if TYPE_CHECKING:
    from .attention import EigenAttention


def attend_with_window(
    attention: EigenAttention, heads: Heads, cache: Any, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """The attention output [B, H, T, D] of queries, keys and values before rotation, and the weights if eager.

    The meaning is the same in prefill and in decoding, with a cache and without one: query m sees keys m - W + 1 .. m
    exactly and all earlier ones through their latents.
    """
    implementation = attention.implementation_for(kwargs)
    if implementation not in BACKENDS:
        raise EigenAttnError(
            f'{implementation} cannot attend with an exact window: load the model with attn_implementation="sdpa".'
        )
    q, k, v = heads
    window, t = attention.window, q.shape[-2]
    if cache is None:
        leaving = max(t - window, 0)
        far = Far(*attention.rounded(k[:, :, :leaving], v[:, :, :leaving]))
        near = Near(k, v, 0, 0)
        columns = length = t
    else:
        with_window(cache, attention.layer_idx, window, attention.sliding_window)
        far, near = cache.update(k, v, attention.layer_idx, encode=attention.stored)
        static = isinstance(near.first, Tensor)
        mask = kwargs.get("attention_mask")
        if static and isinstance(mask, Tensor) and mask.shape[-1] < far.keys.shape[-2]:
            # The mask of the first pass was made for the layer that stood here before, with room for what slides only.
            far = Far(*(x[:, :, : mask.shape[-1]] for x in far))
        far = Far(*attention.restored(*far, k.dtype))
        columns = far.keys.shape[-2] if static else near.first + near.keys.shape[-2]
        length = cache.get_seq_length(attention.layer_idx) if static else columns
    rotate_far, rotate_near = _rotations(attention, q, far, near, columns, length, kwargs)
    q = rotate(q, *kwargs["position_embeddings"], attention.family.interleaved) if attention.rotates else q
    near_keys = rotate_near(near.keys)
    mask = attention.mask_for(q, columns, kwargs)
    options = {"scale": attention.scaling, "softcap": attention.softcap}
    if t > 1:
        return attend(
            BACKENDS[implementation],
            q,
            rotate_far(attention.decode(far.keys, "key")),
            attention.decode(far.values, "value"),
            near_keys,
            near.values,
            near_first=near.first,
            query_first=near.query,
            window=window,
            mask=mask,
            columns=columns,
            dropout=attention.dropout if attention.training else 0.0,
            **options,
        )
    far_keys, q_far, offset = far.keys, q, None
    if attention.rotates:
        far_keys = rotate_far(attention.decode(far_keys, "key"))
    elif attention.key_decoder is not None:
        q_far, offset = attention.query_in_small_space(q), attention.query_on_mean(q)
    query = torch.zeros(1, dtype=torch.int64, device=q.device) + near.query
    columns_near = torch.arange(near_keys.shape[-2], device=q.device) + near.first
    seen = split_masks(query, far_keys.shape[-2], columns_near, window, mask, q.dtype)
    far_sum, far_weight, near_sum, weights = attend_one(
        q, q_far, far_keys, far.values, near_keys, near.values, far_offset=offset, seen=seen, **options
    )
    out = near_sum + attention.decode_output(far_sum, weight=far_weight)
    if implementation != "eager":
        return out, None
    return out, by_column(weights, far_keys.shape[-2], columns_near, columns)


def _rotations(attention: EigenAttention, q: Tensor, far: Far, near: Near, columns: int, length: Any, kwargs: dict):
    """Functions that rotate far and near keys to their own positions; both do nothing without rotary positions."""
    if not attention.rotates:
        return (lambda keys: keys), (lambda keys: keys)
    positions = key_positions(kwargs["position_ids"], columns, length)  # [B or 1, columns]
    near_columns = torch.arange(near.keys.shape[-2], device=q.device) + near.first
    angles_far = attention.angles(q, positions[:, : far.keys.shape[-2]])
    angles_near = attention.angles(q, positions.index_select(1, near_columns.clamp_min(0)))
    interleaved = attention.family.interleaved
    return (lambda keys: rotate(keys, *angles_far, interleaved)), (lambda keys: rotate(keys, *angles_near, interleaved))
