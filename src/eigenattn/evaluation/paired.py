"""Means with standard errors, alone and as paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ..errors import EigenAttnError

# The largest whole number whose `exp` is a number.
MOST_NATS = 709


class Estimate(NamedTuple):
    """A figure and its standard error; the error is None where a single observation gives none."""

    value: float
    error: float | None


def mean(values: Sequence[float]) -> Estimate:
    """The mean of independent observations."""
    centre, count = math.fsum(values) / len(values), len(values)
    if count == 1:
        return Estimate(centre, None)
    variance = math.fsum((value - centre) ** 2 for value in values) / (count - 1)
    return Estimate(centre, math.sqrt(variance / count))


def exponential(estimate: Estimate) -> Estimate:
    """`exp` of an estimate of nats a token; its error is carried over to first order.

    Raises:
        EigenAttnError: if it is no number, or `exp` of it is none: a model that says nothing gives some 12.
    """
    if not estimate.value < MOST_NATS:
        raise EigenAttnError(
            f"a loss of {estimate.value:.4g} nats a token is no model's: try --dtype float32, or check its weights."
        )
    value = math.exp(estimate.value)
    return Estimate(value, None if estimate.error is None else value * estimate.error)


def difference(values: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """The mean difference of observations made on the same items, in the same order."""
    return mean([value - base for value, base in zip(values, baseline, strict=True)])
