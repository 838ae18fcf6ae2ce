"""How latents are distributed, as attention weighs them: what quantisers are fitted to, streamed over text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models.attention import EigenAttention
from ..models.maps import joined
from ..models.projections import Heads
from .attention_moments import QUERY_BLOCK, masked_scores, turned, whole_mask

# Bins between -REACH and REACH in `asinh(z / scale)` (chosen): fine near zero, in proportion to z far out, and an
# outlier of a thousand scales still has its place.
BINS = 128
REACH = 8.0


class Map(NamedTuple):
    """What gives latents: `z = (x - mean) @ encoder`, with encoder [G, D, R] and mean [G, D] or None.

    Joint latents, which stand in the place of the keys', are of keys and values side by side.
    """

    encoder: Tensor
    mean: Tensor | None
    joint: bool = False


@dataclass
class Histograms:
    """Weighted histograms of the latents of keys, or of values, of one layer.

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

    @property
    def weight(self) -> Tensor:
        """Total weight [G, R]; all channels of a head have the same."""
        return self.sums[0].sum(-1)

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

    Args:
        keys, values: what gives the latents. Of joint ones, whose weights are those of keys, the squares of attention's
            sums over them are added up as well, `outputs` [G/N, R], and the squared weights, `squares` [G/N].
        window: tokens kept exactly, W.
    """

    def __init__(self, keys: Map, values: Map, window: int) -> None:
        self.maps, self.window, self.tokens = (keys, values), window, 0
        self.keys, self.values = (
            Histograms.empty(each.encoder, len(each.encoder), each.encoder.shape[-1]) for each in self.maps
        )
        self.outputs = torch.zeros_like(self.keys.sums[0, ..., 0])
        self.squares = torch.zeros_like(self.outputs[:, 0])

    def observe(self, attention: EigenAttention, heads: Heads, kwargs: dict[str, Any], valid: Tensor | None) -> None:
        """Add one batch: queries, keys and values before rotation, and what the attention was called with."""
        q, k, v = heads
        t, groups = q.shape[-2], k.shape[1]
        latents_k, latents_v = self._latents(k, v)  # [B, G/N, T, R] each
        mask = whole_mask(attention, q, kwargs)
        q_turned, k_turned = turned(attention, kwargs, q, k)
        first, second = (torch.zeros(k.shape[:-1], dtype=torch.float64, device=k.device) for _ in range(2))  # [B, G, T]
        for start in range(0, t, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, t)
            scores = masked_scores(
                attention, q_turned[:, :, start:stop], k_turned[:, :, :stop], mask[..., start:stop, :stop]
            )
            weights = scores.softmax(-1).tril(start - self.window)  # n <= m - W
            if valid is not None:
                weights = weights * valid[:, None, start:stop, None]
            weights = weights.unflatten(1, (groups, -1))  # [B, G, H/G, block, stop]
            first[..., :stop] += weights.sum((2, 3))
            second[..., :stop] += weights.square().sum((2, 3))
            if self.maps[0].joint:
                by_latent = weights.flatten(1, 2).unflatten(1, (latents_k.shape[1], -1))  # [B, G/N, heads, block, stop]
                self.outputs += (by_latent @ latents_k[:, :, None, :stop]).double().square().sum((0, 2, 3))
        for side, z, weight in ((self.keys, latents_k, first), (self.values, latents_v, second)):
            if z.shape[-1]:
                side.add(z, weight.unflatten(1, (z.shape[1], -1)).sum(2))
        if self.maps[0].joint:
            self.squares += second.unflatten(1, (latents_k.shape[1], -1)).sum((0, 2, 3))

    def _latents(self, k: Tensor, v: Tensor) -> list[Tensor]:
        """Latents [B, G/N, T, R] of keys, or joint ones, and of values, in fp32."""
        found = []
        for x, (encoder, mean, joint) in zip((k, v), self.maps, strict=True):
            x = joined(x.float(), len(encoder))  # [B, G/N, T, N * D]
            if joint:
                x = torch.cat([x, joined(v.float(), len(encoder))], dim=-1)
            x = x[..., : encoder.shape[-2]]  # none of the values, where they share the keys'
            x = x if mean is None else x - mean.float().unsqueeze(1)
            found.append(x @ encoder.float())
        return found
