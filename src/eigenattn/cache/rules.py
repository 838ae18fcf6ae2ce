"""Which tokens a cache keeps: published rules of token eviction. A rule scores; `eigenattn.cache.evicting` gathers.

To add one, write a function and an entry in `EVICTION_RULES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ..errors import EigenAttnError

# First tokens that StreamingLLM keeps (arXiv 2309.17453, section 3.2).
SINKS = 4
# Queries whose attention SnapKV counts, and tokens its votes are pooled over (the settings for LongBench of arXiv
# 2404.14469's released code: 32, 7, the greatest).
OBSERVED, POOLED = 32, 7


class Held(NamedTuple):
    """What a rule knows of the tokens behind the exact window."""

    columns: Tensor  # [B, G, F], which token of the text each row is, ascending
    first: Tensor  # [B or 1, 1, 1], the first token that is no padding
    seen: int  # tokens of the text so far
    votes: Tensor | None  # [B, G, F], mean attention that the last `observes` queries pay to each row


@dataclass(frozen=True)
class Rule:
    """A rule of eviction.

    Args:
        score: gives scores [B, G, F]; the highest stay, padding never before a token.
        least: tokens that it keeps whatever the budget.
        observes: queries of a pass that it counts the attention of; after passes of fewer queries nothing is evicted.
    """

    score: Callable[[Held], Tensor]
    least: int
    observes: int = 0


def streaming(held: Held) -> Tensor:
    """The first tokens, on which attention rests, and the last (StreamingLLM, arXiv 2309.17453)."""
    return held.columns.double().masked_fill(held.columns < held.first + SINKS, math.inf)


def snapkv(held: Held) -> Tensor:
    """What the prompt's last queries attend to, with its neighbours (SnapKV, arXiv 2404.14469, section 4)."""
    votes = F.max_pool1d(held.votes, POOLED, stride=1, padding=POOLED // 2)
    return votes.masked_fill(held.columns >= held.seen - OBSERVED, math.inf)


EVICTION_RULES: dict[str, Rule] = {
    "streaming": Rule(streaming, least=SINKS + 1),
    "snapkv": Rule(snapkv, least=OBSERVED, observes=OBSERVED),
}


@dataclass(frozen=True)
class Eviction:
    """A rule and its budget.

    Args:
        name: of the rule.
        budget: tokens to keep of a sequence, the exact window included; below 1 a fraction of the tokens seen.
    """

    name: str
    budget: int | float

    def __post_init__(self) -> None:
        if self.name not in EVICTION_RULES:
            raise EigenAttnError(f"unknown eviction rule {self.name!r}: choose from {', '.join(EVICTION_RULES)}.")
        whole = isinstance(self.budget, int) and not isinstance(self.budget, bool)
        if not whole and not (isinstance(self.budget, float) and 0 < self.budget < 1):
            raise EigenAttnError(
                f"an eviction budget is a number of tokens, or a fraction between 0 and 1, not {self.budget!r}."
            )
        if whole and self.budget < self.rule.least:
            raise EigenAttnError(f"{self.name} keeps {self.rule.least} tokens at least: raise the budget.")

    @property
    def rule(self) -> Rule:
        return EVICTION_RULES[self.name]

    def kept(self, seen: int) -> int:
        """Tokens to keep of so many seen."""
        tokens = self.budget if isinstance(self.budget, int) else math.ceil(self.budget * seen)
        return max(tokens, self.rule.least)

    def choose(self, held: Held, count: int) -> Tensor:
        """Indices [B, G, count] of the rows to keep, ascending; of rows with equal scores the first."""
        scores = self.rule.score(held).masked_fill(held.columns < held.first, -math.inf)
        return scores.sort(descending=True, stable=True).indices[..., :count].sort().values
