"""Attention over pages of latents: plain PyTorch, which knows nothing of vLLM.

A cache is a view [blocks, P, N, C] of N tokens a block: of the exact window, keys before rotation and values side by
side (P = G, C = 2 D), or of latents. Then P counts the latents of values, and beside each stand those of the same KV
heads' keys (C = M R_k + R_v; M = 1 but where heads share values and not keys). Keys and values that share a latent have
one (C = R_k). Rows of a batch are decoded together by `eigenattn.kernels.decoding`, and prompts attend one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import sdpa
from ..kernels.decoding import Near, Rotary, Side, decode
from ..kernels.decoding.reference import rotate_to
from ..kernels.reference import add_mask
from ..kernels.windowed import QUERY_BLOCK
from ..kernels.windowed import attend as attend_with_window


@dataclass(frozen=True)
class Head:
    """How a layer attends.

    Args:
        keys, values: how latents become vectors; values have no decoder where it is folded into the output projection.
        scale: multiplies the scores.
        window: exact tokens, W.
        rotary: rotates queries and keys, or None.
        slopes: ALiBi's slope of each query head [H] in fp32, or None.
        size_k: elements of a page's keys, which its values follow.
        in_page: how many vectors of keys, and of values, they are: M and 1, or more at full rank.
    """

    keys: Side
    values: Side
    size_k: int
    scale: float
    window: int = 0
    rotary: Rotary | None = None
    slopes: Tensor | None = None
    in_page: tuple[int, int] = (1, 1)

    def rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        """Vectors [..., n, D] at positions [..., n]; untouched without rotary positions."""
        return x if self.rotary is None else rotate_to(x.float(), positions, self.rotary).to(x.dtype)

    def split(self, held: Tensor) -> tuple[Tensor, Tensor]:
        """Pages [b, P, S, C] as latents of keys [b, P * M, S, R_k] and of values [b, P, S, R_v]."""
        keys, values = (
            part if count == 1 else part.unflatten(-1, (count, -1)).transpose(2, 3).flatten(1, 2)
            for part, count in zip((held[..., : self.size_k], held[..., self.size_k :]), self.in_page, strict=True)
        )
        return keys, values if values.shape[-1] else keys


@dataclass(frozen=True)
class Pages:
    """A cache and whose tokens lie where.

    Args:
        cache: [blocks, P, N, C].
        table: blocks of each row in order, int64 [B, n]; entries past a row's length are never read.
    """

    cache: Tensor
    table: Tensor

    @property
    def block_size(self) -> int:
        return self.cache.shape[2]

    def first(self, rows: Tensor, columns: int) -> Tensor:
        """At least the first `columns` tokens of some rows, [b, P, S, C]."""
        used = max(-(-columns // self.block_size), 1)
        found = self.cache[self.table[rows, :used]]  # [b, used, P, N, C]
        return found.transpose(1, 2).flatten(2, 3)

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Tokens [b, n] of some rows, [b, P, n, C]."""
        blocks = self.table[rows].gather(1, columns // self.block_size)
        return self.cache.transpose(1, 2)[blocks, columns % self.block_size].transpose(1, 2)


def write(cache: Tensor, slots: Tensor, tokens: Tensor) -> None:
    """Put tokens [T, P, C] into a cache [blocks, P, N, C] at slots [T], int64, `block * N + place`."""
    size = cache.shape[2]
    cache.transpose(1, 2)[slots // size, slots % size] = tokens


def decode_rows(
    head: Head, q: Tensor, rows: Tensor, lengths: Tensor, longest: int, far: Pages, near: Pages | None
) -> Tensor:
    """One query a row.

    Args:
        q: queries before rotation [b, H, D or R_k].
        rows: which rows of the tables they are, int64 [b].
        lengths: tokens of each row, its query's included, int32 [b].
        longest: at least the largest of them.
        far, near: latents, and the exact window if there is one.

    Returns:
        [b, H, D or R_v].
    """
    q = head.rotated(q, (lengths - 1).unsqueeze(-1))
    window = None
    if near is not None:
        column = lengths - head.window
        columns = column.unsqueeze(-1) + torch.arange(head.window, device=q.device)  # [b, W]
        held = near.at(rows, columns.clamp_min(0).long())
        k, v = held.chunk(2, dim=-1)
        window = Near(k, v, column.to(torch.int32), lengths)
    seen = (lengths - head.window).clamp_min(0) if near is not None else lengths
    z_k, z_v = head.split(far.first(rows, max(longest - head.window, 0)))
    return decode(
        q,
        z_k,
        z_v,
        keys=head.keys,
        values=head.values,
        scale=head.scale,
        length=seen.to(torch.int32),
        rotary=head.rotary,
        slopes=head.slopes,
        near=window,
    )


def attend_prompt(head: Head, q: Tensor, row: Tensor, length: int, far: Pages, near: Pages | None) -> Tensor:
    """The last T tokens of one row.

    Args:
        q: their queries before rotation [T, H, D or R_k].
        row: which row of the tables it is, int64 [1].
        length: its tokens, the queries' included.

    Returns:
        [T, H, D or R_v].
    """
    t = q.shape[0]
    first = length - t
    columns = torch.arange(length, device=q.device)
    q = head.rotated(q.transpose(0, 1), columns[first:]).unsqueeze(0)  # [1, H, T, D]
    seen = max(length - head.window, 0)
    z_k, z_v = head.split(far.first(row, seen)[:, :, :seen])
    k = head.rotated(_vectors(z_k, head.keys), columns[:seen])
    bias = None if head.slopes is None else head.slopes.view(1, -1, 1, 1) * (columns - length)  # [1, H, 1, S]
    if near is None:
        return _in_blocks(q, k, _vectors(z_v, head.values), first, bias, head.scale)[0].transpose(0, 1)
    nearest = max(first - head.window + 1, 0)
    near_k, near_v = near.at(row, columns[nearest:].unsqueeze(0)).chunk(2, dim=-1)
    out, _ = attend_with_window(
        sdpa.attend,
        q,
        k,
        _vectors(z_v, head.values),
        head.rotated(near_k, columns[nearest:]),
        near_v,
        near_first=nearest,
        query_first=first,
        window=head.window,
        mask=None if bias is None else bias.expand(1, -1, t, -1),
        columns=length,
        scale=head.scale,
    )
    return out[0].transpose(0, 1)


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, first: int, bias: Tensor | None, scale: float) -> Tensor:
    """Causal attention of queries [1, H, T, D] that begin at column `first`, in blocks that bound the masks' memory."""
    t, outputs = q.shape[2], []
    columns = torch.arange(k.shape[2], device=q.device)
    for start in range(0, t, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, t)
        last = first + stop
        mask = (columns[:last] <= columns[first + start : last].unsqueeze(-1))[None, None]  # [1, 1, block, last]
        if bias is not None:
            mask = add_mask(bias[..., :last], mask)
        out, _ = sdpa.attend(q[:, :, start:stop], k[:, :, :last], v[:, :, :last], mask=mask, scale=scale)
        outputs.append(out)
    return torch.cat(outputs, dim=2)


def _vectors(latents: Tensor, side: Side) -> Tensor:
    """Latents [b, G or fewer, S, R] decoded, [b, G, S, D]."""
    x = latents
    if side.decoder is not None:
        x = latents.repeat_interleave(len(side.decoder) // latents.shape[1], dim=1) @ side.decoder
    return x if side.mean is None else x + side.mean.unsqueeze(1)
