"""The one path from text to maps: moments, bases, costs, ranks and bits, refitted decoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from functools import cached_property
from typing import Any, TypeVar

from transformers import PreTrainedModel

from ..cache.layout import Layout
from ..calibration.checks import check_tokens
from ..calibration.fisher_moments import FisherMoments
from ..calibration.statistics import Batch
from ..config import TARGETS, EigenAttentionConfig, Sharing
from ..errors import EigenAttnError
from ..journal import Journal
from ..models.attention import EigenAttention
from ..models.placement import input_device
from ..progress import Clock, TokenProgress
from .bases import WEIGHED_AT
from .basis import Bases, truncated
from .checks import check_range, check_sharing
from .measure import Measurement
from .methods import BASES
from .quantise import Fitted, equivalent_ratio, fit_quantisers, quantise_bases
from .rank_problem import RankProblem
from .ranks import RANK_RULES
from .refit import refit
from .resuming import MemoisedMeasurements, ResumableMoments
from .sensitivity import first_weights

Entry = TypeVar("Entry")

# Tokens, from the first batches on, over which rank rules measure what truncation costs. Each latent of each layer runs
# again over them, twice.
COST_TOKENS = 1024
# What a configuration may ask of a basis (`BasisMethod.supports`), and when it does.
FEATURES: dict[str, Callable[[EigenAttentionConfig], bool]] = {
    "window": lambda config: config.window > 0,
    "coded": lambda config: bool(config.coded),
    "shared heads": lambda config: config.sharing.values > 1,
    "both sides": lambda config: config.sharing.joint,
    "shrinkage": lambda config: config.shrinkage > 0,
    "refit": lambda config: bool(config.refit),
}


def check_supported(config: EigenAttentionConfig) -> None:
    """Raise an `EigenAttnError` if a basis or rank rule is not known, or does not go with what a configuration asks."""
    method, rule = _named(BASES, config.basis), _named(RANK_RULES, config.ranks)
    for feature, asks in FEATURES.items():
        if asks(config) and feature not in method.features:
            able = [name for name, each in BASES.items() if feature in each.features]
            raise EigenAttnError(
                f"the basis {config.basis!r} does not support {feature}: leave it out, or choose one of "
                f"{', '.join(able) or 'none'}."
            )
    target = next(name for name in TARGETS if getattr(config, name) is not None)
    if target not in rule.targets:
        raise EigenAttnError(f"ranks={config.ranks!r} takes {' or '.join(sorted(rule.targets))}, not {target}.")
    if config.coded and rule.weights is None:
        able = [name for name, each in RANK_RULES.items() if each.weights is not None]
        raise EigenAttnError(f"ranks={config.ranks!r} does not choose bits: for coded latents take {', '.join(able)}.")


def check_tied(config: EigenAttentionConfig, layouts: Iterable[Layout]) -> None:
    """Raise an `EigenAttnError` if a configuration asks for what there is not where values are keys."""
    if not any(layout.tied for layout in layouts):
        return
    what = "in multi-head latent attention a token's keys and values are one vector"
    if config.sharing != Sharing():
        raise EigenAttnError(f"{what}, and there is nothing to share: leave out share.")
    if config.refit:
        raise EigenAttnError(f"{what}, whose decoder is not refitted: leave out refit.")
    if "one vector" not in _named(BASES, config.basis).features:
        able = [name for name, each in BASES.items() if "one vector" in each.features]
        raise EigenAttnError(f"{what}, which the basis {config.basis!r} takes apart: take {', '.join(able)}.")


def _named(table: dict[str, Entry], name: str | None) -> Entry:
    if name is None or name not in table:
        raise EigenAttnError(f"unknown name {name!r}: choose one of {', '.join(table)}.")
    return table[name]


class Text:
    """Calibration batches, which may come from a stream that can be read only once.

    Args:
        batches: as a user has them: see `Batch.of`.
        again: whether they are wanted more than once; a stream is then held in memory.
    """

    def __init__(self, batches: Iterable[Any], model: PreTrainedModel, again: bool) -> None:
        self.model, self.device = model, input_device(model)
        self.source = batches
        self.held: list[Any] | None = [] if again and not isinstance(batches, Sequence) else None
        self.count = len(batches) if isinstance(batches, Sized) else None
        self.judged: list[Batch] = []
        self.tokens = self.longest = 0

    def __iter__(self) -> Iterator[Batch]:
        """All batches once more."""
        for value in self.source if self.held is None else self.held:
            yield Batch.of(value, self.device)

    def first_pass(self) -> Iterator[Batch]:
        """All batches, counted; the first are held, to measure costs on."""
        self.judged, self.tokens, self.longest = [], 0, 0
        for value in self.source:
            if self.held is not None:
                self.held.append(value)
            batch = Batch.of(value, self.device)
            check_tokens(batch.input_ids, self.model)
            if self.tokens < COST_TOKENS:
                self.judged.append(batch)
            self.tokens += batch.tokens
            self.longest = max(self.longest, batch.input_ids.shape[1])
            yield batch


class Recipe:
    """What a text says of a model, each step made once and only when it is asked for.

    Args:
        model: converted, at full rank.
        layers: its attention modules.
        config: whose basis, window, shared latents and shrinkage the statistics are of.
        batches: calibration text: token-id tensors [B, T], or mappings with `input_ids` and `attention_mask`.
        journal: keeps what is finished, and is asked for it.
        clock: counts the time that each stage takes.
        statistics: the moments of each layer, where they are known; of no use to a configuration that asks for passes
            over the text besides (see `eigenattn.calibration.statistics_file.check_fit`).

    Raises:
        EigenAttnError: if the configuration is not supported.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[EigenAttention],
        config: EigenAttentionConfig,
        batches: Iterable[Any],
        bars: TokenProgress,
        *,
        journal: Journal | None = None,
        clock: Clock | None = None,
        statistics: list[FisherMoments] | None = None,
    ) -> None:
        check_supported(config)
        for attention in layers:
            check_sharing(attention.kv_heads, config.sharing)
        if config.basis == "attention" and any(attention.is_read for attention in layers):
            raise EigenAttnError(
                "layers of this model read what another one caches, which the basis 'attention' does not see: take "
                "another."
            )
        check_tied(config, (attention.layout for attention in layers))
        self.model, self.layers, self.config, self.bars, self.journal = model, layers, config, bars, journal
        self.clock = clock or Clock()
        self.method = _named(BASES, config.basis)
        another_pass = bool(config.coded) and self.method.quantisers is None
        self.text = Text(batches, model, again=bool(config.refit) or another_pass)
        self.memo = MemoisedMeasurements(journal)
        if statistics is not None:
            self.moments = statistics

    @cached_property
    def moments(self) -> list[Any]:
        """The moments of each layer, from one pass over the text.

        Raises:
            EigenAttnError: if the text holds nothing, or nothing outside the window.
        """
        config = self.config
        asked = config.window, config.sharing, config.shrinkage
        resumable = ResumableMoments(lambda attention: self.method.moments(attention, *asked), self.journal)
        with self.clock.stage("statistics"):
            batches = resumable.batches(self.text.first_pass())
            shown = self.bars.batches("Calibrating", batches, self.text.count)
            found = self.method.collect(self.model, self.layers, shown, resumable.empty)
        if config.kv_ratio != 1 and self.text.longest <= config.window:
            raise EigenAttnError(
                f"the calibration sequences have {self.text.longest} tokens at most, and the window keeps "
                f"{config.window} exactly: nothing lies outside. Give longer ones, or a smaller window."
            )
        return found

    @cached_property
    def bases(self) -> Bases:
        """The bases of each layer's latents at full rank."""
        moments = self.moments
        with self.clock.stage("bases"):
            bases: Bases = [self.method.build(sums) for sums in moments]
            build_both = self.method.build_both
            if build_both is None or not self.config.sharing.joint:
                return bases
            # What errors of keys cost the model in proportion to errors of values, with bases of either side by itself.
            weights = first_weights(self._problem_of(bases).at(WEIGHED_AT))
            return [(build_both(sums, *pair),) for sums, pair in zip(moments, weights, strict=True)]

    @cached_property
    def problem(self) -> RankProblem:
        """What rank rules decide on. A sweep puts other costs in the place of measured ones."""
        return self._problem_of(self.bases)

    def _problem_of(self, bases: Bases) -> RankProblem:
        costs = Measurement(self.model, self.layers, bases, self.config.window, self.text.judged, self.bars, self.memo)
        return RankProblem.of(bases, self.config, costs, self.method.in_nats)

    @cached_property
    def balanced(self) -> Bases:
        """The same, in the units in which latents are coded."""
        return [tuple(basis.balanced() for basis in layer) for layer in self.bases]

    @cached_property
    def quantisers(self) -> list[tuple[Fitted, ...]]:
        """Quantisers of each layer's latents, of all widths, from moments or another pass over the text."""
        bases, of_moments = self.balanced, self.method.quantisers
        with self.clock.stage("quantisers"):
            if of_moments is not None:
                return [of_moments(*each) for each in zip(self.moments, bases, strict=True)]
            batches = self.bars.batches("Fitting quantisers", self.text, self.text.count)
            return fit_quantisers(self.model, self.layers, bases, batches, self.config.window)

    def choose(self, config: EigenAttentionConfig) -> Bases:
        """The bases to attach to each layer, truncated or coded, and refitted; none for a side that stays as it is.

        Args:
            config: one that differs from the recipe's in the target, ranks, codes and refit only.

        Raises:
            EigenAttnError: if the target cannot be met, or a basis does not fit the model's dtype.
        """
        check_supported(config)
        rule, problem = _named(RANK_RULES, config.ranks), dataclasses.replace(self.problem, config=config)
        if config.kv_ratio == 1:
            return [()] * len(self.layers)
        if config.coded and rule.weights is not None:
            quantisers = self.quantisers
            with self.clock.stage("ranks"):
                weights = rule.weights(problem.at(equivalent_ratio(problem.kv_ratio)))
                chosen = quantise_bases(self.layers, self.balanced, quantisers, weights, problem.kv_ratio)
        else:
            with self.clock.stage("ranks"):
                chosen = truncated(self.bases, rule.choose(problem))
        read = any(attention.is_read for attention in self.layers)  # no layer can be run by itself then
        if config.refit and not read and any(basis.sides == ("value",) for layer in chosen for basis in layer):
            with self.clock.stage("refit"):
                chosen = refit(self.model, self.layers, chosen, config.window, list(self.text), self.bars, self.journal)
        for attention, bases in zip(self.layers, chosen, strict=True):
            check_range(attention, bases)
        return chosen


def as_attached(config: EigenAttentionConfig, chosen: Bases) -> EigenAttentionConfig:
    """What a configuration comes to: where no layer has a basis everything is exact, and there is no window."""
    return config if any(chosen) else dataclasses.replace(config, window=0, share="1", coded=False)
