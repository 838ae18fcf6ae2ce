"""Reading long texts: latents are decoded a chunk at a time (`eigenattn.kernels.chunked`).

What a pass needs beside the cache and its own activations is one chunk of decoded keys, wherever gradients, attention
weights and compiled graphs are not asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..cache.layers import Far, Near
from ..kernels import chunked
from ..kernels.reference import add_mask
from .decoding import gives_no_weights
from .rotary import key_positions, rotate

if TYPE_CHECKING:
    from .attention import EigenAttention


def is_long(attention: EigenAttention, q: Tensor, columns: int, cache: Any, kwargs: dict[str, Any]) -> bool:
    """Whether queries [B, H, T, *] are to meet so many tokens in chunks."""
    if q.shape[-2] == 1 or columns <= chunked.CHUNK or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    # What evicts looks at attention weights.
    return getattr(cache, "eviction", None) is None and gives_no_weights(attention, kwargs)


def read_latents(
    attention: EigenAttention, q: Tensor, held: Far, stored: bool, rotates: bool, length: int, kwargs: dict[str, Any]
) -> Tensor:
    """The output [B, H, T, D or R_v] of queries over all tokens up to their own, without a window.

    Args:
        q: rotated to their positions; taken to the small space where keys do not rotate.
        held: keys and values of all tokens; stored: whether they are as a cache holds them.
        rotates: whether keys are decoded and rotated.
        length: tokens the cache has seen.
    """
    columns, t = held.keys.shape[-2], q.shape[-2]
    first = min(int(length), columns) - t
    decode = _decoder(attention, q, held, stored, rotates, rotates, columns, length, kwargs)
    parts = chunked.attend_far(
        q,
        decode,
        keys=first + t,
        size=_summed(attention, held),
        seen_by_all=first + 1,
        first=first,
        mask=_mask(attention, q, columns, first, kwargs),
        scale=attention.scaling,
        softcap=attention.softcap,
    )
    return attention.decode_output(parts.out.to(q.dtype))


def read_with_window(
    attention: EigenAttention, q: Tensor, far: Far, near: Near, stored: bool, columns: int, kwargs: dict[str, Any]
) -> Tensor:
    """The output [B, H, T, D] of queries before rotation, over latents and the exact window."""
    t, window, rotates = q.shape[-2], attention.window, attention.rotates
    near_first, query_first = int(near.first), int(near.query)
    length = query_first + t
    near_keys, q_far, offset = near.keys, q, None
    if rotates:
        q = q_far = rotate(q, *kwargs["position_embeddings"], attention.family.interleaved)
        places = torch.arange(near_first, near_first + near_keys.shape[-2], device=q.device).clamp_min(0)
        positions = _positions(columns, length, kwargs).index_select(1, places)
        near_keys = rotate(near_keys, *attention.angles(q, positions), attention.family.interleaved)
    decodes = rotates or attention.softcap is not None
    if not decodes and attention.key_decoder is not None:
        q_far, offset = attention.query_in_small_space(q), attention.query_on_mean(q)
    mask = _mask(attention, q, columns, query_first, kwargs)
    options = {"mask": mask, "scale": attention.scaling, "softcap": attention.softcap}
    seen_by_all = max(query_first - window + 1, near_first, 0)
    parts = chunked.attend_far(
        q_far,
        _decoder(attention, q, far, stored, decodes, rotates, columns, length, kwargs),
        keys=min(max(length - window, near_first, 0), far.keys.shape[-2]),
        size=_summed(attention, far),
        seen_by_all=seen_by_all,
        first=query_first - window,
        **options,
    )
    if offset is not None:
        parts.mass += offset * attention.scaling
    exact = chunked.attend_near(
        q, near_keys, near.values, window=window, key_first=near_first, query_first=query_first, **options
    )
    together = torch.logaddexp(parts.mass, exact.mass)
    weight = (parts.mass - together).exp_()
    sums = attention.decode_output((parts.out * weight).to(q.dtype), weight=weight.to(q.dtype))
    return sums + (exact.out * (exact.mass - together).exp_()).to(q.dtype)


def _summed(attention: EigenAttention, held: Far) -> int:
    """Size of what attention sums: of values, or of the latents they are decoded from."""
    return attention.rank_of("value") if attention.widths_k is not None or attention.joint else held.values.shape[-1]


def _positions(columns: int, length: int, kwargs: dict[str, Any]) -> Tensor:
    """[B or 1, columns]."""
    return key_positions(kwargs["position_ids"], columns, length)


def _decoder(
    attention: EigenAttention,
    q: Tensor,
    held: Far,
    stored: bool,
    decodes: bool,
    rotates: bool,
    columns: int,
    length: int,
    kwargs: dict[str, Any],
) -> chunked.Decode:
    positions = _positions(columns, length, kwargs) if rotates else None
    last = None if positions is None else positions.amax().expand(positions.shape[0], 1)

    def decode(start: int, stop: int) -> tuple[Tensor, Tensor]:
        keys, values = (x[:, :, start:stop] for x in held[:2])
        if stored:
            keys, values = attention.restored(keys, values, q.dtype)
        if decodes:
            keys = attention.decode(keys, "key")
        if rotates:
            # Some kinds of scaling go by the last position of what they are asked for.
            cos, sin = attention.angles(q, torch.cat([positions[:, start:stop], last], dim=-1))
            keys = rotate(keys, cos[:, :-1], sin[:, :-1], attention.family.interleaved)
        return attention.for_each_head(keys), attention.for_each_head(values)

    return decode


def _mask(
    attention: EigenAttention, q: Tensor, columns: int, query_first: int, kwargs: dict[str, Any]
) -> chunked.Mask | None:
    """Tiles of the model's mask; None if it says no more than that texts are read forwards."""
    mask, bias = attention.mask_and_bias(columns, kwargs)
    if mask is not None and mask.dtype == torch.bool and mask.shape[1] == 1 and chunked.only_causal(mask, query_first):
        mask = None
    if mask is None and bias is None:
        return None

    def tile(start: int, stop: int, low: int, high: int) -> Tensor:
        seen = None if mask is None else mask[..., start:stop, low:high]
        if bias is None:
            return seen
        part = bias[..., low:high].to(q.dtype)
        if seen is None:
            return part.expand(-1, -1, stop - start, -1)
        return add_mask(part, seen)

    return tile
