"""What a rank rule decides on: spectra, measured costs and a target."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..config import TARGETS, EigenAttentionConfig
from ..errors import EigenAttnError
from .basis import Bases

# The ranks of each layer's latents.
Ranks = list[tuple[int, ...]]


class Costs(Protocol):
    """What `eigenattn.compression.measure.Measurement` gives to rank rules."""

    def layer_errors(self, candidates: Sequence[Ranks]) -> list[list[float]]:
        """The relative error at each layer's output for each of its candidates."""
        ...

    def divergences(self, trials: Sequence[Ranks]) -> list[list[float]]:
        """What each of a layer's trials costs the model, in nats a token."""
        ...


@dataclass(frozen=True)
class RankProblem:
    """What a rank rule may look at.

    Args:
        spectra: those of each layer's latents, [G/N, D] each, descending.
        config: the target, and the multiple that ranks are held to.
        costs: measures what truncation costs, by running the model.
        in_nats: whether spectra say already what it costs, in nats a token.
    """

    spectra: Sequence[tuple[Tensor, ...]]
    config: EigenAttentionConfig
    costs: Costs
    in_nats: bool = False

    @classmethod
    def of(cls, bases: Bases, config: EigenAttentionConfig, costs: Costs, in_nats: bool = False) -> RankProblem:
        """The problem of bases at full rank."""
        return cls([tuple(basis.spectrum.cpu() for basis in layer) for layer in bases], config, costs, in_nats)

    @property
    def kv_ratio(self) -> float:
        """The KV ratio asked for.

        Raises:
            EigenAttnError: if another target was given.
        """
        if self.config.kv_ratio is None:
            raise EigenAttnError(f"ranks={self.config.ranks!r} needs a kv_ratio.")
        return self.config.kv_ratio

    def at(self, kv_ratio: float) -> RankProblem:
        """The same for a KV ratio, or the smallest one that can be met, whatever the target was."""
        targets = dict.fromkeys(TARGETS) | {"kv_ratio": max(kv_ratio, self.ratio(self.smallest()))}
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **targets, coded=False))

    @property
    def flat(self) -> list[Tensor]:
        """The spectra of all latents, layer by layer."""
        return [spectrum for layer in self.spectra for spectrum in layer]

    def by_layer(self, ranks: Iterable[int]) -> Ranks:
        """Ranks of all latents, in the order of `flat`, layer by layer."""
        each = iter(ranks)
        return [tuple(next(each) for _ in layer) for layer in self.spectra]

    def allowed(self, spectrum: Tensor) -> list[int]:
        """Ranks that a latent may have: multiples of `rank_multiple`, and full rank."""
        multiple, full = self.config.rank_multiple, spectrum.shape[-1]
        return sorted({*range(multiple, full, multiple), full})

    def smallest(self) -> Ranks:
        """The smallest ranks allowed."""
        return self.by_layer(self.allowed(spectrum)[0] for spectrum in self.flat)

    def ratio(self, ranks: Ranks) -> float:
        """The KV ratio of a choice."""
        chosen = [rank for layer in ranks for rank in layer]
        return sum(len(each) * rank for each, rank in zip(self.flat, chosen, strict=True)) / self.elements

    @property
    def elements(self) -> int:
        """Elements of a token's keys and values, all layers together."""
        return sum(spectrum.numel() for spectrum in self.flat)

    def uniform(self) -> Ranks:
        """The same ratio everywhere, to within one multiple: what rounding leaves over is spread evenly."""
        choices = [self.allowed(spectrum) for spectrum in self.flat]
        # A latent of both sides takes two turns, in the second of which it has no choice.
        turns = [2 // len(layer) for layer in self.spectra for _ in layer]
        levels = sum(turns) * max(len(choice) for choice in choices)

        def ranks_at(level: int) -> Ranks:
            """The share `level / levels` of each latent's choices; parts of one are spread by error diffusion."""
            ranks, carried = [], levels
            for choice, turn in zip(choices, turns, strict=True):
                step, carried = divmod(carried + 2 * level * len(choice), 2 * levels)
                carried = (carried + 2 * level * (turn - 1)) % (2 * levels)
                ranks.append(choice[min(max(step, 1), len(choice)) - 1])
            return self.by_layer(ranks)

        return self.largest_within(map(ranks_at, range(levels, 0, -1)))

    def largest_within(self, choices: Iterable[Ranks]) -> Ranks:
        """The first choice, of those in falling order of size, that keeps to the KV ratio.

        Raises:
            EigenAttnError: if none does.
        """
        ratio = 1.0
        for ranks in choices:
            ratio = self.ratio(ranks)
            if ratio <= self.kv_ratio + 1e-9:
                return ranks
        raise EigenAttnError(
            f"kv_ratio {self.kv_ratio} cannot be met: with ranks in multiples of {self.config.rank_multiple} the "
            f"smallest cache has a ratio of {ratio:.3f}. Ask for more, or lower rank_multiple."
        )


def tail(spectrum: Tensor) -> Tensor:
    """What is cut off of a spectrum [G, D] at ranks 0 .. D, over all heads: [D + 1]."""
    total = spectrum.sum(0)
    return torch.cat([total.flip(0).cumsum(0).flip(0), total.new_zeros(1)])
