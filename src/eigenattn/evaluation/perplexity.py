"""Perplexity over token windows, without a cache or through it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import EigenAttnError


@dataclass(frozen=True)
class Perplexity:
    """`exp` of the mean negative log-likelihood of `tokens` predicted tokens."""

    value: float
    tokens: int
    window_nll: list[float]  # mean negative log-likelihood of each window, for paired comparison


def windows_of(tokens: Tensor, count: int, length: int) -> Tensor:
    """The first windows [N, length] of a text that hold `count` tokens, side by side.

    Raises:
        EigenAttnError: if the text is too short for one window.
    """
    number = min(count, len(tokens)) // length
    if number == 0:
        raise EigenAttnError(
            f"the text has {len(tokens)} tokens and {count} were asked for; one window takes {length}: give a longer "
            "text, or lower --length."
        )
    return tokens[: number * length].view(number, length)


@torch.no_grad()
def perplexity(
    model: nn.Module, windows: Tensor, cached: bool = False, advance: Callable[[], None] = lambda: None
) -> Perplexity:
    """Perplexity over windows [N, T]; each is read on its own, and its first token is not predicted.

    Args:
        cached: read the first half of each window at once, and the rest token by token through the cache.
        advance: called after each window.
    """
    device = model.get_input_embeddings().weight.device
    losses = []
    for window in windows:
        ids = window.unsqueeze(0).to(device)  # [1, T]
        logits = _cached_logits(model, ids) if cached else model(ids, use_cache=False).logits
        losses.append(F.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).item())
        advance()
    return Perplexity(math.exp(sum(losses) / len(losses)), windows.shape[0] * (windows.shape[1] - 1), losses)


def _cached_logits(model: nn.Module, ids: Tensor) -> Tensor:
    prefill = ids.shape[1] // 2
    out = model(ids[:, :prefill], use_cache=True)
    logits = [out.logits]
    for position in range(prefill, ids.shape[1]):
        out = model(ids[:, position : position + 1], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, dim=1)
