"""Attention whose nearest keys are exact and whose farther ones are decoded latents, under one softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .reference import both_masks, cap_and_mask

# Queries attended at a time in prefill (chosen): the exact keys in sight grow with it, and the number of calls falls.
QUERY_BLOCK = 256


def take_columns(x: Tensor, columns: Tensor) -> Tensor:
    """A mask, or attention weights, [B or 1, H or 1, T, S], at columns [B, H, F] of each head: [B, H, T, F]."""
    return torch.take_along_dim(x, columns.unsqueeze(-2), dim=-1)


def split_masks(
    queries: Tensor, far: int | Tensor, near: Tensor, window: int, mask: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Who sees whom, over far keys and near keys side by side.

    Query m sees key n exactly if `m - window < n <= m`, and through its latent if `n <= m - window` or if no exact form
    of it is held.

    Args:
        queries: columns of the queries [T].
        far: number of far keys, F, columns 0 .. F - 1; or the columns of each head's, [B, H, F].
        near: columns of the near keys [N]; negative ones are empty slots.
        mask: the model's own mask over columns, [B or 1, H or 1, T, columns], boolean (True is visible) or additive, or
            None.
        dtype: of the scores.

    Returns:
        [B or 1, H or 1, T, F + N], boolean without a mask or with a boolean one, else additive.
    """
    m = queries.unsqueeze(-1)  # [T, 1]
    by_head = isinstance(far, Tensor)
    n_far = far.unsqueeze(-2) if by_head else torch.arange(far, device=queries.device)  # [B, H, 1, F] or [F]
    sees_far = (n_far <= m - window) | (n_far < near[:1]) & (n_far <= m)
    sees_near = (near > m - window) & (near <= m) & (near >= 0)
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
    return both_masks(chosen if chosen.dtype == torch.bool else chosen.to(dtype), sees)


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
    far_keys: Tensor,
    far_values: Tensor,
    near_keys: Tensor,
    near_values: Tensor,
    *,
    near_first: int | Tensor,
    query_first: int | Tensor,
    window: int,
    mask: Tensor | None,
    columns: int,
    far_columns: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention over decoded far keys and exact near ones, in blocks of queries.

    Args:
        backend: attention over one list of keys (`eigenattn.kernels.BACKENDS`).
        q: queries [B, H, T, D].
        far_keys, far_values: [B, G, F, D], the first tokens, decoded (and rotated).
        near_keys, near_values: [B, G, N, D], the last tokens.
        near_first, query_first: columns of the first near key and of the first query; tensors with a static cache.
        window: W.
        mask: over columns, see `split_masks`.
        columns: number of columns.
        far_columns: columns of each head's far keys [B, H, F]; None: far key n is column n.
        options: passed on to the backend (scale, dropout, softcap).

    Returns:
        The output [B, H, T, D] and, if the backend gives them, the attention weights [B, H, T, columns].
    """
    t, device = q.shape[-2], q.device
    far = far_keys.shape[-2] if far_columns is None else far_columns
    queries = torch.arange(t, device=device) + query_first
    near = torch.arange(near_keys.shape[-2], device=device) + near_first
    if t <= QUERY_BLOCK:
        seen = split_masks(queries, far, near, window, mask, q.dtype)
        keys, values = torch.cat([far_keys, near_keys], -2), torch.cat([far_values, near_values], -2)
        out, weights = backend(q, keys, values, mask=seen, **options)
        return out, None if weights is None else by_column(weights, far, near, columns)
    query_first, near_first = int(query_first), int(near_first)
    outputs, spread = [], []
    for start in range(0, t, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, t)
        # The block's queries are columns query_first + start ..; keys that none of them sees are left out.
        block_far, rows = far, slice(None)
        if far_columns is None:
            block_far = min(max(query_first + stop - window, near_first, 0), far)
            rows = slice(block_far)
        near_from = max(query_first + start - window + 1 - near_first, 0)
        near_to = query_first + stop - near_first
        seen = split_masks(
            queries[start:stop],
            block_far,
            near[near_from:near_to],
            window,
            None if mask is None else mask[..., start:stop, :],
            q.dtype,
        )
        keys = torch.cat([far_keys[:, :, rows], near_keys[:, :, near_from:near_to]], dim=-2)
        values = torch.cat([far_values[:, :, rows], near_values[:, :, near_from:near_to]], dim=-2)
        out, weights = backend(q[:, :, start:stop], keys, values, mask=seen, **options)
        outputs.append(out)
        if weights is not None:
            spread.append(by_column(weights, block_far, near[near_from:near_to], columns))
    return torch.cat(outputs, dim=-2), torch.cat(spread, dim=-2) if spread else None


def attend_one(
    q: Tensor,
    q_far: Tensor,
    far_keys: Tensor,
    far_values: Tensor,
    near_keys: Tensor,
    near_values: Tensor,
    *,
    far_offset: Tensor | None,
    seen: Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One query a row: values are summed as latents, and decoded once by the caller.

    Args:
        q: query against near keys [B, H, 1, D].
        q_far: query against far keys [B, H, 1, K]: the same, or one taken to the small space.
        far_keys: [B, G or fewer, F, K]; far_values: [B, G or fewer, F, V]; fewer are shared by neighbouring heads.
        near_keys, near_values: [B, G, N, D].
        far_offset: [B, H, 1, 1], added to every far score before scaling (`q . mean`), or None.
        seen: mask over far and near keys side by side, from `split_masks`; None if all are seen.

    Returns:
        The far sum [B, H, 1, V], the far weight [B, H, 1, 1], the near sum [B, H, 1, D], and the attention weights over
        far and near keys side by side [B, H, 1, F + N].
    """
    b, h = q.shape[:2]
    far = far_keys.shape[2]

    def times(x: Tensor, held: Tensor) -> Tensor:
        """Each query head's row [B, H, 1, n] times what its KV head holds [B, G or fewer, n, m]: [B, H, 1, m]."""
        g = held.shape[1]
        return (x.reshape(b, g, h // g, x.shape[-1]) @ held).reshape(b, h, 1, held.shape[-1])

    far_scores = times(q_far, far_keys.transpose(-1, -2))
    if far_offset is not None:
        far_scores = far_scores + far_offset
    near_scores = times(q, near_keys.transpose(-1, -2))
    scores = cap_and_mask(torch.cat([far_scores, near_scores], dim=-1) * scale, seen, softcap)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    far_weights, near_weights = weights[..., :far], weights[..., far:]
    far_sum, near_sum = times(far_weights, far_values), times(near_weights, near_values)
    return far_sum, far_weights.sum(-1, keepdim=True), near_sum, weights
