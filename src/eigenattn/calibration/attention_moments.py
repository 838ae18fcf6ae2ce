"""Moments weighted by attention: what the `attention` basis is made of, streamed in blocks of queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import ALONE, Sharing
from ..kernels.reference import cap_and_mask, causal_mask
from ..models.attention import EigenAttention
from ..models.maps import joined
from ..models.placement import execution_device, loaded
from ..models.projections import Heads, weight_of
from ..models.rotary import rotate

# Queries at a time, so that memory is O(T x block) (chosen).
QUERY_BLOCK = 256
# Keys of a sequence at which the metric of rotated queries is sampled; see `_sampled_metric`.
SAMPLED_KEYS = 16
# Random hidden states that the priors are made of (chosen: a covariance of a head is then known to some percent).
PRIOR_STATES = 4096


@dataclass
class AttentionMoments:
    """Sums over calibration text for one layer, in float64, over query-key pairs outside the window.

    `a` is an attention weight, `p` the sum of a query's weights outside the window, `o` the sum of `a * v` there. Where
    N KV heads share a latent, `k` or `v` are the vectors of all of them, N * D dimensions: a key's weights are summed
    over the heads, and each query head has an `o` of all values under its own attention. Where keys and values share a
    latent too, `k` is both of them side by side, twice as many dimensions, and there is no `o`.

    Args:
        key_metric: `sum a q q^T` [G, D, D], each query seen in its key's frame and scaled to scores.
        key_second, key_first, key_weight: `sum a k k^T` [G/N, N * D, N * D], `sum a k` [G/N, N * D], `sum a` [G/N].
        value_metric: `sum W_O^T W_O` over the heads of a group [G, D, D].
        output_second, output_first, output_weight: `sum o o^T`, `sum p o` and `sum p^2`, in the same shapes, or of no
            dimensions.
        window: tokens kept exactly, W.
        key_prior, value_prior: covariances of keys and values [G/N, N * D, N * D] where hidden states are white noise,
            that is, what the projections alone make of any text; None without shrinkage. A joint one, of keys and
            values side by side, stands in the place of the keys'.
        shrinkage: share of the covariances that is to be taken from them, in [0, 1).
        joint: whether keys and values share a latent.
    """

    key_metric: Tensor
    key_second: Tensor
    key_first: Tensor
    key_weight: Tensor
    value_metric: Tensor
    output_second: Tensor
    output_first: Tensor
    output_weight: Tensor
    window: int
    key_prior: Tensor | None = None
    value_prior: Tensor | None = None
    shrinkage: float = 0.0
    joint: bool = False
    tokens: int = 0

    @classmethod
    def of(
        cls,
        attention: EigenAttention,
        window: int,
        sharing: Sharing = ALONE,
        shrinkage: float = 0.0,
        joint: bool = False,
    ) -> AttentionMoments:
        """Empty moments for a layer."""
        g, d = attention.kv_heads, attention.head_dim
        size_k, size_v = (heads * d for heads in sharing)
        priors = _priors(attention, sharing, joint) if shrinkage else (None, None)
        with loaded(attention.output_projection):
            by_group = weight_of(attention.output_projection).detach().unflatten(1, (g, -1, d))  # [C, G, H/G, D]
            # A group at a time: a large model's whole weight takes much memory in float64.
            value_metric = torch.stack([_outer_products(group) for group in by_group.unbind(1)])

        def zeros(*shape: int) -> Tensor:
            return value_metric.new_zeros(shape)

        keys, outputs = (
            (zeros(g // heads, n, n), zeros(g // heads, n), zeros(g // heads))
            for heads, n in zip(sharing, (2 * size_k, 0) if joint else (size_k, size_v), strict=True)
        )
        return cls(zeros(g, d, d), *keys, value_metric, *outputs, window, *priors, shrinkage, joint)

    def observe(self, attention: EigenAttention, heads: Heads, kwargs: dict[str, Any], valid: Tensor | None) -> None:
        """Add one batch: queries, keys and values before rotation, and what the attention was called with."""
        q, k, v = heads
        latents_k, latents_v = len(self.key_weight), len(self.output_weight)
        shared_k, shared_v = joined(k, latents_k), joined(v, latents_v)
        t = q.shape[-2]
        mask = whole_mask(attention, q, kwargs)
        q_turned, k_turned = turned(attention, kwargs, q, k)
        log_sums = []
        column_weight = torch.zeros(k.shape[:-1], dtype=torch.float64, device=k.device)  # [B, G, T]
        for start in range(0, t, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, t)
            scores = masked_scores(
                attention, q_turned[:, :, start:stop], k_turned[:, :, :stop], mask[..., start:stop, :stop]
            )
            log_sums.append(scores.logsumexp(-1, keepdim=True))
            weights = (scores - log_sums[-1]).exp().tril(start - self.window)  # n <= m - W
            if valid is not None:
                weights = weights * valid[:, None, start:stop, None]
            by_latent = weights.unflatten(1, (latents_v, -1))  # [B, G/N, H/G * N, block, stop]
            weights = weights.unflatten(1, (self.groups, -1))  # [B, G, H/G, block, stop]
            column_weight[..., :stop] += weights.sum((2, 3))
            if not self.joint:
                outputs = by_latent.to(v.dtype) @ shared_v[:, :, None, :stop]
                self._add_outputs(outputs, by_latent.sum(-1, keepdim=True))
            if not attention.rotates:
                share = weights.sum(-1, keepdim=True)
                self.key_metric += self._gram(q[:, :, start:stop], share) * attention.scaling**2
        kept = torch.cat([shared_k, shared_v], dim=-1) if self.joint else shared_k
        self._add_keys(kept, column_weight.unflatten(1, (latents_k, -1)).sum(2))
        if attention.rotates:
            log_sum = torch.cat(log_sums, dim=-2)
            self._add_sampled_metric(attention, q_turned, k_turned, mask, column_weight, log_sum, kwargs, valid)

    @property
    def groups(self) -> int:
        return len(self.key_metric)

    def _gram(self, x: Tensor, weight: Tensor) -> Tensor:
        """`sum weight x x^T` of vectors [B, H, n, D], per group of heads: [G, D, D] in float64.

        Args:
            weight: [B, G, H/G, n, 1].
        """
        rows = x.unflatten(1, (self.groups, -1)).transpose(0, 1).flatten(1, 3).double()  # [G, B * H/G * n, D]
        return (rows * weight.transpose(0, 1).flatten(1, 3)).transpose(1, 2) @ rows

    def _add_outputs(self, outputs: Tensor, share: Tensor) -> None:
        rows, share = (y.transpose(0, 1).flatten(1, 3).double() for y in (outputs, share))
        self.output_second += rows.transpose(1, 2) @ rows
        self.output_first += (rows * share).sum(1)
        self.output_weight += share.square().sum((1, 2))

    def _add_keys(self, k: Tensor, weight: Tensor) -> None:
        rows, share = k.transpose(0, 1).flatten(1, 2).double(), weight.transpose(0, 1).flatten(1).unsqueeze(-1)
        self.key_second += (rows * share).transpose(1, 2) @ rows
        self.key_first += (rows * share).sum(1)
        self.key_weight += share.sum((1, 2))

    def _add_sampled_metric(
        self,
        attention: EigenAttention,
        q: Tensor,
        k: Tensor,
        mask: Tensor,
        column_weight: Tensor,
        log_sum: Tensor,
        kwargs: dict[str, Any],
        valid: Tensor | None,
    ) -> None:
        """`sum a q_mn q_mn^T` with `q_mn = R_n^T R_m q_m`, estimated at some keys of each batch.

        Turning back is the same for all queries of one key, so it is done to their D x D sum. Keys are drawn in
        proportion to the attention they get, by systematic sampling: a sink is drawn many times, but summed only once.
        """
        mass = column_weight.sum((0, 1))  # [T]
        if not mass.sum() > 0:
            return
        marks = (torch.arange(SAMPLED_KEYS, device=mass.device, dtype=mass.dtype) + 0.5) / SAMPLED_KEYS
        edges = mass.cumsum(0) / mass.sum()
        drawn, times = torch.searchsorted(edges, marks).clamp_max(len(mass) - 1).unique(return_counts=True)
        scores = masked_scores(attention, q, k[:, :, drawn], mask[..., drawn])  # [B, H, T, drawn]
        weights = (scores - log_sum).exp()
        queries = torch.arange(q.shape[-2], device=q.device)
        weights = weights * (drawn <= queries.unsqueeze(-1) - self.window)
        if valid is not None:
            weights = weights * valid[:, None, :, None]
        weights = weights.unflatten(1, (self.groups, -1))
        shares = times * mass.sum() / (SAMPLED_KEYS * mass[drawn]) * attention.scaling**2
        cos, sin = attention.angles(q.double(), kwargs["position_ids"][:1, drawn])
        # One sum over a batch's queries is taken in fp32, at twice the speed; sums over batches are in float64.
        rows = q.float().unflatten(1, (self.groups, -1)).transpose(0, 1).flatten(1, 3)  # [G, B * H/G * T, D]
        weights = weights.transpose(0, 1).flatten(1, 3).sqrt()  # [G, B * H/G * T, drawn]
        for i, share in enumerate(shares.tolist()):
            weighted = rows * weights[..., i : i + 1]
            metric = (weighted.transpose(1, 2) @ weighted).double()
            for _ in range(2):  # R^T on the right side, then, transposed, on the left
                turned = rotate(metric[None], cos[:, i : i + 1], -sin[:, i : i + 1], attention.family.interleaved)
                metric = turned[0].transpose(-1, -2)
            self.key_metric += share * metric


@torch.no_grad()
def _priors(attention: EigenAttention, sharing: Sharing, joint: bool) -> tuple[Tensor, Tensor | None]:
    """Covariances of keys and of values of white hidden states, [G/N, N * D, N * D] in float64; always the same.

    With joint latents there is one of keys and values side by side, in the place of the keys'.
    """
    output = attention.output_projection
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, PRIOR_STATES, attention.config.hidden_size, generator=generator)
    with loaded(attention):
        _, *sides = attention.project(states.to(execution_device(output), output.weight.dtype))
    rows = [joined(x, x.shape[1] // heads)[0].double() for x, heads in zip(sides, sharing, strict=True)]
    rows = [torch.cat(rows, dim=-1)] if joint else rows  # [G/N, n, N * D] each
    centred = [x - x.mean(1, keepdim=True) for x in rows]
    priors = [x.transpose(1, 2) @ x / PRIOR_STATES for x in centred]
    return (priors[0], None) if joint else tuple(priors)


def _outer_products(x: Tensor) -> Tensor:
    """Sum of outer products of vectors [..., D] in float64: [D, D]."""
    rows = x.double().flatten(0, -2)
    return rows.T @ rows


def whole_mask(attention: EigenAttention, q: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The mask of a forward pass without a cache, [B or 1, H or 1, T, T], also where the model leaves it out."""
    t = q.shape[-2]
    mask = attention.mask_for(q, t, kwargs)
    return causal_mask(t, t, q.device)[None, None] if mask is None else mask


def turned(attention: EigenAttention, kwargs: dict[str, Any], *vectors: Tensor) -> tuple[Tensor, ...]:
    """Queries and keys [B, heads, T, D] at their positions in a forward pass without a cache."""
    if not attention.rotates:
        return vectors
    return tuple(rotate(x, *kwargs["position_embeddings"], attention.family.interleaved) for x in vectors)


def masked_scores(attention: EigenAttention, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """Masked scores [B, H, n, s] in fp32, of queries [B, H, n, D] and keys [B, G, s, D]."""
    if q.dtype == torch.float16:
        q, k = q.float(), k.float()  # before it is scaled, a score may pass 65,504, where fp16 ends
    grouped = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # [B, G, H/G * n, D]
    scores = (grouped @ k.transpose(-1, -2)).view(*q.shape[:-1], k.shape[-2]).float() * attention.scaling
    return cap_and_mask(scores, mask, attention.softcap)
