"""What the queries of a pass may look at, as a cache shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

# Keys and values [B, G, n, D] to what is stored of them, one tensor a latent: [B, G/N, n, width].
Encode = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


class Far(NamedTuple):
    """All tokens that some current query sees from outside its window."""

    rows: tuple[Tensor, ...]  # as stored, one tensor a latent: [B, G/N, F, R], or packed [B, G/N, F, bytes]
    columns: Tensor | None = None  # [B, heads, F], the mask's column of each row; None: row n is column n


class Near(NamedTuple):
    """The last tokens, exact and before rotation, the current ones included."""

    keys: Tensor  # [B, G, N, D]
    values: Tensor  # [B, G, N, D]
    first: int | Tensor  # mask column of the first of them; negative where a static window is not full yet


class Sight(NamedTuple):
    """What the queries of a pass may look at."""

    far: Far
    near: Near | None  # None without a window: all tokens are far
    query: int | Tensor  # mask column of the first current token
    columns: int  # of the mask
    positions: Tensor | None  # [B, columns] or [B, columns, rows]; None where the model has none
