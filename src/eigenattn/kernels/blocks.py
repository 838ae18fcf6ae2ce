"""Attention whose nearest keys are exact and whose farther ones are decoded latents, a block of queries at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cache.sight import Near
from .reference import both_masks

# Queries attended at a time (chosen): the exact keys in sight grow with it, and the number of calls falls.
QUERY_BLOCK = 256


class FarKeys(NamedTuple):
    """The first tokens, decoded (and rotated)."""

    keys: Tensor  # [B, G, F, D]
    values: Tensor  # [B, G, F, D]
    columns: Tensor | None = None  # [B, H, F], of each head's keys; None: key n is column n


def take_columns(x: Tensor, columns: Tensor) -> Tensor:
    """A mask, or attention weights, [B or 1, H or 1, T, S], at columns [B, H, F] of each head: [B, H, T, F]."""
    return torch.take_along_dim(x, columns.unsqueeze(-2), dim=-1)


def split_masks(queries: Tensor, far: int | Tensor, near: Tensor, window: int, mask: Tensor | None) -> Tensor:
    """Who sees whom, over far keys and near keys side by side.

    Query m sees key n exactly if `m - window < n`, and through its latent if `n <= m - window` or if no exact form of
    it is held. It sees none behind itself, unless there is a mask that shows some.

    Args:
        queries: columns of the queries [T].
        far: number of far keys, F, columns 0 .. F - 1; or the columns of each head's, [B, H, F].
        near: columns of the near keys [N]; negative ones are empty slots.
        mask: the model's own mask over columns, [B or 1, H or 1, T, columns], boolean (True is visible) or additive, or
            None.

    Returns:
        [B or 1, H or 1, T, F + N], boolean without a mask or with a boolean one, else additive.
    """
    m = queries.unsqueeze(-1)  # [T, 1]
    by_head = isinstance(far, Tensor)
    n_far = far.unsqueeze(-2) if by_head else torch.arange(far, device=queries.device)  # [B, H, 1, F] or [F]
    sees_far = (n_far <= m - window) | (n_far < near[:1]) & (n_far <= m)
    sees_near = (near > m - window) & (near >= 0)
    if mask is None:
        sees_near &= near <= m
    if by_head:
        sees = torch.cat([sees_far, sees_near.expand(*sees_far.shape[:2], -1, -1)], dim=-1)
    else:
        sees = torch.cat([sees_far, sees_near], dim=-1)[None, None]
    if mask is None:
        return sees
    if by_head:
        chosen_near = mask.index_select(-1, near.clamp_min(0)).expand(*far.shape[:2], -1, -1)
        chosen = torch.cat([take_columns(mask, far), chosen_near], dim=-1)
    else:
        chosen = mask.index_select(-1, torch.cat([n_far, near.clamp_min(0)]))
    return both_masks(chosen, sees)


def by_column(weights: Tensor, far: int | Tensor, near: Tensor, columns: int) -> Tensor:
    """Attention weights over far and near keys side by side [B, H, T, F + N], as weights of tokens [B, H, T, columns].

    Args:
        far: as in `split_masks`; tokens of which there is no key have no weight.
        near: columns of the near keys [N]; negative ones are empty slots, whose weight is zero.
    """
    found = weights.new_zeros(*weights.shape[:-1], columns)
    if isinstance(far, Tensor):
        number = far.shape[-1]
        places = far.unsqueeze(-2).expand(-1, -1, weights.shape[-2], -1)
        found = found.scatter(-1, places, weights[..., :number])
    else:
        number = far
        found[..., :number] = weights[..., :number]
    return found.index_add(-1, near.clamp_min(0), weights[..., number:])


def attend(
    backend: Callable[..., tuple[Tensor, Tensor | None]],
    q: Tensor,
    far: FarKeys,
    near: Near,
    *,
    query_first: int | Tensor,
    window: int,
    mask: Tensor | None,
    columns: int,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention over decoded far keys and exact near ones.

    Args:
        backend: attention over one list of keys (`eigenattn.kernels.BACKENDS`).
        q: queries [B, H, T, D].
        near: the exact keys, rotated.
        query_first: column of the first query; a tensor with a static cache.
        window: W.
        mask: over columns, see `split_masks`.
        columns: number of columns.
        options: passed on to the backend (scale, dropout, softcap).

    Returns:
        The output [B, H, T, D] and, if the backend gives them, the attention weights [B, H, T, columns].
    """
    t, device = q.shape[-2], q.device
    count = far.keys.shape[-2] if far.columns is None else far.columns
    queries = torch.arange(t, device=device) + query_first
    places = torch.arange(near.keys.shape[-2], device=device) + near.first
    if t <= QUERY_BLOCK:
        seen = split_masks(queries, count, places, window, mask)
        keys, values = torch.cat([far.keys, near.keys], -2), torch.cat([far.values, near.values], -2)
        out, weights = backend(q, keys, values, mask=seen, **options)
        return out, None if weights is None else by_column(weights, count, places, columns)
    first, near_first = int(query_first), int(near.first)
    forwards = not torch.compiler.is_compiling() and not shows_future(mask, first)  # a graph cannot hang on values
    outputs, spread = [], []
    for start in range(0, t, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, t)
        # The block's queries are columns first + start ..; keys that none of them sees are left out.
        block_count, rows = count, slice(None)
        if far.columns is None:
            block_count = min(max(first + stop - window, near_first, 0), far.keys.shape[-2])
            rows = slice(block_count)
        exact = slice(max(first + start - window + 1 - near_first, 0), first + stop - near_first if forwards else None)
        part = None if mask is None else mask[..., start:stop, :]
        seen = split_masks(queries[start:stop], block_count, places[exact], window, part)
        keys = torch.cat([far.keys[:, :, rows], near.keys[:, :, exact]], dim=-2)
        values = torch.cat([far.values[:, :, rows], near.values[:, :, exact]], dim=-2)
        out, weights = backend(q[:, :, start:stop], keys, values, mask=seen, **options)
        outputs.append(out)
        if weights is not None:
            spread.append(by_column(weights, block_count, places[exact], columns))
    return torch.cat(outputs, dim=-2), torch.cat(spread, dim=-2) if spread else None


def shows_future(mask: Tensor | None, query_first: int) -> bool:
    """Whether a mask [B or 1, H or 1, T, S] shows some query i a key behind `query_first + i`."""
    if mask is None:
        return False
    t, s = mask.shape[-2:]
    m = torch.arange(query_first, query_first + t, device=mask.device).unsqueeze(-1)
    shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2  # a bias may have been added
    return bool((shown & (torch.arange(s, device=mask.device) > m)).any())
