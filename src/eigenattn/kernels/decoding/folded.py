"""What the fused kernel decodes with, in the order in which it reads channels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...cache.packing import Widths
from .pieces import Couple, Part, couples_of, pieces_of


class Folded(NamedTuple):
    """How the fused kernel decodes: `x_hat = mean + y @ decoder`.

    Of packed codes `y = a + u (b + u (c + u d))`, times the scale of a token that has one, where u is a code counted
    from its middle.

    Args:
        decoder: [G, C, D], with C places for channels: those of couples, one behind the other, and room for more.
        mean: [G, D].
        codes: where each couple's codes lie, int32 [6, C / 2] (byte, factor and mask of the upper and the lower part,
            `eigenattn.kernels.decoding.pieces.Couple`); None for latents that are numbers.
        numbers: of each couple's first and second channel the middle, the weight, a, b, c and d, [G, 2, 6, C / 2].
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
    couples = couples_of(widths)
    places = sum(piece.size for piece in pieces_of(couples))
    couples += (Couple((), Part(), Part(), 0, 0),) * (places // 2 - len(couples))
    device = levels.device
    codes = torch.tensor([[*each.upper, *each.lower] for each in couples], dtype=torch.int32, device=device)
    at = torch.tensor([[*each.channels, -1, -1][:2] for each in couples], device=device).flatten()
    facts = torch.tensor([[each.middle, each.weight] for each in couples], dtype=torch.float32, device=device)
    facts = facts.repeat_interleave(2, dim=0)  # [C, 2]
    held = (at >= 0).float().unsqueeze(-1)  # [C, 1]
    at = at.clamp_min(0)
    placed = levels.float()[:, at]  # [G, C, 4]
    _, a, b, c = placed.unbind(-1)
    middle = facts[:, 0]
    step = a - b + c * (middle * middle - middle + 1)  # of the levels at both ends, -middle and middle - 1
    step = torch.where(step > 0, step, 1.0).unsqueeze(-1)
    numbers = torch.cat([facts.expand(len(levels), -1, -1), placed / step], dim=-1) * held
    numbers = numbers.unflatten(1, (-1, 2)).permute(0, 2, 3, 1).contiguous()
    dtype = levels.dtype if decoder is None else decoder.dtype
    rows = torch.eye(levels.shape[1], device=device) if decoder is None else decoder.float()
    return Folded((step * rows[..., at, :] * held).to(dtype), mean, codes.T.contiguous(), numbers)
