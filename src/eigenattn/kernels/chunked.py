"""Attention of many queries, a chunk of keys at a time: parts are joined by their log-sum-exp.

Keys are decoded a chunk at a time and once a pass, and all queries meet a chunk before the next is decoded. Most
queries see all of a chunk or nothing of it, and the rest see a triangle, which fused kernels take without a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..cache.sight import Near
from .prompt import join_natively, joins_natively
from .reference import both_masks, cap_and_mask, score_dtype
from .sdpa import as_taken, widen
from .selection import HALF

# Keys decoded at a time (chosen): texts no longer than this are attended to at once.
CHUNK = 2048
# Queries whose scores are written out at a time, where no fused kernel gives the log-sum-exp, and that meet exact keys
# under a mask of the model's own (chosen).
QUERY_BLOCK = 256
# Queries, times what the window takes, that meet exact keys at a time without one: where there are more, of four keys
# that a query meets it sees fewer; where there are fewer, the products are small (measured: 32 to 256).
BAND = 64

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
        b, h, t, _ = q.shape
        dtype = score_dtype(q.dtype)
        self.out = q.new_zeros(b, t, h, size, dtype=dtype).transpose(1, 2)  # as the output projection has it
        self.lse = q.new_full((b, h, t, 1), float("-inf"), dtype=dtype)

    def put(self, start: int, out: Tensor, lse: Tensor) -> None:
        """Of queries start .. the first part: out [B, H, n, V] and lse [B, H, n, 1]."""
        stop = start + out.shape[-2]
        self.out[:, :, start:stop], self.lse[:, :, start:stop] = out, lse

    def join(self, start: int, out: Tensor, lse: Tensor) -> None:
        """Add what queries start .. found elsewhere: out [B, H, n, V] and lse [B, H, n, 1], which is finite."""
        stop = start + out.shape[-2]
        held, before = self.out[:, :, start:stop], self.lse[:, :, start:stop]
        held.lerp_(out.to(held.dtype), torch.sigmoid(lse - before))
        torch.logaddexp(before, lse.to(before.dtype), out=before)

    def with_zeros(self, least: float) -> Tensor:
        """The output, zeros where the log-sum-exp is below this: of padding in front, which sees nothing."""
        return self.out.masked_fill(self.lse < least, 0.0)


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
    k, v = k.to(q.dtype), v.to(q.dtype)  # under autocast they may differ
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, torch.finfo(q.dtype).min)
    if softcap is None and q.device.type == "cpu":
        # SDPA itself keeps the log-sum-exp to itself.
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(widen(x, size) for x in (q, k, v)), is_causal=causal, attn_mask=as_taken(mask, q), scale=scale
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
        scores = scores.to(score_dtype(q.dtype)).view(b, h, n, s) * scale
        seen = mask if mask is None else mask[..., start : start + n, :].to(scores.dtype)
        if causal:
            seen = torch.ones(n, s, dtype=torch.bool, device=q.device).tril(start)
        scores = cap_and_mask(scores, seen, softcap)
        lse = scores.logsumexp(-1, keepdim=True)
        weights = (scores - lse).exp_().to(q.dtype)
        outs.append((weights.view(b, g, h // g * n, s) @ v).view(b, h, n, -1))
        lses.append(lse)
    return torch.cat(outs, dim=-2), torch.cat(lses, dim=-2)


class Reach(NamedTuple):
    """What queries see, where that can be said by row and by distance.

    Args:
        hidden: columns in front of each row that its queries do not see, [B] in int64; None for none.
        sees: of the others a query sees so many last ones; None for all.
    """

    hidden: Tensor | None = None
    sees: int | None = None

    @property
    def is_all(self) -> bool:
        """Whether nothing is out of it."""
        return self.hidden is None and self.sees is None

    def behind(self, window: int) -> Reach:
        """What is left of it of columns from which queries are so many on."""
        return self if self.sees is None else self._replace(sees=max(self.sees - window, 0))


class Scoring(NamedTuple):
    """How scores are made.

    Args:
        mask: hides more than causality and the window do; None nothing.
        scale: multiplies products of queries and keys.
        softcap: bound of a soft cap, if any.
        reach: what the mask comes to, if it can be said so.
    """

    mask: Mask | None
    scale: float
    softcap: float | None
    reach: Reach | None = None

    def join(
        self,
        parts: Parts,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        column: int,
        first: int,
        window: int | None = None,
        by_all: int = 0,
    ) -> bool:
        """Join what queries find among keys from a column on to parts, as `join_natively` has it; whether it does that.

        Args:
            first, window, by_all: which columns query i sees: of those up to `first + i` the last `window`, and those
                in front of `by_all`.
        """
        plain = self.softcap is None and (self.mask is None or self.reach is not None)
        if not (plain and joins_natively(q, k, v)):
            return False
        hidden, sees = self.reach or Reach()
        window = min((each for each in (window, sees) if each is not None), default=None)
        sight = {"first": first - column, "window": window, "seen_by_all": by_all - column}
        join_natively(q, k, v, parts.out, parts.lse, hidden=hidden, column=column, scale=self.scale, **sight)
        return True

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """`attend_with_lse` under a mask of these queries and keys."""
        return attend_with_lse(q, k, v, mask=seen, causal=causal, scale=self.scale, softcap=self.softcap)


def attend(
    q: Tensor,
    q_far: Tensor,
    decode: Decode,
    near: Near | None,
    scoring: Scoring,
    *,
    size: int,
    tokens: int,
    window: int,
    query_first: int,
) -> Parts:
    """Attention over exact keys and far ones, in which both are as `eigenattn.cache.sight` has them.

    Args:
        q: queries as they meet exact keys [B, H, T, D]; q_far: and those that `decode` gives [B, H, T, K].
        near: exact keys, rotated, and values; None without a window.
        size: of far values, V.
        tokens: far keys that there are.
        query_first: column of the first query.
    """
    first, reach = 0 if near is None else int(near.first), scoring.reach
    parts = Parts(q, size) if near is None else attend_near(q, near, scoring, window, query_first)
    attend_far(
        parts,
        q_far,
        decode,
        scoring if reach is None else scoring._replace(reach=reach.behind(window)),
        keys=min(max(query_first + q.shape[-2] - window, first, 0), tokens),
        seen_by_all=max(query_first - window + 1, first, 0),
        first=query_first - window,
    )
    return parts


def attend_far(
    parts: Parts,
    q: Tensor,
    decode: Decode,
    scoring: Scoring,
    *,
    keys: int,
    seen_by_all: int,
    first: int,
) -> None:
    """Attention over keys that are decoded in chunks, joined to the parts that there are.

    Query i sees key n if `n < seen_by_all` or `n <= i + first`, and the mask shows it.

    Args:
        q: [B, H, T, K].
        decode: gives keys and values of a chunk.
        keys: their number; the last is seen by the last query at most.
        seen_by_all: keys that every query sees.
        first: the last of the keys that the first query sees; negative if it sees none.
    """
    t, mask = q.shape[-2], scoring.mask

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
            parts.join(i, *scoring.attend(q[:, :, i:end], k, v, seen, causal=triangle and seen is None))

    low = 0
    while low < keys:
        border = seen_by_all if low < seen_by_all else keys
        high = min(low + CHUNK, border, keys)
        k, v = decode(low, high)
        joined = scoring.join(parts, q, k, v, column=low, first=first, by_all=seen_by_all)
        if not joined and low < seen_by_all:
            meet(0, t, low, high, k, v, triangle=False)
        elif not joined:
            inner = high - first  # the first query that sees the whole chunk is `inner - 1`, the end of the triangle
            meet(low - first, inner, low, high, k, v, triangle=True)
            meet(inner, t, low, high, k, v, triangle=False)
        low = high


def attend_near(q: Tensor, near: Near, scoring: Scoring, window: int, query_first: int) -> Parts:
    """Attention over exact keys: query m sees `m - window < n <= m`, where the mask shows it.

    Args:
        q: [B, H, T, D].
        near: keys and values [B, G, N, D]; negative columns are empty slots.
        query_first: column of the first query.
    """
    keys, values, key_first, mask = near.keys, near.values, int(near.first), scoring.mask
    parts, t = Parts(q, values.shape[-1]), q.shape[-2]
    empty = max(-key_first, 0)
    filled = keys[:, :, empty:], values[:, :, empty:]
    if scoring.join(parts, q, *filled, column=key_first + empty, first=query_first, window=window):
        return parts
    size = -(-window // BAND) * BAND  # the second block's queries see no key in front of the first query's
    whole = t // size - 1 if mask is None else 0
    if whole > 0:
        _attend_band(parts, q, keys, values, scoring, size, whole, query_first - key_first, window)
    step = QUERY_BLOCK if mask is not None else size
    for start in range(0, t, step):
        if size <= start < size * (whole + 1):
            continue
        rows = q[:, :, start : start + step]
        stop = start + rows.shape[-2]
        low, high = max(query_first + start - window + 1, key_first, 0), query_first + stop
        m = torch.arange(query_first + start, high, device=q.device).unsqueeze(-1)
        n = torch.arange(low, high, device=q.device)
        inside = (n > m - window) & (n <= m)
        seen = None if mask is None else mask(start, stop, low, high)
        seen = inside[None, None] if seen is None else both_masks(seen, inside)
        k, v = (x[:, :, low - key_first : high - key_first] for x in (keys, values))
        parts.put(start, *scoring.attend(rows, k, v, seen))
    return parts


def _attend_band(
    parts: Parts,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scoring: Scoring,
    size: int,
    blocks: int,
    query_first: int,
    window: int,
) -> None:
    """Blocks of `size` queries, from the second of them on, side by side: each sees the same of keys that overlap.

    Args:
        query_first: which key is the first query's own.
    """
    span, stop = size + window - 1, (blocks + 1) * size
    first = query_first + size - window + 1  # which key is the first of the second block's
    i, n = (torch.arange(end, device=q.device) for end in (size, span))
    inside = ((n >= i.unsqueeze(-1)) & (n < i.unsqueeze(-1) + window))[None, None]
    for row in range(len(q)):
        queries = q[row, :, size:stop].unflatten(1, (blocks, size)).transpose(0, 1)  # [blocks, H, size, D]
        overlapping = (
            x[row, :, first : query_first + stop].unfold(1, span, size).permute(1, 0, 3, 2) for x in (keys, values)
        )  # [blocks, G, span, *]
        found = scoring.attend(queries, *overlapping, seen=inside)
        for whole, part in zip((parts.out, parts.lse), found, strict=True):
            whole[row, :, size:stop].unflatten(1, (blocks, size)).transpose(0, 1).copy_(part)


def reach_of(mask: Tensor, query_first: int, sees: int | None) -> Reach | None:
    """What a boolean mask [B or 1, 1, T, S] comes to; None if it is not that of texts with padding in front.

    Args:
        query_first: column of the first query.
        sees: what a query sees at most, from itself on.
    """
    t, s = mask.shape[-2:]
    m = torch.arange(query_first, query_first + t, device=mask.device).unsqueeze(-1)
    n = torch.arange(s, device=mask.device)
    shown = n <= m if sees is None else (n <= m) & (n > m - sees)
    if bool((mask == shown).all()):
        return Reach(None, sees)
    hidden = mask[:, 0].any(-2).to(torch.uint8).argmax(-1)  # [B]
    if bool((mask == shown & (n >= hidden.view(-1, 1, 1, 1))).all()):
        return Reach(hidden, sees)
    return None
