"""The smallest cache whose loss on held-out text stays below a bound: foretold, compressed, measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..calibration.statistics import Batch
from ..config import LARGEST_CODED_RATIO, EigenAttentionConfig
from ..errors import EigenAttnError
from ..models.placement import input_device
from .basis import Bases
from .folding import attach, detach
from .measure import judged_tokens, log_probabilities
from .recipe import Recipe

# Sizes that are tried at most, and how near to the bound is near enough (chosen).
TRIALS = 8
NEAR = 0.85
# A bit an element: no smaller cache is tried.
LEAST = 1 / 16
# A tenth of a bit an element: sizes are not told apart more finely.
FINEST = 0.1 / 16
# By what a bit an element less multiplies the divergence, until two sizes were measured (chosen: 3 to 4 on SmolLM2).
BIT = 3.3


@dataclass(frozen=True)
class Bound:
    """The loss that is allowed.

    Args:
        nats: the mean KL divergence of predictions from the original's, in nats a token, on each text.
        held_out: batches of texts that were not calibrated on, by name, as `compress` takes them.
    """

    nats: float
    held_out: Mapping[str, Iterable[Any]]

    def check(self, config: EigenAttentionConfig) -> None:
        """Raise an `EigenAttnError` if it is no bound of such latents, or there is nothing to measure on."""
        if config.kv_ratio is None:
            raise EigenAttnError("max_divergence chooses a KV ratio: leave out the other target.")
        if type(self.nats) not in (int, float) or not 0 < self.nats < math.inf:
            raise EigenAttnError(
                f"max_divergence is in nats a token and above 0, such as 0.005, not {self.nats!r:.60}."
            )
        if not self.held_out:
            raise EigenAttnError("max_divergence is measured on held-out text, and none was given.")


class Found(NamedTuple):
    """The size that was found: its configuration and bases, and the divergence on each text, in nats a token."""

    config: EigenAttentionConfig
    bases: Bases
    divergences: dict[str, float]


@torch.no_grad()
def smallest(recipe: Recipe, config: EigenAttentionConfig, bound: Bound) -> Found:
    """The smallest size whose worst text stays within a bound, up to a tenth of a bit an element.

    Divergence is nearly exponential in size, so that a line through the logarithms of two sizes foretells the next.

    Args:
        config: all but the size, and the KV ratio to begin with.

    Raises:
        EigenAttnError: if no size does, or the model predicts no tokens.
    """
    largest = LARGEST_CODED_RATIO if config.coded else 1.0
    device = input_device(recipe.model)
    texts = {name: [Batch.of(each, device) for each in batches] for name, batches in bound.held_out.items()}
    if not all(texts.values()):
        raise EigenAttnError("max_divergence is measured on held-out text, and one of them holds no text.")
    exact = {name: [log_probabilities(recipe.model, batch) for batch in batches] for name, batches in texts.items()}

    def at(ratio: float) -> Found:
        tried = dataclasses.replace(config, kv_ratio=ratio)
        bases = recipe.choose(tried)
        try:
            for attention, each in zip(recipe.layers, bases, strict=True):
                attach(attention, each, config.window)
            with recipe.clock.stage("trials"):
                found = {name: _divergence(recipe, batches, exact[name]) for name, batches in texts.items()}
        finally:
            for attention in recipe.layers:
                detach(attention)
        return Found(tried, bases, found)

    return search(at, bound.nats, config.kv_ratio or largest, largest)


def search(at: Callable[[float], Found], nats: float, start: float, largest: float) -> Found:
    """Try sizes until one lies within the bound and near it, or between two that are next to each other."""
    best: Found | None = None
    measured: dict[float, float] = {}  # the logarithm of the worst text's divergence, by size
    ratio = min(start, largest)
    for _ in range(TRIALS):
        found = at(ratio)
        worst = max(found.divergences.values())
        measured[ratio] = math.log(max(worst, 1e-12))
        if worst <= nats:
            best = found
            if worst >= NEAR * nats or ratio <= LEAST:
                break
        elif ratio >= largest:
            raise EigenAttnError(
                f"a divergence of {nats} nats a token cannot be met: the largest cache, a KV ratio of {largest}, has "
                f"{worst:.4f} on {max(found.divergences, key=lambda name: found.divergences[name])}. Allow more, or "
                "keep a longer window."
            )
        low = max((x for x, y in measured.items() if y > math.log(nats)), default=LEAST)
        high = min((x for x, y in measured.items() if y <= math.log(nats)), default=largest)
        if best is not None and low in measured and high - low <= FINEST:
            break
        ratio = _next(measured, math.log(nats), low, high)
    if best is None:
        raise EigenAttnError(f"no size within {nats} nats a token was found in {TRIALS} trials: allow a little more.")
    return best


def _next(measured: dict[float, float], aim: float, low: float, high: float) -> float:
    """Where the line through the two sizes nearest to the aim meets it, or a little above, between two bounds."""
    nearest = sorted(measured, key=lambda ratio: abs(measured[ratio] - aim))[:2]
    slope = -16 * math.log(BIT)
    if len(nearest) == 2 and nearest[0] != nearest[1]:
        slope = (measured[nearest[1]] - measured[nearest[0]]) / (nearest[1] - nearest[0])
    slope = min(slope, -1.0)  # noise may have it rise
    ratio = nearest[0] + (aim + math.log(NEAR + (1 - NEAR) / 2) - measured[nearest[0]]) / slope
    inside = (
        low + FINEST / 2 if low in measured else low,
        high - FINEST / 2 if high in measured else high,
    )
    if high in measured and low in measured and not inside[0] <= ratio <= inside[1]:
        return (low + high) / 2
    return min(max(ratio, inside[0]), inside[1])


def _divergence(recipe: Recipe, batches: list[Batch], exact: list[Tensor]) -> float:
    total = 0.0
    for batch, log_p in zip(batches, exact, strict=True):
        total += float((log_p.exp() * (log_p - log_probabilities(recipe.model, batch))).sum())
    return total / sum(map(judged_tokens, batches))
