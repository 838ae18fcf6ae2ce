"""Perplexity over token windows, without a cache or through it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from ..calibration.checks import checked
from ..errors import EigenAttnError
from .paired import exponential, mean
from .reading import read, through_cache, uncached


@dataclass(frozen=True)
class Perplexity:
    """`exp` of the mean negative log-likelihood of `tokens` predicted tokens."""

    value: float
    tokens: int
    window_nll: list[float]  # mean negative log-likelihood of each window, for paired comparison


def windows_of(tokens: Tensor, count: int, length: int, stride: int | None = None) -> Tensor:
    """The first windows [N, length] of a text that hold `count` tokens.

    One begins every `stride` tokens; by default they lie side by side.

    Raises:
        EigenAttnError: if the text is too short for one window, or the stride does not lie in 1 .. length.
    """
    stride = length if stride is None else stride
    if not 0 < stride <= length:
        raise EigenAttnError(f"the stride must lie between 1 and the window's {length} tokens, not {stride}.")
    number = (min(count, len(tokens)) - length) // stride + 1
    if number <= 0:
        raise EigenAttnError(
            f"the text has {len(tokens)} tokens and {count} were asked for; one window takes {length}: give a longer "
            "text, or lower --length."
        )
    return tokens.unfold(0, length, stride)[:number]


def scored_tokens(length: int, stride: int | None = None) -> int:
    """Tokens that a window predicts: none twice, and the first of the window never."""
    return min(stride or length, length - 1)


def perplexity(
    model: PreTrainedModel, windows: Tensor, cached: bool = False, advance: Callable[[], None] = lambda: None
) -> Perplexity:
    """Perplexity over windows [N, T]; each is read on its own, and its first token is not predicted.

    Args:
        cached: read the first half of each window at once, and the rest token by token through the cache.
        advance: called after each window.

    Raises:
        EigenAttnError: if the model does not know the tokens, or its predictions are no numbers.
    """
    with checked(model):
        reading = read(model, windows, logits_of=through_cache if cached else uncached, advance=advance)
    return Perplexity(exponential(mean(reading.nll)).value, reading.tokens, reading.nll)
