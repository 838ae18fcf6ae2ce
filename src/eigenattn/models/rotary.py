"""Rotary positions: rotating vectors, and finding the positions of cached keys."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the leading dimensions of each head to its position.

    Args:
        x: [B, heads, T, D].
        cos, sin: [B or 1, T, width], as transformers' rotary modules give them, or [B, heads, T, width], of each head;
            dimensions past `width` stay.
        interleaved: pairs are neighbours, not halves. Angles come in the same order, and arithmetic is in fp32.
    """
    width = cos.shape[-1]
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, rest = (x, None) if width == x.shape[-1] else (x[..., :width], x[..., width:])
    if interleaved:
        turned = turned.float()  # as Cohere does; families with halves rotate in the model's dtype
        partner = torch.stack([-turned[..., 1::2], turned[..., 0::2]], dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        partner = torch.cat([-second, first], dim=-1)
    turned = (turned * cos + partner * sin).to(x.dtype)
    return turned if rest is None else torch.cat([turned, rest], dim=-1)


def key_positions(position_ids: Tensor, cached: int, length: int | Tensor) -> Tensor:
    """Positions of the keys that a cache returned, from those of the current queries.

    Args:
        position_ids: positions of the current queries [B or 1, T].
        cached: keys the cache returned, S.
        length: tokens the cache has seen, the current ones included; a static cache has more room than that.

    Returns:
        [B or 1, S]. Keys stand one position apart up to the last query, and left padding stays at 0. Keys of unused
        room get positions too, but are masked.
    """
    if cached == position_ids.shape[-1]:
        return position_ids
    last = torch.clamp(torch.as_tensor(length, device=position_ids.device), max=cached) - 1
    behind = last - torch.arange(cached, device=position_ids.device)  # [S]
    return (position_ids[:, -1:] - behind).clamp_min(0)


def at_columns(table: Tensor, columns: Tensor) -> Tensor:
    """Angles, or turns, of all columns [B or 1, S, width] at those of each head [B, heads, F]: [B, heads, F, width]."""
    rows = torch.arange(table.shape[0], device=columns.device).view(-1, 1, 1)
    return table[rows.expand(columns.shape[0], -1, -1), columns]


def turns_of(cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Cosines and sines [B or 1, T, width] as complex numbers, one a pair: [B or 1, 1, T, width / 2]."""
    each = slice(0, None, 2) if interleaved else slice(0, cos.shape[-1] // 2)
    return torch.complex(cos[..., each], sin[..., each]).unsqueeze(1)


def once_a_pass(position_ids: Tensor, layer_idx: int, name: Hashable, compute: Callable[[], Any]) -> Any:
    """What `compute` gives, computed by the first layer that asks for it in a forward pass.

    All layers are passed one tensor of positions, or a mask, and the result is kept on it: threads do not meet, and it
    goes when the pass is over. A layer that comes no later than the one that began the notes sees that the pass is a
    new one, on positions that may have been written over. Compiled graphs share by themselves.
    """
    if torch.compiler.is_compiling():
        return compute()
    began, notes = getattr(position_ids, "_eigenattn_notes", (layer_idx, None))
    if notes is None or layer_idx <= began:
        began, notes = layer_idx, {}
        position_ids._eigenattn_notes = began, notes
    if name not in notes:
        notes[name] = compute()
    return notes[name]
