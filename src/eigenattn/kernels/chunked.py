"""Attention of many queries, a chunk of keys at a time: parts are joined by their log-sum-exp.

Keys are decoded a chunk at a time and once a pass, and all queries meet a chunk before the next is decoded. Most
queries see all of a chunk or nothing of it, and the rest see a triangle, which fused kernels take without a mask.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .reference import both_masks, cap_and_mask
from .sdpa import widen
from .selection import HALF

# Keys decoded at a time (chosen): texts no longer than this are attended to at once.
CHUNK = 2048
# Queries whose scores are written out at a time, where no fused kernel gives the log-sum-exp (chosen).
QUERY_BLOCK = 256

# Of queries start .. stop - 1 and keys start .. stop - 1: boolean (True is visible) or additive
# [B or 1, H or 1, queries, keys], or None.
Mask = Callable[[int, int, int, int], Tensor | None]
# Keys [B, G or fewer, n, K] and values [B, G or fewer, n, V] start .. stop - 1.
Decode = Callable[[int, int], tuple[Tensor, Tensor]]


class Parts:
    """Attention joined from parts: mean values [B, H, T, V] and log-sum-exps of scores [B, H, T, 1], in fp32 or more.

    Args:
        q: queries [B, H, T, *]; size: V.
    """

    def __init__(self, q: Tensor, size: int) -> None:
        dtype = torch.promote_types(q.dtype, torch.float32)
        self.out = q.new_zeros(*q.shape[:-1], size, dtype=dtype)
        self.lse = q.new_full((*q.shape[:-1], 1), float("-inf"), dtype=dtype)

    def join(self, start: int, out: Tensor, lse: Tensor) -> None:
        """Add what queries start .. found elsewhere: out [B, H, n, V] and lse [B, H, n, 1], which is finite."""
        stop = start + out.shape[-2]
        held, before = self.out[:, :, start:stop], self.lse[:, :, start:stop]
        together = torch.logaddexp(before, lse)
        held.mul_((before - together).exp_()).add_(out * (lse - together).exp_())
        before.copy_(together)


def attend_with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attention and the log-sum-exp of its scores.

    Args:
        q: [B, H, T, K]; k: [B, G, S, K]; v: [B, G, S, V].
        mask: boolean (True is visible) or additive; a query that sees nothing has a log-sum-exp next to none.
        causal: query i sees keys 0 .. i; T = S then, and no mask.

    Returns:
        [B, H, T, V] and [B, H, T, 1].
    """
    size, size_v = max(q.shape[-1], v.shape[-1]), v.shape[-1]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, torch.finfo(q.dtype).min)
    if softcap is None and q.device.type == "cpu":
        # SDPA itself keeps the log-sum-exp to itself.
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(widen(x, size) for x in (q, k, v)), is_causal=causal, attn_mask=mask, scale=scale
        )
        return out[..., :size_v], lse.unsqueeze(-1)
    if softcap is None and mask is None and _has_flash_attention(q, size):
        size = -(-size // 8) * 8
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            *(widen(x, size) for x in (q, k, v)), is_causal=causal, scale=scale
        )
        return out[..., :size_v], lse.unsqueeze(-1)
    return _written_out(q, k, v, mask, causal, scale, softcap)


def _has_flash_attention(q: Tensor, size: int) -> bool:
    return (
        q.is_cuda
        and q.dtype in HALF
        and size <= 256
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def _written_out(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """With scores in memory, of a block of queries at a time."""
    b, h, t, _ = q.shape
    g, s = k.shape[1:3]
    outs, lses = [], []
    for start in range(0, t, QUERY_BLOCK):
        rows = q[:, :, start : start + QUERY_BLOCK]
        n = rows.shape[-2]
        scores = rows.reshape(b, g, h // g * n, -1) @ k.transpose(-1, -2)  # [B, G, H/G * n, S]
        scores = scores.to(torch.promote_types(q.dtype, torch.float32)).view(b, h, n, s) * scale
        seen = mask if mask is None else mask[..., start : start + n, :].to(scores.dtype)
        if causal:
            seen = torch.ones(n, s, dtype=torch.bool, device=q.device).tril(start)
        scores = cap_and_mask(scores, seen, softcap)
        lse = scores.logsumexp(-1, keepdim=True)
        weights = (scores - lse).exp_().to(q.dtype)
        outs.append((weights.view(b, g, h // g * n, s) @ v).view(b, h, n, -1))
        lses.append(lse)
    return torch.cat(outs, dim=-2), torch.cat(lses, dim=-2)


def attend_far(
    q: Tensor,
    decode: Decode,
    *,
    keys: int,
    size: int,
    seen_by_all: int,
    first: int,
    mask: Mask | None,
    scale: float,
    softcap: float | None,
) -> Parts:
    """Attention over keys that are decoded in chunks.

    Query i sees key n if `n < seen_by_all` or `n <= i + first`, and the mask shows it.

    Args:
        q: [B, H, T, K].
        decode: gives keys and values of a chunk.
        keys: their number; the last is seen by the last query at most.
        size: of the values, V.
        seen_by_all: keys that every query sees.
        first: the last of the keys that the first query sees; negative if it sees none.
        mask: None hides nothing more.
    """
    parts, t = Parts(q, size), q.shape[-2]
    options = {"scale": scale, "softcap": softcap}

    def meet(start: int, stop: int, low: int, high: int, k: Tensor, v: Tensor, triangle: bool) -> None:
        """Queries start .. stop - 1 and keys low .. high - 1; a mask is made of no more queries than keys at a time."""
        if start >= stop:
            return
        step = stop - start if mask is None else CHUNK
        for i in range(start, stop, step):
            end = min(i + step, stop)
            seen = None if mask is None else mask(i, end, low, high)
            if seen is not None and triangle:
                inside = torch.ones(end - i, high - low, dtype=torch.bool, device=q.device).tril(i - start)
                seen = both_masks(seen, inside)
            causal = triangle and seen is None
            parts.join(i, *attend_with_lse(q[:, :, i:end], k, v, mask=seen, causal=causal, **options))

    low = 0
    while low < keys:
        border = seen_by_all if low < seen_by_all else keys
        high = min(low + CHUNK, border, keys)
        k, v = decode(low, high)
        if low < seen_by_all:
            meet(0, t, low, high, k, v, triangle=False)
        else:
            inner = high - first  # the first query that sees the whole chunk is `inner - 1`, the end of the triangle
            meet(low - first, inner, low, high, k, v, triangle=True)
            meet(inner, t, low, high, k, v, triangle=False)
        low = high
    return parts


def attend_near(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    window: int,
    key_first: int,
    query_first: int,
    mask: Mask | None,
    scale: float,
    softcap: float | None,
) -> Parts:
    """Attention over exact keys: query m sees `m - window < n <= m`, where the mask shows it.

    Args:
        q: [B, H, T, D]; keys, values: [B, G, N, D].
        key_first, query_first: columns of the first key, and of the first query; negative columns are empty slots.
    """
    parts = Parts(q, values.shape[-1])
    for start in range(0, q.shape[-2], QUERY_BLOCK):
        rows = q[:, :, start : start + QUERY_BLOCK]
        stop = start + rows.shape[-2]
        low, high = max(query_first + start - window + 1, key_first, 0), query_first + stop
        m = torch.arange(query_first + start, high, device=q.device).unsqueeze(-1)
        n = torch.arange(low, high, device=q.device)
        inside = (n > m - window) & (n <= m)
        seen = None if mask is None else mask(start, stop, low, high)
        seen = inside[None, None] if seen is None else both_masks(seen, inside)
        k, v = (x[:, :, low - key_first : high - key_first] for x in (keys, values))
        out, lse = attend_with_lse(rows, k, v, mask=seen, causal=False, scale=scale, softcap=softcap)
        parts.join(start, out, lse)
    return parts


def only_causal(mask: Tensor, query_first: int) -> bool:
    """Whether a boolean mask [B or 1, 1, T, S] hides from query i exactly the keys behind `query_first + i`."""
    t, s = mask.shape[-2:]
    m = torch.arange(query_first, query_first + t, device=mask.device).unsqueeze(-1)
    return bool((mask == (torch.arange(s, device=mask.device) <= m)).all())
