"""Rotary positions: rotating vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.rotation import rotate_natively, rotates_natively


def _first_half(x: Tensor) -> Tensor:
    return x[..., : x.shape[-1] // 2]


def _by_pair(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=-1)


# How a rotary module lays out what it gives, [B, T, width] twice: cosines and sines of which each dimension has its
# own. `once`: of halves, the first half only. `of_pairs`: laid out for halves, and meant for pairs. `complex`: one
# complex number a pair; `complex_halves`: the same, and meant for halves.
ANGLES: dict[str, Callable[[Any], tuple[Tensor, Tensor]]] = {
    "twice": lambda angles: (angles[0], angles[1]),
    "once": lambda angles: (torch.cat([angles[0]] * 2, dim=-1), torch.cat([angles[1]] * 2, dim=-1)),
    "of_pairs": lambda angles: (_by_pair(_first_half(angles[0])), _by_pair(_first_half(angles[1]))),
    "complex": lambda angles: (_by_pair(angles.real), _by_pair(angles.imag)),
    "complex_halves": lambda angles: (torch.cat([angles.real] * 2, dim=-1), torch.cat([angles.imag] * 2, dim=-1)),
}


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the leading dimensions of each head to its position.

    Args:
        x: [B, heads, T, D].
        cos, sin: [B or 1, T, width], as transformers' rotary modules give them, or [B, heads, T, width], of each head;
            dimensions past `width` stay.
        interleaved: pairs are neighbours, not halves. Angles come in the same order, and arithmetic is in fp32.
    """
    width = cos.shape[-1]
    if not interleaved and rotates_natively(x, cos, sin):
        return rotate_natively(x, cos, sin)
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotated, rest = (x, None) if width == x.shape[-1] else (x[..., :width], x[..., width:])
    if interleaved:
        rotated = rotated.float()  # as Cohere does; families with halves rotate in the model's dtype
        partner = torch.stack([-rotated[..., 1::2], rotated[..., 0::2]], dim=-1).flatten(-2)
    else:
        first, second = rotated.chunk(2, dim=-1)
        partner = torch.cat([-second, first], dim=-1)
    rotated = (rotated * cos + partner * sin).to(x.dtype)
    return rotated if rest is None else torch.cat([rotated, rest], dim=-1)


def at_columns(table: Tensor, columns: Tensor) -> Tensor:
    """Angles of all columns [B or 1, S, width] at those of each head [B, heads, F]: [B, heads, F, width]."""
    rows = torch.arange(table.shape[0], device=columns.device).view(-1, 1, 1)
    return table[rows.expand(columns.shape[0], -1, -1), columns]
