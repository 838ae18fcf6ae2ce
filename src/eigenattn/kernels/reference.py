"""Attention written out, with the softmax in fp32: the ground truth of the other backends."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask(queries: int, keys: int, device: torch.device, first: int = 0) -> Tensor:
    """[T, S] of booleans, True where query m of first .. may see key n: n <= m, from the start of the sequence."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(first)


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which scores of such queries, and what is added to them, keep their digits: fp32, or more."""
    return torch.promote_types(dtype, torch.float32)


def add_mask(bias: Tensor, mask: Tensor) -> Tensor:
    """A bias on scores, and a mask that is boolean (True is visible) or additive, as one."""
    return bias.masked_fill(~mask, torch.finfo(bias.dtype).min) if mask.dtype == torch.bool else bias + mask


def both_masks(mask: Tensor, seen: Tensor) -> Tensor:
    """A mask, boolean (True is visible) or additive, that shows no more than a boolean one does: of the same kind."""
    return mask & seen if mask.dtype == torch.bool else add_mask(mask, seen)


def cap_and_mask(scores: Tensor, mask: Tensor | None, softcap: float | None) -> Tensor:
    """Scores [B, H, T, S] as the softmax takes them; arguments as in `attend`, but None masks nothing."""
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores if mask is None else add_mask(scores, mask)


def softmax(scores: Tensor, sinks: Tensor | None = None) -> Tensor:
    """The softmax of scores [B, H, T, S] in fp32 or more; what sinks [H] take of it is in no weight."""
    dtype = score_dtype(scores.dtype)
    if sinks is None:
        return scores.softmax(dim=-1, dtype=dtype)
    logits = sinks.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, logits], dim=-1).softmax(dim=-1, dtype=dtype)[..., :-1]


def log_sum_exp(scores: Tensor, sinks: Tensor | None = None) -> Tensor:
    """What scores less it are the logarithms of the `softmax` of, [B, H, T, 1]."""
    found = scores.logsumexp(dim=-1, keepdim=True)
    return found if sinks is None else torch.logaddexp(found, sinks.to(found.dtype).view(-1, 1, 1))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    scale: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention with grouped queries, where keys and values may differ in size.

    Args:
        q: queries [B, H, T, D].
        k: keys [B, G, S, D].
        v: values [B, G, S, V].
        mask: [B or 1, H or 1, T, S], boolean (True is visible) or additive. None is causal for T > 1, query m seeing
            the keys 0 .. m, and everything for T = 1.
        scale: multiplies the scores.
        dropout: probability of dropping an attention weight.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        sinks: a logit of each head [H], with which the softmax is taken but for which there is no value.

    Returns:
        The output [B, H, T, V] and the attention weights [B, H, T, S].
    """
    b, h, t, d = q.shape
    g, s = k.shape[1:3]
    scores = (q.reshape(b, g, (h // g) * t, d) @ k.transpose(-1, -2)).reshape(b, h, t, s) * scale
    if mask is None and t > 1:
        mask = causal_mask(t, s, q.device)
    scores = cap_and_mask(scores, mask, softcap)
    weights = softmax(scores, sinks).to(q.dtype)
    weights = torch.nn.functional.dropout(weights, dropout) if dropout else weights
    out = weights.reshape(b, g, (h // g) * t, s) @ v  # [B, G, H/G * T, V]
    return out.reshape(b, h, t, v.shape[-1]), weights
