"""Attention of one pass over what a cache holds: latents of far tokens, and the exact window.

Query m sees keys m - W + 1 .. m exactly and all earlier ones through their latents, with a cache and without one, in
prefill and in decoding; without a window all of them through latents (arXiv 2408.05646, section 4). There are three
ways to compute that: one query a row, parts that are joined, and all at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache.layout import SIDES
from ..cache.sight import Near, Sight
from ..kernels import blocks, chunked, decoding
from ..kernels.decoding.batched import decode_with_weights
from ..kernels.reference import add_mask, causal_mask, score_dtype
from ..kernels.selection import decoding_backend, is_chosen
from .forward_pass import ForwardPass
from .layer import AttentionLayer
from .rotary import at_columns, rotate


def attend(layer: AttentionLayer, this: ForwardPass, q: Tensor, sight: Sight) -> tuple[Tensor, Tensor | None]:
    """Attend with queries [B, H, T, *], before rotation.

    Returns:
        The output [B, H, T, D], or [B, H, T, R_v] where the values' decoder is folded into the output projection; and
        the attention weights [B, H, T, columns], where the backend gives them.
    """
    if this.is_step(q, sight):
        return one_query(layer, this, q, sight)
    if this.is_in_parts(q, sight):
        return in_parts(layer, this, q, sight), None
    return all_at_once(layer, this, q, sight)


def one_query(layer: AttentionLayer, this: ForwardPass, q: Tensor, sight: Sight) -> tuple[Tensor, Tensor | None]:
    """A step of decoding, by `eigenattn.kernels.decoding`, which reads rows as they are stored."""
    near, query = sight.near, sight.query
    backend = "torch" if sight.far.columns is not None else decoding_backend(q)
    border, window = query + 1, None
    if near is not None:
        border = query - layer.layout.window + 1
        border = border.clamp_min(near.first) if isinstance(border, Tensor) else max(border, near.first, 0)
        window = decoding.Window(near.keys, near.values, near.first, query + 1)
    rotates_far = layer.rotates_far

    def mask_and_first() -> tuple[Tensor | None, Tensor | None]:
        """The mask, and the columns that it hides in front of each row, so that they need not be read."""
        mask = this.mask(q, sight.columns)
        if mask is None:
            return None, None
        if backend == "torch" or mask.dtype != torch.bool or mask.shape[1] > 1:
            return mask[:, :, -1], None
        return mask[:, :, -1], mask[:, 0, -1].to(torch.uint8).argmax(-1).to(torch.int32).expand(len(q))

    mask, first = this.memoised(
        ("mask", backend, layer.layer_type, layer.sliding_window, sight.columns, q.dtype, q.device), mask_and_first
    )
    keys, values = layer.decoding_sides()
    step = decoding.Step(
        q=(q if rotates_far else this.rotated(q))[:, :, 0],
        rows=sight.far.rows,
        keys=keys,
        values=values,
        scale=layer.scaling,
        length=border,
        first=first,
        positions=this.positions(sight) if rotates_far else None,
        query=this.query_position if rotates_far else None,
        columns=sight.far.columns,
        rotary=this.rotary(q.device) if rotates_far else None,
        window=window,
        mask=mask,
        softcap=layer.softcap,
        sinks=layer.sink_logits,
        memoised=this.memoised,
    )
    wants_weights = this.implementation == "eager" and not is_chosen("native")
    backend = "torch" if backend == "native" and wants_weights else decoding.accepted(step, backend)
    if backend == "torch" and this.implementation == "eager":  # which gives weights, asked or not
        out, weights = decode_with_weights(step, sight.columns)
        return out.unsqueeze(2), weights.unsqueeze(2)
    return decoding.decode_accepted(step, backend).unsqueeze(2), None


def in_parts(layer: AttentionLayer, this: ForwardPass, q: Tensor, sight: Sight) -> Tensor:
    """Many queries over exact keys and over far ones, decoded a chunk at a time, as parts that their log-sum-exp joins.

    What a pass needs beside the cache is one chunk.
    """
    q, far, near, query = this.rotated(q), sight.far, sight.near, int(sight.query)
    in_latent_space = near is None and not layer.decodes_keys
    q_far = layer.query_in_latent_space(q)[0] if in_latent_space else q

    def decode(start: int, stop: int) -> tuple[Tensor, Tensor]:
        latents = layer.restored(tuple(row[:, :, start:stop] for row in far.rows), q.dtype)
        keys, values = (layer.latent(latents, side) for side in SIDES)
        keys = layer.for_each_head(keys) if in_latent_space else layer.decode(keys, "key")
        if layer.rotates_far:
            keys = rotate(keys, *this.angles_of_chunk(sight, start, stop), layer.family.interleaved)
        return keys, layer.for_each_head(values) if near is None else layer.decode(values, "value")

    reach = _reach(layer, this, sight, query)
    mask = None if reach is not None and reach.is_all else _tiles(this, q, sight)
    parts = chunked.attend(
        q,
        q_far,
        decode,
        near and near._replace(keys=_near_keys(layer, this, near, sight, max(int(near.first), 0))),
        chunked.Scoring(mask, layer.scaling, layer.softcap, reach),
        size=layer.layout.of("value").rank,
        tokens=far.rows[0].shape[2],
        window=layer.layout.window,
        query_first=query,
    )
    out = parts.out if mask is None else parts.with_zeros(torch.finfo(q.dtype).min / 2)
    out = layer.decode_output(out.to(q.dtype)) if near is None else out.to(q.dtype)
    return out * _share_of_keys(layer, parts.lse, q.dtype)


def _share_of_keys(layer: AttentionLayer, lse: Tensor, dtype: torch.dtype) -> Tensor | float:
    """What sinks leave of the softmax [B, H, T, 1], by the log-sum-exp of the scores; all of it without any."""
    sinks = layer.sink_logits
    return 1.0 if sinks is None else (lse - sinks.to(lse.dtype).view(-1, 1, 1)).sigmoid().to(dtype)


def all_at_once(layer: AttentionLayer, this: ForwardPass, q: Tensor, sight: Sight) -> tuple[Tensor, Tensor | None]:
    """All queries over all keys, decoded."""
    q, far, near = this.rotated(q), sight.far, sight.near
    latents = layer.restored(far.rows, q.dtype)
    keys = layer.latent(latents, "key")
    if layer.rotates_far:
        cos, sin = this.angles(sight)
        if far.columns is None:
            cos, sin = cos[:, : keys.shape[2]], sin[:, : keys.shape[2]]
        else:
            columns = far.columns.long().repeat_interleave(layer.kv_heads // far.columns.shape[1], dim=1)
            cos, sin = at_columns(cos, columns), at_columns(sin, columns)
        keys = rotate(layer.decode(keys, "key"), cos, sin, layer.family.interleaved)
    mask, columns = this.mask(q, sight.columns), columns_of_heads(layer, sight)
    if near is None:
        if mask is None and columns is not None and q.shape[-2] > 1:  # backends count queries and rows from 0
            mask = causal_mask(q.shape[-2], sight.columns, q.device, int(sight.query))[None, None]
        if not layer.decodes_keys:
            q, _ = layer.query_in_latent_space(q)
        elif not layer.rotates_far:
            keys = layer.decode(keys, "key")
        if columns is not None:
            mask = None if mask is None else blocks.take_columns(mask, columns)
        keys, values = layer.for_each_head(keys), layer.for_each_head(layer.latent(latents, "value"))
        out, weights = this.attend_at_full_rank(q, keys, values, mask)
        held = None if layer.sink_logits is None or weights is None else weights.sum(-1, keepdim=True)
        if weights is not None and columns is not None:
            weights = blocks.by_column(weights, columns, columns.new_zeros(0), sight.columns)
        return layer.decode_output(out, weight=held), weights
    if not layer.rotates_far:
        keys = layer.decode(keys, "key")
    return blocks.attend(
        this.backend,
        q,
        blocks.FarKeys(keys, layer.decode(layer.latent(latents, "value"), "value"), columns),
        near._replace(keys=_near_keys(layer, this, near, sight)),
        query_first=sight.query,
        window=layer.layout.window,
        mask=mask,
        columns=sight.columns,
        dropout=this.dropout,
        **layer.scoring,
    )


def columns_of_heads(layer: AttentionLayer, sight: Sight) -> Tensor | None:
    """The column of each far row for each query head [B, H, F]; None where row n is column n."""
    columns = sight.far.columns
    if columns is None:
        return None
    # KV heads that share a latent keep the same tokens.
    return columns.long().repeat_interleave(layer.heads // columns.shape[1], dim=1)


def weights_on_rows(layer: AttentionLayer, this: ForwardPass, q: Tensor, sight: Sight, queries: int) -> Tensor:
    """What so many last queries of a pass attend to: weights on the far rows, in their order, [B, H, n, F]."""
    start, columns = q.shape[-2] - queries, columns_of_heads(layer, sight)
    last = sight._replace(query=sight.query + start)
    _, weights = all_at_once(layer, this.observing(q, sight, start), q[:, :, start:], last)
    assert weights is not None  # by the backend that gives them
    return weights[..., : sight.far.rows[0].shape[2]] if columns is None else blocks.take_columns(weights, columns)


def _near_keys(layer: AttentionLayer, this: ForwardPass, near: Near, sight: Sight, first: int = 0) -> Tensor:
    """Exact keys at their positions; angles are made of the columns from `first` on, which all of them have."""
    if not layer.rotates:
        return near.keys
    columns = (torch.arange(near.keys.shape[-2], device=near.keys.device) + near.first).clamp_min(0) - first
    cos, sin = this.angles(sight, first)
    return rotate(near.keys, cos.index_select(1, columns), sin.index_select(1, columns), layer.family.interleaved)


def _reach(layer: AttentionLayer, this: ForwardPass, sight: Sight, query: int) -> chunked.Reach | None:
    """What the model's mask comes to; None if there is more to it than texts read forwards, with padding in front."""
    mask, bias = this.mask_and_bias(sight.columns)
    if bias is not None:
        return None
    if mask is None:
        return chunked.Reach()
    if mask.dtype != torch.bool or mask.shape[1] > 1:
        return None
    sees = layer.sliding_window

    def found() -> chunked.Reach | None:
        return chunked.reach_of(mask, query, None if sees is None or sees >= sight.columns else sees)

    return this.memoised(("reach", layer.layer_type, sees, sight.columns), found)


def _tiles(this: ForwardPass, q: Tensor, sight: Sight) -> chunked.Mask:
    """Tiles of the model's mask, and of what the family adds to scores."""
    mask, bias = this.mask_and_bias(sight.columns)

    def tile(start: int, stop: int, low: int, high: int) -> Tensor | None:
        seen = None if mask is None else mask[..., start:stop, low:high]
        if bias is None:
            return seen
        part = bias[..., low:high].to(score_dtype(q.dtype))
        return part.expand(-1, -1, stop - start, -1) if seen is None else add_mask(part, seen)

    return tile
