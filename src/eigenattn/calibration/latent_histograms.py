"""How latents are distributed, as attention weighs them: what quantisers are fitted to, streamed over text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..cache.codebook import scale_codes, scales
from ..models.attention import EigenAttention
from ..models.forward_pass import ForwardPass
from ..models.maps import joined
from ..models.projections import Heads
from .attention_moments import far_weights

# Bins between -REACH and REACH in `asinh(z / scale)` (chosen): fine near zero, in proportion to z far out, and an
# outlier of a thousand scales still has its place.
BINS = 128
REACH = 8.0


class Map(NamedTuple):
    """What gives a latent: `z = (x - mean) @ encoder`, with encoder [G, D, R] and mean [G, D] or None.

    `x` is of the keys, the values, or both side by side, as `sides` says.
    """

    encoder: Tensor
    mean: Tensor | None
    sides: tuple[str, ...]


@dataclass
class Histograms:
    """Weighted histograms of one latent of one layer.

    Each bin knows the mean and the spread of what fell into it: an attention sink is a point that holds half of all the
    weight, and its place within a bin matters.

    Args:
        sums: `sum w`, `sum w z` and `sum w z^2` of each bin, [3, G, R, BINS] in float64.
        scale: [G, R], the unit of the bins; set by the first batch that has any weight.
    """

    sums: Tensor
    scale: Tensor | None = None

    @classmethod
    def empty(cls, like: Tensor, kv_heads: int, rank: int) -> Histograms:
        """Without anything in them, on the device of `like`."""
        return cls(torch.zeros(3, kv_heads, rank, BINS, dtype=torch.float64, device=like.device))

    def add(self, z: Tensor, weight: Tensor) -> None:
        """Add latents [B, G, T, R] with weights [B, G, T]."""
        z = z.permute(1, 3, 0, 2).flatten(2).double()  # [G, R, B * T]
        weight = weight.transpose(0, 1).flatten(1).unsqueeze(1)  # [G, 1, B * T]
        if self.scale is None:
            seen = weight.expand(z.shape) > 0
            if not seen.any():
                return
            # Not the spread, which one sink may decide: what lies near zero would then fall into one bin.
            middle = z.abs().where(seen, torch.nan).nanmedian(-1).values
            self.scale = torch.where(middle > 0, middle, 1.0)
        bins = (((z / self.scale.unsqueeze(-1)).asinh() + REACH) * (BINS / (2 * REACH))).long().clamp_(0, BINS - 1)
        weight = weight.expand(z.shape)
        for sums in self.sums:
            sums.scatter_add_(-1, bins, weight)
            weight = weight * z


class LatentHistograms:
    """Histograms of one layer's latents, over tokens weighted by the attention they get from outside the window.

    Keys count with `sum_m a_mn`, for a key's error meets every query in proportion to its attention. Values count with
    `sum_m a_mn^2`, for the errors of independent tokens average in a query's output. Both are sums over the queries of
    a group, or of all the groups that share a latent.

    Histograms are of latents over their own scales (`eigenattn.cache.codebook`), and count errors in units of latents.

    A latent of both sides counts as keys do. The squares of attention's sums over it are added up as well, `outputs`
    [G/N, R], and the squared weights, `squares` [G/N].

    Args:
        maps: what gives each of the layer's latents.
        window: tokens kept exactly, W.
    """

    def __init__(self, maps: Sequence[Map], window: int) -> None:
        self.maps, self.window, self.tokens = tuple(maps), window, 0
        self.histograms = [Histograms.empty(each.encoder, len(each.encoder), each.encoder.shape[-1]) for each in maps]
        self.of_both = len(maps[0].sides) > 1  # there is no other map then
        self.weights = [each.sums.new_zeros(len(each.sums[0])) for each in self.histograms]  # of all tokens, [G/N]
        self.outputs = torch.zeros_like(self.histograms[0].sums[0, ..., 0])
        self.squares = torch.zeros_like(self.outputs[:, 0])

    def observe(self, attention: EigenAttention, heads: Heads[Tensor], this: ForwardPass, valid: Tensor | None) -> None:
        """Add one batch: queries, keys and values before rotation, and the pass that they are of."""
        q, k, v = heads
        groups = k.shape[1]
        latents = [_latents(each, k, v) for each in self.maps]  # [B, G/N, T, R] each
        both = latents[0] if self.of_both else None
        mask = this.whole_mask(q)
        rotated = this.rotated(q), this.rotated(k)
        first, second = (torch.zeros(k.shape[:-1], dtype=torch.float64, device=k.device) for _ in range(2))  # [B, G, T]
        for _, stop, _, weights in far_weights(attention, rotated, mask, self.window, valid):
            weights = weights.unflatten(1, (groups, -1))  # [B, G, H/G, block, stop]
            first[..., :stop] += weights.sum((2, 3))
            second[..., :stop] += weights.square().sum((2, 3))
            if both is not None:
                by_latent = weights.flatten(1, 2).unflatten(1, (both.shape[1], -1))  # [B, G/N, heads, block, stop]
                self.outputs += (by_latent.to(both.dtype) @ both[:, :, None, :stop]).double().square().sum((0, 2, 3))
        for each, histograms, z, total in zip(self.maps, self.histograms, latents, self.weights, strict=True):
            weight = first if "key" in each.sides else second
            weight = weight.unflatten(1, (z.shape[1], -1)).sum(2)  # [B, G/N, T]
            scale = scales(scale_codes(z))
            histograms.add(z / scale, weight * scale.squeeze(-1).double().square())
            total += weight.sum((0, 2))
        if both is not None:
            self.squares += second.unflatten(1, (both.shape[1], -1)).sum((0, 2, 3))


def _latents(what: Map, k: Tensor, v: Tensor) -> Tensor:
    """Latents [B, G/N, T, R] of keys and values [B, G, T, D], in fp32."""
    sides = [x for x, side in ((k, "key"), (v, "value")) if side in what.sides]
    x = torch.cat([joined(x.float(), len(what.encoder)) for x in sides], dim=-1)  # [B, G/N, T, N * D]
    x = x if what.mean is None else x - what.mean.float().unsqueeze(1)
    return x @ what.encoder.float()
