"""Which tokens a cache keeps: published rules of token eviction. A rule scores; `eigenattn.cache.evicting` gathers.

To add one, write a function and an entry in `EVICTION_RULES`, here or in another package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import EigenAttnError

# First tokens that StreamingLLM keeps (arXiv 2309.17453, section 3.2).
SINKS = 4
# Queries whose attention SnapKV counts, and tokens its votes are pooled over (the settings for LongBench of arXiv
# 2404.14469's released code: 32, 7, the greatest).
OBSERVED, POOLED = 32, 7


@dataclass(frozen=True)
class Held:
    """What a rule knows of the tokens behind the exact window, after a pass. What is called is computed then.

    Heads below are G, or G/N where N KV heads share a latent and so keep the same tokens.

    Args:
        columns: which token of the text each row is, [B, heads, F], ascending.
        first: the first token that is no padding, [B or 1, 1, 1].
        seen: tokens of the text so far.
        queries: tokens of the pass.
        kept: rows that may stay.
        keys, values: give the vectors of the rows as they are decoded, keys before rotation, [B, G, F, D].
        attention: gives the weights of so many last queries of the pass on the tokens of the rows, seen exactly or
            through latents, [B, H, n, F].
        tally: what the rule's `tally` has summed up for each row, [B, heads, F]; None without one.
    """

    columns: Tensor
    first: Tensor
    seen: int
    queries: int
    kept: int
    keys: Callable[[], Tensor]
    values: Callable[[], Tensor]
    attention: Callable[[int], Tensor]
    tally: Tensor | None = None

    def by_head(self, x: Tensor) -> Tensor:
        """Something a query head, or a KV head, [B, H or G, F], as the mean over those that keep the same tokens."""
        return x.unflatten(1, (self.columns.shape[1], -1)).mean(2)


@dataclass(frozen=True)
class Rule:
    """A rule of eviction.

    Args:
        score: gives scores [B, heads, F]; the highest stay, padding never before a token.
        least: tokens that it keeps whatever the budget.
        queries: after passes of fewer queries nothing is evicted.
        tally: gives what is added to each row's tally after every pass, [B, heads, F]; it begins at 0 when a token
            leaves the window.
    """

    score: Callable[[Held], Tensor]
    least: int = 1
    queries: int = 1
    tally: Callable[[Held], Tensor] | None = None


def streaming(held: Held) -> Tensor:
    """The first tokens, on which attention rests, and the last (StreamingLLM, arXiv 2309.17453)."""
    return held.columns.double().masked_fill(held.columns < held.first + SINKS, math.inf)


def snapkv(held: Held) -> Tensor:
    """What the prompt's last queries attend to, with its neighbours (SnapKV, arXiv 2404.14469, section 4)."""
    votes = held.by_head(held.attention(OBSERVED).float().mean(-2))
    pooled = F.max_pool1d(votes, POOLED, stride=1, padding=POOLED // 2)
    return pooled.masked_fill(held.columns >= held.seen - OBSERVED, math.inf)


def tova(held: Held) -> Tensor:
    """What the last query attends to, over all heads together (TOVA, arXiv 2401.06104, section 3.2)."""
    return held.attention(1).float().mean((1, 2)).unsqueeze(1).expand(held.columns.shape)


def attention_so_far(held: Held) -> Tensor:
    """The attention that the rows got from the queries of a pass."""
    return held.by_head(held.attention(held.queries).float().sum(-2))


def h2o(held: Held) -> Tensor:
    """Half of it what got most attention so far, half of it the last (H2O, arXiv 2306.14048, section 4.2)."""
    assert held.tally is not None  # `Rule.tally` gives it
    rows = held.columns.shape[-1]
    recent = torch.arange(rows, device=held.columns.device) >= rows - held.kept // 2
    return held.tally.masked_fill(recent, math.inf)


def knorm(held: Held) -> Tensor:
    """Keys of small norm, which get most attention (arXiv 2406.11430)."""
    return -held.by_head(held.keys().float().norm(dim=-1))


def keydiff(held: Held) -> Tensor:
    """Keys unlike the others, by their cosine with the mean direction (KeyDiff, arXiv 2504.15364)."""
    unit = F.normalize(held.keys().float(), dim=-1)
    tokens = held.columns >= held.first  # padding has no direction that counts
    heads = unit.shape[1] // tokens.shape[1]
    mean = (unit * tokens.repeat_interleave(heads, dim=1).unsqueeze(-1)).sum(-2, keepdim=True)
    return -held.by_head(F.cosine_similarity(unit, mean, dim=-1))


EVICTION_RULES: dict[str, Rule] = {
    "streaming": Rule(streaming, least=SINKS + 1),
    "snapkv": Rule(snapkv, least=OBSERVED, queries=OBSERVED),
    "tova": Rule(tova),
    "h2o": Rule(h2o, least=2, tally=attention_so_far),
    "knorm": Rule(knorm),
    "keydiff": Rule(keydiff),
}


@dataclass(frozen=True)
class Eviction:
    """A rule and its budget.

    Args:
        name: of the rule.
        budget: tokens to keep of a sequence, the exact window included; below 1 a fraction of the tokens seen.

    Raises:
        EigenAttnError: on an unknown rule or an impossible budget.
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
        """The rule of that name."""
        return EVICTION_RULES[self.name]

    def kept(self, seen: int) -> int:
        """Tokens to keep of so many seen."""
        tokens = self.budget if isinstance(self.budget, int) else math.ceil(self.budget * seen)
        return max(tokens, self.rule.least)

    def choose(self, held: Held) -> Tensor:
        """Indices [B, heads, kept] of the rows to keep, ascending; of rows with equal scores the first."""
        scores = self.rule.score(held).masked_fill(held.columns < held.first, -math.inf)
        return scores.sort(descending=True, stable=True).indices[..., : held.kept].sort().values
