"""Reading windows of text: losses, and how far predictions are from those another model made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..cache.evicting import EigenCache
from ..calibration.checks import check_tokens
from ..errors import EigenAttnError
from ..models.cache_names import CACHE
from ..models.placement import input_device
from .paired import Estimate, exponential, mean

# Gives the logits [1, keep, V] of the last `keep` tokens of one sequence [1, T]: `(model, ids, keep)`.
Logits = Callable[[PreTrainedModel, Tensor, int], Tensor]

# Whole distributions kept of a text for comparison (chosen: 1 GB in fp32 at a vocabulary of 128k, and a small
# error of the mean). They are spread evenly over the windows.
KEPT_DISTRIBUTIONS = 2048


def uncached(model: PreTrainedModel, ids: Tensor, keep: int) -> Tensor:
    """The whole sequence at once, without a cache."""
    return model(ids, use_cache=False, logits_to_keep=keep).logits


def through_cache(model: PreTrainedModel, ids: Tensor, keep: int) -> Tensor:
    """The first half of the sequence at once, and the rest token by token through the cache."""
    prefill = ids.shape[1] // 2
    out = model(ids[:, :prefill], use_cache=True)
    return torch.cat([out.logits, in_pieces(model, ids[:, prefill:], out[CACHE], 1)], dim=1)[:, -keep:]


def in_pieces(model: PreTrainedModel, ids: Tensor, cache: Any, piece: int) -> Tensor:
    """Predictions [B, T, V] for tokens [B, T] that are read into a cache, `piece` of them at a time."""
    pieces = ids.split(piece, dim=1)
    return torch.cat([model(each, use_cache=True, **{CACHE: cache}).logits for each in pieces], dim=1)


def through_eviction(evict: str | None, budget: int | float | None, piece: int = 1) -> Logits:
    """Reads all that comes before the judged tokens at once, evicts, and reads on through what is left.

    Args:
        evict, budget: as of `EigenCache`.
        piece: tokens read at a time; those of a piece see each other, whatever the budget.

    Raises:
        EigenAttnError: from the reader, if nothing comes before the judged tokens.
    """

    @torch.no_grad()
    def read(model: PreTrainedModel, ids: Tensor, keep: int) -> Tensor:
        if keep >= ids.shape[1]:
            raise EigenAttnError(
                "with eviction a prompt must come before the tokens that are judged: lower the stride."
            )
        cache = EigenCache(model.config, evict=evict, budget=budget)
        model(ids[:, :-keep], use_cache=True, logits_to_keep=1, **{CACHE: cache})
        return in_pieces(model, ids[:, -keep:], cache, piece)

    return read


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


@dataclass(frozen=True)
class Predictions:
    """What a model predicted on windows of text.

    Args:
        top1: [N, scored], the likeliest token at every scored position.
        positions: [P], the scored positions that distributions were kept of.
        log_probabilities: [N, P, V] in fp32.
    """

    top1: Tensor
    positions: Tensor
    log_probabilities: Tensor


@dataclass(frozen=True)
class Reading:
    """Means over the scored tokens of each window: what standard errors and paired differences are made of.

    Args:
        nll: negative log-likelihood, in nats a token.
        divergence: KL divergence from the other model's distributions, in nats a token, if there is another.
        agreement: share of tokens at which both find the same token likeliest, if there is another.
        tokens: scored tokens of all windows.
        predictions: the model's own, if they were to be kept.
    """

    nll: list[float]
    divergence: list[float] | None
    agreement: list[float] | None
    tokens: int
    predictions: Predictions | None

    @property
    def perplexity(self) -> Estimate:
        """`exp` of the mean negative log-likelihood."""
        return exponential(mean(self.nll))


@torch.no_grad()
def read(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    scored: int | None = None,
    logits_of: Logits = uncached,
    original: Predictions | None = None,
    keep: bool = False,
    advance: Callable[[], None] = lambda: None,
) -> Reading:
    """Read windows [N, T], each on its own.

    Args:
        scored: how many of a window's last tokens are predicted; all but the first by default.
        logits_of: how the model reads.
        original: predictions of another model on the same windows, to be compared with.
        keep: keep this model's predictions.
        advance: called after each window.

    Raises:
        EigenAttnError: if the windows are longer than the model reads, or hold tokens that it does not know.
    """
    check_tokens(windows, model)
    device = input_device(model)
    scored = windows.shape[1] - 1 if scored is None else scored
    count = max(1, min(scored, KEPT_DISTRIBUTIONS // len(windows)))
    positions = torch.linspace(0, scored - 1, count).round().long()
    nll, divergence, agreement, top1, kept = [], [], [], [], []
    for index, window in enumerate(windows):
        ids = window.unsqueeze(0).to(device)  # [1, T]
        logits = logits_of(model, ids, scored + 1)[0, :-1]  # [scored, V]
        nll.append(F.cross_entropy(logits.float(), ids[0, -scored:].to(logits.device)).item())
        if original is not None or keep:
            guesses = logits.argmax(-1).cpu()
            logs = logits[positions.to(logits.device)].float().log_softmax(-1)
        if original is not None:
            exact = original.log_probabilities[index].to(logs.device)
            # Tokens that the original rules out, by logits of -inf, add nothing.
            apart = torch.where(exact > -torch.inf, exact - logs, 0)
            divergence.append((exact.exp() * apart).sum(-1).mean().item())
            agreement.append((guesses == original.top1[index]).float().mean().item())
        if keep:
            top1.append(guesses)
            kept.append(logs.cpu())
        advance()
    return Reading(
        nll,
        divergence or None,
        agreement or None,
        len(windows) * scored,
        Predictions(torch.stack(top1), positions, torch.stack(kept)) if keep else None,
    )
