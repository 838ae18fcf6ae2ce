"""Pages of a paged cache: where tokens lie in them, and what of a token lies beside what.

A cache is a view [blocks, P, N, C] of N tokens a block: of the exact window, keys before rotation and values side by
side (P = G, C = 2 D), or of latents. Then P counts the latents that most KV heads share, and each of them has beside it
the layer's other latents of the same heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache.layout import Latent, Layout


def page_shape(layout: Layout) -> tuple[int, int]:
    """P and C of pages of latents."""
    return _heads(layout), sum(_beside(layout, latent) * latent.rank for latent in layout.latents)


def to_page(layout: Layout, latents: tuple[Tensor, ...]) -> Tensor:
    """Latents [G/N, T, R] as they lie in pages, [T, P, C]."""
    return torch.cat([z.transpose(0, 1).unflatten(1, (_heads(layout), -1)).flatten(2) for z in latents], dim=-1)


def from_page(layout: Layout, held: Tensor) -> tuple[Tensor, ...]:
    """Tokens out of pages, [B, P, S, C], as latents [B, G/N, S, R]."""
    beside = [_beside(layout, latent) for latent in layout.latents]
    parts = held.split([count * latent.rank for count, latent in zip(beside, layout.latents, strict=True)], dim=-1)
    return tuple(
        part if count == 1 else part.unflatten(-1, (count, -1)).transpose(2, 3).flatten(1, 2)
        for part, count in zip(parts, beside, strict=True)
    )


def _heads(layout: Layout) -> int:
    return layout.kv_heads // layout.together


def _beside(layout: Layout, latent: Latent) -> int:
    """How many of a latent lie beside each other in a page."""
    return layout.together // latent.heads


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
        """Tokens of a block, N."""
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
