"""What the fused kernel decodes with, in the order in which it reads channels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...cache.packing import Widths
from .pieces import columns_of, cut


class Folded(NamedTuple):
    """How the fused kernel decodes: `x_hat = mean + y @ decoder`.

    Of packed codes `y = a + u (b + u (c + u d))`, times the scale of a token that has one, where u is a code counted
    from its middle.

    Args:
        decoder: [G, C, D], with C places for channels: those of columns, one behind the other, and room for more.
        mean: [G, D].
        codes: where each column's codes lie, int32 [6, C / 2] (byte, factor and mask of the upper and the lower part,
            `eigenattn.kernels.decoding.pieces.Column`); None for latents that are numbers.
        numbers: of each column's first and second channel the middle, the weight, a, b, c and d, [G, 2, 6, C / 2].
    """

    decoder: Tensor | None
    mean: Tensor | None
    codes: Tensor | None
    numbers: Tensor | None


def fold(decoder: Tensor | None, mean: Tensor | None, widths: Widths | None, levels: Tensor | None) -> Folded:
    """The decoder and the levels of a side, as `eigenattn.kernels.decoding.Side` has them.

    The mean distance of levels, s, goes into the decoder, `U' = s U`, so that y is about as large as u.
    """
    if widths is None or levels is None:
        return Folded(decoder, mean, None, None)
    columns = columns_of(widths)
    room = sum(cut(2 * len(columns))) // 2
    codes = torch.zeros(6, room, dtype=torch.int32)
    channels, middles, weights = (torch.zeros(room, 2, dtype=torch.int64) for _ in range(3))
    channels -= 1
    for i, column in enumerate(columns):
        codes[:, i] = torch.tensor([*column.upper, *column.lower])
        channels[i, : len(column.channels)] = torch.tensor(column.channels)
        middles[i], weights[i] = column.middle, column.weight
    at, middle, weight = (x.flatten().to(levels.device) for x in (channels, middles, weights))
    held = (at >= 0).float().unsqueeze(-1)  # [C, 1]
    at = at.clamp_min(0)
    placed = levels.float()[:, at]  # [G, C, 4]
    _, a, b, c = placed.unbind(-1)
    step = a - b + c * (middle * middle - middle + 1)  # of the levels at both ends, -middle and middle - 1
    step = torch.where(step > 0, step, 1.0).unsqueeze(-1)
    facts = torch.stack([middle, weight], dim=-1).float().expand(len(levels), -1, -1)
    numbers = torch.cat([facts, placed / step], dim=-1) * held
    numbers = numbers.view(len(levels), room, 2, 6).permute(0, 2, 3, 1).contiguous()
    dtype = levels.dtype if decoder is None else decoder.dtype
    rows = torch.eye(levels.shape[1], device=levels.device) if decoder is None else decoder.float()
    return Folded((step * rows[..., at, :] * held).to(dtype), mean, codes.to(levels.device), numbers)
