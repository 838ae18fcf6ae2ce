"""Attention with the exact window: the last W tokens as the original has them, everything earlier through latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..cache.layers import Far, Near, with_window
from ..errors import EigenAttnError
from ..kernels import BACKENDS
from ..kernels.pairs import attend_one_in_pairs
from ..kernels.windowed import attend, attend_one, by_column, split_masks
from .projections import Heads
from .rotary import once_a_pass, rotate, turns_of

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
        if t == 1 and not static:
            return _decode_step(attention, heads.query, far, near, columns, kwargs)
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


def _decode_step(
    attention: EigenAttention, q: Tensor, far: Far, near: Near, columns: int, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """One query a row and a dynamic cache: what is seen exactly, and what through latents, are slices.

    Side by side they are the columns in order, so the model's mask holds as it is.
    """
    border = max(near.query - attention.window + 1, near.first)
    far = Far(*(x[:, :, :border] for x in far))
    near_keys, near_values = (x[:, :, border - near.first :] for x in near[:2])
    options = {
        "seen": attention.mask_for(q, columns, kwargs),
        "scale": attention.scaling,
        "softcap": attention.softcap,
    }
    on_cpu = q.dtype == torch.float32 and q.device.type == "cpu" and attention.shared_heads == 1
    if attention.rotates and on_cpu and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        found = _attend_in_pairs(attention, q, far, near_keys, near_values, columns, kwargs, options)
    else:
        q_far, offset = q, None
        if attention.rotates:
            q, far_keys, near_keys = _rotated(attention, q, far.keys, near_keys, columns, kwargs)
            q_far, far = q, far._replace(keys=far_keys)
        elif attention.key_decoder is not None:
            q_far, offset = attention.query_in_small_space(q), attention.query_on_mean(q)
        found = attend_one(q, q_far, *far, near_keys, near_values, far_offset=offset, **options)
    far_sum, far_weight, near_sum, weights = found
    out = near_sum + attention.decode_output(far_sum, weight=far_weight)
    return out, weights if attention.implementation_for(kwargs) == "eager" else None


def _rotated(
    attention: EigenAttention, q: Tensor, far_keys: Tensor, near_keys: Tensor, columns: int, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, decoded far keys and near keys at their own positions."""
    interleaved, far = attention.family.interleaved, far_keys.shape[-2]
    cos, sin = attention.key_angles(q, kwargs["position_ids"], columns, columns)
    return (
        rotate(q, *kwargs["position_embeddings"], interleaved),
        rotate(attention.decode(far_keys, "key"), cos[:, :far], sin[:, :far], interleaved),
        rotate(near_keys, cos[:, far:], sin[:, far:], interleaved),
    )


def _attend_in_pairs(
    attention: EigenAttention,
    q: Tensor,
    far: Far,
    near_keys: Tensor,
    near_values: Tensor,
    columns: int,
    kwargs: dict[str, Any],
    options: dict[str, Any],
) -> tuple[Tensor, ...]:
    """`attend_one_in_pairs`, with rotations and room that the layers share."""
    b, h, _, d = q.shape
    g, interleaved = attention.kv_heads, attention.family.interleaved

    def turns() -> Tensor:
        angles = attention.key_angles(q, kwargs["position_ids"], columns, columns)
        found = turns_of(*angles, interleaved)
        return torch.cat([found, found[:, :, -1:].expand(-1, -1, h // g, -1)], dim=2)

    def shared(name: tuple, compute: Callable[[], Tensor]) -> Tensor:
        return once_a_pass(kwargs["position_ids"], attention.layer_idx, name, compute)

    shape = (b, g, columns + h // g, d)
    return attend_one_in_pairs(
        q,
        *far,
        near_keys,
        near_values,
        decoder=None if attention.key_decoder is None else attention.by_head("key_decoder"),
        mean=None if attention.key_mean is None else attention.by_head("key_mean"),
        turns=shared(("turns", *shape, attention.layer_type), turns),
        room=shared(("room", *shape), lambda: q.new_empty(shape)),
        interleaved=interleaved,
        **options,
    )


def _rotations(attention: EigenAttention, q: Tensor, far: Far, near: Near, columns: int, length: Any, kwargs: dict):
    """Functions that rotate far and near keys to their own positions; both do nothing without rotary positions."""
    if not attention.rotates:
        return (lambda keys: keys), (lambda keys: keys)
    cos, sin = attention.key_angles(q, kwargs["position_ids"], columns, length)  # [B or 1, columns, width]
    near_columns = (torch.arange(near.keys.shape[-2], device=q.device) + near.first).clamp_min(0)
    angles_far = cos[:, : far.keys.shape[-2]], sin[:, : far.keys.shape[-2]]
    angles_near = cos.index_select(1, near_columns), sin.index_select(1, near_columns)
    interleaved = attention.family.interleaved
    return (lambda keys: rotate(keys, *angles_far, interleaved)), (lambda keys: rotate(keys, *angles_near, interleaved))
