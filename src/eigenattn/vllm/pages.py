"""Pages of a paged cache: what of a token lies where in them.

A page of latents is bytes: latent by latent of the layout, head by head, token by token. A page of the exact window has
keys before rotation and values side by side, head by head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache.layout import Layout
from ..kernels.decoding import out_of_pages

# Of what positions are cached in.
POSITION = torch.int32


@dataclass(frozen=True)
class Pages:
    """A cache and whose tokens lie where.

    Args:
        rows: views of the cache, [pages, heads, tokens of a page, size] each.
        table: pages of each row in order, int32 [B, n]; entries past a row's length are never read.
    """

    rows: tuple[Tensor, ...]
    table: Tensor

    def at(self, columns: Tensor) -> tuple[Tensor, ...]:
        """Tokens [n] of the only row, or of each row [B, n]: [B, heads, n, size] each."""
        columns = columns.unsqueeze(0) if columns.dim() == 1 else columns
        return tuple(out_of_pages(row, self.table, columns) for row in self.rows)


@dataclass(frozen=True)
class Held:
    """What a layer's rows hold.

    Args:
        far: latents.
        near: the exact window, if there is one.
        positions: int32 [pages, 1, N, rows], if tokens have others than their places in the row.
    """

    far: Pages
    near: Pages | None = None
    positions: Pages | None = None


def latents_in(cache: Tensor, layout: Layout, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Views of a cache of bytes [pages, 1, N, bytes]: of each latent [pages, G/N, N, R], or [pages, G/N, N, bytes].

    Args:
        dtype: of latents that are not coded.
    """
    tokens, flat = cache.shape[2], cache.flatten(1)
    sizes = [layout.count(latent) * latent.bytes(dtype.itemsize) for latent in layout.latents]
    parts = flat.split([tokens * size for size in sizes], dim=1)
    return tuple(
        (part if latent.widths is not None else part.view(dtype)).unflatten(1, (layout.count(latent), tokens, -1))
        for latent, part in zip(layout.latents, parts, strict=True)
    )


def window_in(cache: Tensor) -> tuple[Tensor, ...]:
    """Views of a cache of the exact window [pages, G, N, 2 D]: keys and values, [pages, G, N, D] each."""
    return cache.chunk(2, dim=-1)


def positions_in(cache: Tensor) -> tuple[Tensor]:
    """The view of a cache of positions [pages, 1, N, bytes]: int32 [pages, 1, N, rows]."""
    return (cache.view(POSITION),)


def write(rows: tuple[Tensor, ...], slots: Tensor, tokens: tuple[Tensor, ...]) -> None:
    """Put tokens [1, heads, T, size] into views of a cache at slots [T], int64, `page * N + place`."""
    for held, new in zip(rows, tokens, strict=True):
        held[slots // held.shape[2], :, slots % held.shape[2]] = new[0].transpose(0, 1)
