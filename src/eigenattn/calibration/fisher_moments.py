"""What the `fisher` basis is made of: how much errors of keys and values matter, and how both are distributed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..cache.layout import SIDES
from ..config import Sharing
from ..models.attention import EigenAttention
from ..models.maps import joined
from ..models.placement import execution_device
from .attention_moments import Sums
from .gradients import backward
from .statistics import Batch, checked_moments

# Tokens of each latent that are drawn, to fit quantisers to (chosen: 1,024 and 2,048 are as good as all of 16,384).
SAMPLE = 2048


@dataclass
class Sample:
    """Vectors drawn by their weights, for G/N latents: priority sampling (Duffield, Lund and Thorup, 2007).

    A vector of weight `w` gets the priority `w / u`, `u` uniform, and the highest ones stay. Samples of two texts make
    one of both by the same rule, and `estimates` add up to what sums over all vectors would be, in expectation.

    Args:
        vectors, weights, priorities: what stays, [G/N, SAMPLE, n] and [G/N, SAMPLE]; priority 0 is an empty place.
        dropped: the highest priority that did not stay, [G/N].
    """

    vectors: Tensor
    weights: Tensor
    priorities: Tensor
    dropped: Tensor

    @classmethod
    def empty(cls, like: Tensor, latents: int, n: int) -> Sample:
        """Without vectors, in the dtype of `like`."""
        weights = like.new_zeros((latents, SAMPLE), dtype=torch.float64)
        return cls(like.new_zeros((latents, SAMPLE, n)), weights, weights.clone(), weights.new_zeros(latents))

    def add(self, x: Tensor, weights: Tensor, generator: torch.Generator) -> None:
        """Draw from vectors [G/N, T, n] with weights [G/N, T] as well."""
        drawn = torch.rand(weights.shape, generator=generator, dtype=torch.float64).clamp_min(1e-12)
        self._keep(x, weights, weights / drawn.to(weights.device))

    def merge(self, other: Sample) -> None:
        """Take in the sample of another text."""
        self.dropped.copy_(self.dropped.maximum(other.dropped))
        self._keep(other.vectors, other.weights, other.priorities)

    def _keep(self, x: Tensor, weights: Tensor, priorities: Tensor) -> None:
        best = torch.cat([self.priorities, priorities], dim=1).topk(SAMPLE + 1, dim=1)
        at = best.indices[:, :-1]
        self.dropped.copy_(self.dropped.maximum(best.values[:, -1]))
        self.priorities.copy_(best.values[:, :-1])
        self.weights.copy_(torch.cat([self.weights, weights], dim=1).gather(1, at))
        vectors = torch.cat([self.vectors, x.to(self.vectors.dtype)], dim=1)
        self.vectors.copy_(vectors.gather(1, at.unsqueeze(-1).expand(-1, -1, vectors.shape[-1])))

    @property
    def estimates(self) -> Tensor:
        """Weights [G/N, SAMPLE] by which sums over the sample estimate weighted sums over all vectors."""
        return self.weights.maximum(self.dropped.unsqueeze(-1)).where(self.priorities > 0, 0.0)


@dataclass
class LatentMoments:
    """Of what one kind of latents is made of: vectors `x` [n] of G/N latents and their gradients `g`.

    Args:
        metric: `sum g g^T` [G/N, n, n] in float64: half of it is what squared errors cost, in nats.
        vectors: of `x`, weighted by its influence `|g|^2`.
        sample: of `x`, by the same weight.
        parts: how many dimensions of a vector are of one unit, next to each other.
    """

    metric: Tensor
    vectors: Sums
    sample: Sample
    parts: tuple[int, ...]

    @classmethod
    def empty(cls, like: Tensor, latents: int, parts: tuple[int, ...]) -> LatentMoments:
        """Of nothing yet."""
        vectors = Sums.zeros(like, latents, sum(parts))
        return cls(torch.zeros_like(vectors.second), vectors, Sample.empty(like, latents, sum(parts)), parts)

    def add(self, x: Tensor, g: Tensor, influence: Tensor, generator: torch.Generator) -> None:
        """Add vectors and gradients [B, G/N, T, n] with their influence [B, G/N, T]."""
        rows, weights = g.transpose(0, 1).flatten(1, 2), influence.transpose(0, 1).flatten(1).double()
        # One batch's sum is taken in fp32, at twice the speed; sums over batches are in float64.
        self.metric += (rows.transpose(1, 2) @ rows).double()
        self.vectors.add(x, influence.double())
        self.sample.add(x.transpose(0, 1).flatten(1, 2), weights, generator)

    def merge(self, other: LatentMoments) -> None:
        """Take in what another text says."""
        self.metric += other.metric
        for sums, others in zip(vars(self.vectors).values(), vars(other.vectors).values(), strict=True):
            sums += others
        self.sample.merge(other.sample)


@dataclass
class FisherMoments:
    """Sums over calibration text for one layer, of what reaches queries outside the window.

    Args:
        keys, values: of either side's latents; where a token's keys and values share latents, `keys` is of both side by
            side and `values` None, as it is where values are keys.
        sharing: which latents are shared.
        window: tokens kept exactly, W.
    """

    keys: LatentMoments
    values: LatentMoments | None
    sharing: Sharing
    window: int
    tokens: int = 0

    @property
    def kinds(self) -> tuple[tuple[tuple[str, ...], int], ...]:
        """The sides that each latent of a token is made of, and of how many KV heads."""
        return self.sharing.kinds[: len(self.latents)]

    @classmethod
    def of(cls, attention: EigenAttention, window: int, sharing: Sharing, shrinkage: float = 0.0) -> FisherMoments:
        """Empty moments for a layer."""
        output, g, d = attention.output_projection, attention.kv_heads, attention.head_dim
        like = torch.empty(0, device=execution_device(output), dtype=attention.dtype)
        kinds = sharing.kinds_of(attention.layout.sides)
        found = [
            LatentMoments.empty(like, g // heads, attention.parts or (heads * d,) * len(sides))
            for sides, heads in kinds
        ]
        return cls(found[0], found[1] if len(found) > 1 else None, sharing, window)

    @property
    def latents(self) -> tuple[LatentMoments, ...]:
        """Of each kind of latents, in the order of `kinds`."""
        return (self.keys,) if self.values is None else (self.keys, self.values)

    def add(self, vectors: tuple[Tensor, Tensor], gradients: tuple[Tensor, Tensor], seed: int) -> None:
        """Add one batch: keys and values before rotation, and their gradients, [B, G, T, D] each.

        Args:
            seed: of the vectors that are drawn; a batch that comes again later draws others.
        """
        generator = torch.Generator().manual_seed(seed + self.tokens)
        for moments, (sides, _) in zip(self.latents, self.kinds, strict=True):
            count, of_sides = len(moments.metric), [SIDES.index(side) for side in sides]
            x, g = (torch.cat([joined(each[i], count) for i in of_sides], -1) for each in (vectors, gradients))
            # Keys and values have units of their own, so where they stand side by side each counts in its own.
            several, pairs = (
                len(moments.parts) > 1,
                zip(*(each.split(moments.parts, -1) for each in (x, g)), strict=True),
            )
            of_parts = [(part, of.float().square().mean().sqrt() if several else 1.0) for of, part in pairs]
            influence = torch.stack([(part * unit).square().sum(-1) for part, unit in of_parts]).sum(0)
            moments.add(x, g, influence, generator)

    def merge(self, other: FisherMoments) -> None:
        """Take in what another text says."""
        self.tokens += other.tokens
        for own, others in zip(self.latents, other.latents, strict=True):
            own.merge(others)


def collect_fisher(
    model: PreTrainedModel,
    layers: Sequence[EigenAttention],
    batches: Iterable[Batch],
    empty: Callable[[EigenAttention], FisherMoments],
) -> list[FisherMoments]:
    """As `eigenattn.calibration.statistics.collect_moments`, by passes forward and back.

    Random numbers hang on a batch's own tokens. So the sums of a text are the same whatever else is read in one run,
    and runs over different texts, whose moments are merged, draw independently.
    """
    moments = [empty(attention) for attention in layers]
    of = {attention.layer_idx: sums for attention, sums in zip(layers, moments, strict=True)}
    for batch in batches:
        seed = _seed_of(batch)
        backward(
            model,
            layers,
            batch,
            moments[0].window,
            seed,
            lambda attention, vectors, gradients, seed=seed: of[attention.layer_idx].add(vectors, gradients, seed),
        )
        for sums in moments:
            sums.tokens += batch.tokens
    return checked_moments(layers, moments)


def _seed_of(batch: Batch) -> int:
    """A number of 32 bits that stands for the tokens of a batch."""
    ids = batch.input_ids.cpu().long().contiguous()
    return int.from_bytes(hashlib.sha256(ids.numpy().tobytes()).digest()[:4], "little")
