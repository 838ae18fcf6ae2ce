"""Attention with the exact window: the last W tokens as the original has them, everything earlier through latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..cache.layers import Far, Near, with_window
from ..errors import EigenAttnError
from ..kernels import BACKENDS
from ..kernels.pairs import attend_one_in_pairs, paired
from ..kernels.reference import attend as reference_attend
from ..kernels.windowed import attend, attend_one, by_column, split_masks, take_columns
from .decoding import decode_with_window, has_kernel
from .eviction import evict, for_each_kv_head, for_each_query_head
from .kept import kept
from .prefill import is_long, read_with_window
from .projections import Heads
from .rotary import at_columns, once_a_pass, rotate, turns_of

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
        if is_long(attention, q, columns, cache, kwargs):
            return read_with_window(attention, q, far, near, False, columns, kwargs), None
    else:
        with_window(cache, attention.layer_idx, window, attention.sliding_window)
        far, near = cache.update(k, v, attention.layer_idx, encode=attention.stored)
        static = isinstance(near.first, Tensor)
        mask = kwargs.get("attention_mask")
        if static and isinstance(mask, Tensor) and mask.shape[-1] < far.keys.shape[-2]:
            # The mask of the first pass was made for the layer that stood here before, with room for what slides only.
            far = Far(*(x[:, :, : mask.shape[-1]] for x in far[:2]))
        columns = far.keys.shape[-2] if static else near.first + near.keys.shape[-2]
        if has_kernel(attention, q, cache, kwargs):
            return decode_with_window(attention, q, far, near, columns, kwargs), None
        if is_long(attention, q, columns, cache, kwargs):
            return read_with_window(attention, q, far, near, True, columns, kwargs), None
        far = Far(*attention.restored(*far[:2], k.dtype), for_each_query_head(attention, far.columns))
        length = cache.get_seq_length(attention.layer_idx) if static else columns
        if t == 1 and not static:
            found = _decode_step(attention, heads.query, far, near, columns, kwargs)
            evict(attention, cache, q, kwargs, weights=None)
            return found
    rotate_far, rotate_near = _rotations(attention, q, far, near.keys, near.first, columns, length, kwargs)
    q = rotate(q, *kwargs["position_embeddings"], attention.family.interleaved) if attention.rotates else q
    near_keys = rotate_near(near.keys)
    options = {"scale": attention.scaling, "softcap": attention.softcap}
    if t > 1:
        mask = attention.mask_for(q, columns, kwargs)
        far_keys = rotate_far(attention.decode(far.keys, "key"))
        held = far_keys, attention.decode(far.values, "value"), near_keys, near.values
        options |= {"near_first": near.first, "window": window, "columns": columns, "far_columns": far.columns}
        dropout = attention.dropout if attention.training else 0.0
        found = attend(
            BACKENDS[implementation], q, *held, query_first=near.query, mask=mask, dropout=dropout, **options
        )

        def far_weights(queries: int) -> Tensor:
            last = q[:, :, -queries:], None if mask is None else mask[..., -queries:, :]
            first = near.query + t - queries
            _, weights = attend(reference_attend, last[0], *held, query_first=first, mask=last[1], **options)
            return weights[..., : far_keys.shape[-2]] if far.columns is None else take_columns(weights, far.columns)

        evict(attention, cache, q, kwargs, far_weights)
        return found
    far_keys, q_far, offset = far.keys, q, None
    if attention.rotates:
        far_keys = rotate_far(attention.decode(far_keys, "key"))
    elif attention.key_decoder is not None:
        q_far, offset = attention.query_in_small_space(q), attention.query_on_mean(q)

    def sight() -> tuple[Tensor, Tensor]:
        query = torch.zeros(1, dtype=torch.int64, device=q.device) + near.query
        columns_near = torch.arange(near_keys.shape[-2], device=q.device) + near.first
        mask = attention.mask_for(q, columns, kwargs)
        return columns_near, split_masks(query, far_keys.shape[-2], columns_near, window, mask, q.dtype)

    # The model's mask is one tensor for all layers that see alike, and so may be what follows from it.
    anchor, name = kwargs.get("attention_mask"), ("sight", far_keys.shape[-2], near_keys.shape[-2], window)
    columns_near, seen = (
        once_a_pass(anchor, attention.layer_idx, name, sight) if isinstance(anchor, Tensor) else sight()
    )
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

    Side by side they are the columns in order, so the model's mask holds as it is, unless tokens were evicted: then far
    keys have the columns of `far`, all of them before the window.
    """
    border = max(near.query - attention.window + 1, near.first)
    far = Far(*(x[:, :, :border] for x in far[:2]), far.columns)
    near_keys, near_values = (x[:, :, border - near.first :] for x in near[:2])
    seen = attention.mask_for(q, columns, kwargs)
    if seen is not None and far.columns is not None:
        seen_near = seen[..., border:].expand(*far.columns.shape[:2], -1, -1)
        seen = torch.cat([take_columns(seen, far.columns), seen_near], dim=-1)
    options = {"seen": seen, "scale": attention.scaling, "softcap": attention.softcap}
    on_cpu = q.dtype == torch.float32 and q.device.type == "cpu" and attention.sharing.keys == 1
    if attention.rotates and on_cpu and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        found = _attend_in_pairs(attention, q, far, near_keys, near_values, columns, kwargs, options)
    else:
        q_far, offset, far_keys = q, None, far.keys
        if attention.rotates:
            rotate_far, rotate_near = _rotations(attention, q, far, near_keys, border, columns, columns, kwargs)
            far_keys, near_keys = rotate_far(attention.decode(far_keys, "key")), rotate_near(near_keys)
            q = q_far = rotate(q, *kwargs["position_embeddings"], attention.family.interleaved)
        elif attention.key_decoder is not None:
            q_far, offset = attention.query_in_small_space(q), attention.query_on_mean(q)
        found = attend_one(q, q_far, far_keys, far.values, near_keys, near_values, far_offset=offset, **options)
    far_sum, far_weight, near_sum, weights = found
    out = near_sum + attention.decode_output(far_sum, weight=far_weight)
    if attention.implementation_for(kwargs) != "eager":
        return out, None
    if far.columns is not None:
        weights = by_column(weights, far.columns, torch.arange(border, columns, device=q.device), columns)
    return out, weights


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

    all_turns = shared(("turns", columns, attention.layer_type), turns)
    if far.columns is not None:
        rest = torch.arange(columns - near_keys.shape[-2], columns + h // g, device=q.device).expand(b, g, -1)
        all_turns = at_columns(all_turns[:, 0], torch.cat([for_each_kv_head(attention, far.columns), rest], dim=-1))
    width = 2 * all_turns.shape[-1]

    def maps() -> list[Tensor | None]:
        return [paired(attention.by_head(name), width, interleaved) for name in ("key_decoder", "key_mean")]

    decoder, mean = kept(attention, "_maps_in_pairs", [attention.key_decoder, attention.key_mean, width], maps)
    shape = (b, g, far.keys.shape[-2] + near_keys.shape[-2] + h // g, d)
    return attend_one_in_pairs(
        q,
        far.keys,
        far.values,
        near_keys,
        near_values,
        decoder=decoder,
        mean=mean,
        turns=all_turns,
        room=shared(("room", *shape), lambda: q.new_empty(shape)),
        interleaved=interleaved,
        **options,
    )


def _rotations(
    attention: EigenAttention,
    q: Tensor,
    far: Far,
    near_keys: Tensor,
    near_first: int | Tensor,
    columns: int,
    length: int | Tensor,
    kwargs: dict[str, Any],
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Functions that rotate far and near keys to their own positions; both do nothing without rotary positions."""
    if not attention.rotates:
        return (lambda keys: keys), (lambda keys: keys)
    cos, sin = attention.key_angles(q, kwargs["position_ids"], columns, length)  # [B or 1, columns, width]
    near_columns = (torch.arange(near_keys.shape[-2], device=q.device) + near_first).clamp_min(0)
    if far.columns is None:
        angles_far = cos[:, : far.keys.shape[-2]], sin[:, : far.keys.shape[-2]]
    else:
        of_keys = for_each_kv_head(attention, far.columns)
        angles_far = at_columns(cos, of_keys), at_columns(sin, of_keys)
    angles_near = cos.index_select(1, near_columns), sin.index_select(1, near_columns)
    interleaved = attention.family.interleaved
    return (lambda keys: rotate(keys, *angles_far, interleaved)), (lambda keys: rotate(keys, *angles_near, interleaved))
