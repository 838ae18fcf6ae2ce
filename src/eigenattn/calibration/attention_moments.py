"""Moments weighted by attention: what the `attention` basis is made of, streamed in blocks of queries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import Sharing
from ..errors import EigenAttnError
from ..kernels.reference import cap_and_mask, log_sum_exp, softmax
from ..models.attention import EigenAttention
from ..models.forward_pass import ForwardPass
from ..models.maps import joined
from ..models.placement import execution_device, loaded
from ..models.projections import Heads
from ..models.rotary import rotate

# Queries at a time, so that memory is O(T x block) (chosen).
QUERY_BLOCK = 256
# Keys of a sequence at which the metric of rotated queries is sampled; see `_add_sampled_metric`.
SAMPLED_KEYS = 16
# Random hidden states that the priors are made of (chosen: a covariance of a head is then known to some percent).
PRIOR_STATES = 4096


@dataclass
class Sums:
    """Weighted sums of vectors x of n dimensions, for G/N latents, in float64.

    Args:
        second, first, weight: `sum w x x^T` [G/N, n, n], `sum w x` [G/N, n] and `sum w` [G/N].
    """

    second: Tensor
    first: Tensor
    weight: Tensor

    @classmethod
    def zeros(cls, like: Tensor, latents: int, n: int) -> Sums:
        """Of nothing yet, on the device of `like`."""
        shapes = ((latents, n, n), (latents, n), (latents,))
        return cls(*(like.new_zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(self, x: Tensor, weight: Tensor) -> None:
        """Add vectors [B, G/N, T, n] with weights [B, G/N, T]."""
        rows, share = x.transpose(0, 1).flatten(1, 2).double(), weight.transpose(0, 1).flatten(1).unsqueeze(-1)
        self.second += (rows * share).transpose(1, 2) @ rows
        self.first += (rows * share).sum(1)
        self.weight += share.sum((1, 2))

    def add_means(self, sums: Tensor, weight: Tensor) -> None:
        """Add the means `sums / weight` with `weight^2`: `sums` [B, G/N, heads, T, n] and `weight` [..., 1]."""
        rows, share = (y.transpose(0, 1).flatten(1, 3).double() for y in (sums, weight))
        self.second += rows.transpose(1, 2) @ rows
        self.first += (rows * share).sum(1)
        self.weight += share.square().sum((1, 2))


@dataclass
class Gates:
    """What the output of the heads is multiplied with, before the output projection.

    Args:
        products: `W_O^T W_O` of each head [H, D, D].
        second: sums of `g g^T` over tokens, of each head [H, D, D].
        count: tokens, [1].
    """

    products: Tensor
    second: Tensor
    count: Tensor

    def add(self, gate: Tensor, valid: Tensor | None) -> None:
        """Add gates [B, H, T, D or 1]; `valid` [B, T] says which are of no padding."""
        gate = gate if valid is None else gate * valid[:, None, :, None]
        rows = gate.transpose(0, 1).flatten(1, 2).double().expand(-1, -1, self.second.shape[-1])
        self.second += rows.transpose(1, 2) @ rows
        self.count += rows.shape[1] if valid is None else valid.sum()

    def metric(self, groups: int) -> Tensor:
        """The mean of `sum diag(g) W_O^T W_O diag(g)` over the heads of each of so many groups, [G, D, D]."""
        return (self.products * self.second / self.count).unflatten(0, (groups, -1)).sum(1)


@dataclass
class AttentionMoments:
    """Sums over calibration text for one layer, in float64, over query-key pairs outside the window.

    `a` is an attention weight, `p` the sum of a query's weights outside the window, `o` the sum of `a * v` there. Where
    N KV heads share a latent, `k` or `v` are the vectors of all of them, N * D dimensions: a key's weights are summed
    over the heads, and each query head has an `o` of all values under its own attention. Where keys and values share a
    latent too, `k` is both of them side by side, twice as many dimensions.

    Args:
        key_metric: `sum a q q^T` [G, D, D], each query seen in its key's frame and scaled to scores.
        vectors: of `k`, weighted by `a`.
        value_metric: `sum W_O^T W_O` over the heads of a group [G, D, D], behind gates if there are any.
        outputs: of `o / p`, weighted by `p^2`; None where keys and values share a latent.
        window: tokens kept exactly, W.
        priors: covariances of `k`, and of values, [G/N, n, n] where hidden states are white noise, that is, what the
            projections alone make of any text; none without shrinkage.
        shrinkage: share of the covariances that is to be taken from them, in [0, 1).
    """

    key_metric: Tensor
    vectors: Sums
    value_metric: Tensor
    outputs: Sums | None
    window: int
    priors: tuple[Tensor, ...] = ()
    shrinkage: float = 0.0
    gates: Gates | None = None
    tokens: int = 0

    @classmethod
    def of(cls, attention: EigenAttention, window: int, sharing: Sharing, shrinkage: float = 0.0) -> AttentionMoments:
        """Empty moments for a layer."""
        g, d = attention.kv_heads, attention.head_dim
        priors = _priors(attention, sharing) if shrinkage else ()
        with loaded(attention.output_projection):
            by_group = attention.output_weight().unflatten(1, (g, -1, d))  # [C, G, H/G, D]
            # A group at a time: a large model's whole weight takes much memory in float64.
            value_metric = torch.stack([_outer_products(group) for group in by_group.unbind(1)])
        vectors = Sums.zeros(value_metric, g // sharing.keys, (2 if sharing.joint else 1) * sharing.keys * d)
        outputs = None if sharing.joint else Sums.zeros(value_metric, g // sharing.values, sharing.values * d)
        gates = None
        if attention.gates:
            with loaded(attention.output_projection):
                by_head = attention.output_weight().unflatten(1, (attention.heads, d))
                products = torch.stack([_outer_products(head) for head in by_head.unbind(1)])
            gates = Gates(products, torch.zeros_like(products), products.new_zeros(1))
        return cls(torch.zeros_like(value_metric), vectors, value_metric, outputs, window, priors, shrinkage, gates)

    def observe(self, attention: EigenAttention, heads: Heads[Tensor], this: ForwardPass, valid: Tensor | None) -> None:
        """Add one batch: queries, keys and values before rotation, and the pass that they are of."""
        q, k, v = heads
        if self.gates is not None and this.gate is not None:
            self.gates.add(this.gate, valid)
            self.value_metric.copy_(self.gates.metric(self.groups))
        t, latents, outputs = q.shape[-2], len(self.vectors.weight), self.outputs
        values = joined(v, latents if outputs is None else len(outputs.weight))
        mask = this.whole_mask(q)
        q_rotated, k_rotated = this.rotated(q), this.rotated(k)
        log_sums = []
        column_weight = torch.zeros(k.shape[:-1], dtype=torch.float64, device=k.device)  # [B, G, T]
        for start in range(0, t, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, t)
            scores = masked_scores(
                attention, q_rotated[:, :, start:stop], k_rotated[:, :, :stop], mask[..., start:stop, :stop]
            )
            log_sums.append(log_sum_exp(scores, attention.sink_logits))
            weights = (scores - log_sums[-1]).exp().tril(start - self.window)  # n <= m - W
            if valid is not None:
                weights = weights * valid[:, None, start:stop, None]
            if outputs is not None:
                by_latent = weights.unflatten(1, (values.shape[1], -1))  # [B, G/N, H/G * N, block, stop]
                sums = by_latent.to(v.dtype) @ values[:, :, None, :stop]
                outputs.add_means(sums, by_latent.sum(-1, keepdim=True))
            weights = weights.unflatten(1, (self.groups, -1))  # [B, G, H/G, block, stop]
            column_weight[..., :stop] += weights.sum((2, 3))
            if not attention.rotates:
                share = weights.sum(-1, keepdim=True)
                self.key_metric += self._gram(q[:, :, start:stop], share) * attention.scaling**2
        vectors = joined(k, latents)
        vectors = torch.cat([vectors, values], dim=-1) if outputs is None else vectors
        self.vectors.add(vectors, column_weight.unflatten(1, (latents, -1)).sum(2))
        if attention.rotates:
            log_sum = torch.cat(log_sums, dim=-2)
            self._add_sampled_metric(attention, (q_rotated, k_rotated), mask, column_weight, log_sum, this, valid)

    @property
    def groups(self) -> int:
        """KV heads, G."""
        return len(self.key_metric)

    def _gram(self, x: Tensor, weight: Tensor) -> Tensor:
        """`sum weight x x^T` of vectors [B, H, n, D], per group of heads: [G, D, D] in float64.

        Args:
            weight: [B, G, H/G, n, 1].
        """
        rows = x.unflatten(1, (self.groups, -1)).transpose(0, 1).flatten(1, 3).double()  # [G, B * H/G * n, D]
        return (rows * weight.transpose(0, 1).flatten(1, 3)).transpose(1, 2) @ rows

    def _add_sampled_metric(
        self,
        attention: EigenAttention,
        rotated: tuple[Tensor, Tensor],
        mask: Tensor,
        column_weight: Tensor,
        log_sum: Tensor,
        this: ForwardPass,
        valid: Tensor | None,
    ) -> None:
        """`sum a q_mn q_mn^T` with `q_mn = R_n^T R_m q_m`, estimated at some keys of each batch.

        Turning back is the same for all queries of one key, so it is done to their D x D sum. Keys are drawn in
        proportion to the attention they get, by systematic sampling: a sink is drawn many times, but summed only once.
        """
        q, k = rotated
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
        if this.position_ids is None:
            raise EigenAttnError("this model calls its attention without position_ids, which keys rotate by.")
        cos, sin = attention.angles(q.double(), this.position_ids[:1, drawn])
        # One sum over a batch's queries is taken in fp32, at twice the speed; sums over batches are in float64.
        rows = q.float().unflatten(1, (self.groups, -1)).transpose(0, 1).flatten(1, 3)  # [G, B * H/G * T, D]
        weights = weights.transpose(0, 1).flatten(1, 3).sqrt()  # [G, B * H/G * T, drawn]
        for i, share in enumerate(shares.tolist()):
            weighted = rows * weights[..., i : i + 1]
            metric = (weighted.transpose(1, 2) @ weighted).double()
            for _ in range(2):  # R^T on the right side, then, transposed, on the left
                back = rotate(metric[None], cos[:, i : i + 1], -sin[:, i : i + 1], attention.family.interleaved)
                metric = back[0].transpose(-1, -2)
            self.key_metric += share * metric


@torch.no_grad()
def _priors(attention: EigenAttention, sharing: Sharing) -> tuple[Tensor, ...]:
    """Covariances of keys and of values of white hidden states, [G/N, N * D, N * D] in float64; always the same.

    Where keys and values share a latent there is one of them side by side.
    """
    output = attention.output_projection
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, PRIOR_STATES, attention.config.hidden_size, generator=generator)
    with loaded(attention):
        _, *sides = attention.project(states.to(execution_device(output), attention.dtype))
    shared = sharing.keys, sharing.values
    rows = [joined(x, x.shape[1] // heads)[0].double() for x, heads in zip(sides, shared, strict=True)]
    rows = [torch.cat(rows, dim=-1)] if sharing.joint else rows  # [G/N, n, N * D] each
    centred = [x - x.mean(1, keepdim=True) for x in rows]
    return tuple(x.transpose(1, 2) @ x / PRIOR_STATES for x in centred)


def _outer_products(x: Tensor) -> Tensor:
    """Sum of outer products of vectors [..., D] in float64: [D, D]."""
    rows = x.double().flatten(0, -2)
    return rows.T @ rows


def far_weights(
    attention: EigenAttention, rotated: tuple[Tensor, Tensor], mask: Tensor, window: int, valid: Tensor | None
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Attention weights on what lies outside the window, a block of queries at a time.

    Args:
        rotated: queries [B, H, T, D] and keys [B, G, T, D] at their positions.
        mask: of the whole pass.
        window: exact tokens, W.
        valid: [B, T] of booleans, or None: queries that are no padding; others have no weights.

    Yields:
        Where the block begins and stops, and masked scores and weights [B, H, block, stop] in fp32.
    """
    q, k = rotated
    t = q.shape[-2]
    for start in range(0, t, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, t)
        scores = masked_scores(attention, q[:, :, start:stop], k[:, :, :stop], mask[..., start:stop, :stop])
        weights = softmax(scores, attention.sink_logits)
        near = max(start - window, 0)  # what lies before it, all of these queries have outside their windows
        weights[..., near:].tril_(start - window - near)  # n <= m - W
        if valid is not None:
            weights = weights * valid[:, None, start:stop, None]
        yield start, stop, scores, weights


def masked_scores(attention: EigenAttention, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """Masked scores [B, H, n, s] in fp32, of queries [B, H, n, D] and keys [B, G, s, D]."""
    if q.dtype == torch.float16:
        q, k = q.float(), k.float()  # before it is scaled, a score may pass 65,504, where fp16 ends
    grouped = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # [B, G, H/G * n, D]
    scores = (grouped @ k.transpose(-1, -2)).view(*q.shape[:-1], k.shape[-2]).float().mul_(attention.scaling)
    return cap_and_mask(scores, mask, attention.softcap)
