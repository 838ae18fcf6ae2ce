"""Decoding in PyTorch's batched operations, on any device, in the dtype of the queries.

Decoding a token is many small operations, which cost a CPU more to start than to do, and a few large ones, bound by
memory: so there are few. Where all rows are alike, what is seen through latents and what exactly are slices, and their
columns side by side are in order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import score_dtype, softmax
from .arguments import Rotary, Side, Step, pairs


class _Keys(NamedTuple):
    """What is in sight of the queries, far and near keys side by side."""

    rows: list[Tensor]  # latents, [B, G/N, F, R] each
    near_keys: Tensor | None  # [B, G, N, D]
    near_values: Tensor | None
    columns: Tensor | None  # [B or 1, heads or 1, F + N]; None: 0 ..
    seen: Tensor | None  # [B, F + N], which of them; None: all

    @property
    def far(self) -> int:
        return self.rows[0].shape[2]

    @property
    def count(self) -> int:
        return self.far + (0 if self.near_keys is None else self.near_keys.shape[2])


def decode(step: Step) -> Tensor:
    """See `eigenattn.kernels.decoding.Step`."""
    return _attend(step)[0]


def decode_with_weights(step: Step, columns: int) -> tuple[Tensor, Tensor]:
    """The same, and the attention weights [B, H, columns]."""
    step.check()
    out, weights, keys = _attend(step)
    if keys.columns is None:
        return out, F.pad(weights, (0, columns - keys.count))
    places = _by_head(keys.columns.clamp(0, columns - 1).long(), weights.shape[1]).expand_as(weights)
    return out, weights.new_zeros(*weights.shape[:2], columns).scatter_add(-1, places, weights)


def _attend(step: Step) -> tuple[Tensor, Tensor, _Keys]:
    """The output, the weights of what is in sight [B, H, F + N], and what that is."""
    step = step.gathered()
    h, g = step.q.shape[1], step.kv_heads
    keys = _in_sight(step)
    scores = _scores(step, keys, g) * step.scale  # [B, H, F + N]
    if step.softcap is not None:
        scores = step.softcap * torch.tanh(scores / step.softcap)
    if step.slopes is not None:
        columns = _columns(keys, scores.device)
        length = step.length.view(-1, 1, 1) if isinstance(step.length, Tensor) else step.length
        scores = scores + step.slopes.view(1, -1, 1) * _by_head(columns - length, h)
    scores, seen = _masked(step, keys, scores)
    weights = softmax(scores.unsqueeze(2), step.sinks).squeeze(2)
    if seen is not None:
        weights = weights.masked_fill(~seen, 0.0)  # a row may see nothing
    weights = weights.to(step.q.dtype)
    far_weights = weights[..., : keys.far]
    latents, near_values = keys.rows[step.values.row], keys.near_values
    if keys.seen is not None:
        # What no query sees may be anything, NaN too, and 0 * NaN is no zero.
        unseen = ~keys.seen[:, None, :, None]
        latents = latents.masked_fill(unseen[:, :, : keys.far], 0)
        near_values = None if near_values is None else near_values.masked_fill(unseen[:, :, keys.far :], 0)
    out = _times(far_weights, latents)
    if step.values.decoder is not None:
        out = _by_group(out, g) @ step.values.decoder  # [B, G, H/G, D]
        if step.values.mean is not None:
            out = out + _by_group(far_weights.sum(-1, keepdim=True), g) * step.values.mean.unsqueeze(1)
        out = out.flatten(1, 2)
    out = out if near_values is None else out + _times(weights[..., keys.far :], near_values)
    return out, weights, keys


def _in_sight(step: Step) -> _Keys:
    window, length = step.window, step.length
    counts = [] if window is None else [window.column, window.stop]
    if step.first is None and isinstance(length, int) and all(isinstance(count, int) for count in counts):
        rows = step.rows if step.columns is not None else [row[:, :, :length] for row in step.rows]
        near_keys = near_values = None
        if window is not None:
            slots = slice(max(length - window.column, 0), window.stop - window.column)
            near_keys, near_values = window.keys[:, :, slots], window.values[:, :, slots]
        columns = step.columns
        if columns is not None and near_keys is not None:
            near = torch.arange(length, length + near_keys.shape[2], device=columns.device)
            columns = torch.cat([columns, near.expand(*columns.shape[:2], -1)], dim=-1)
        return _Keys(_latents(step, rows), near_keys, near_values, columns, None)
    b, device = len(step.q), step.q.device
    columns = torch.arange(step.far_keys.shape[2], device=device).expand(b, -1)
    lengths, first = _each(length, b, device), _each(0 if step.first is None else step.first, b, device)
    seen = (columns >= first) & (columns < lengths)
    if window is None:
        return _Keys(_latents(step, step.rows), None, None, columns.unsqueeze(1), seen)
    near = _each(window.column, b, device) + torch.arange(window.keys.shape[2], device=device)  # [B, N]
    near_seen = (near >= torch.maximum(first, lengths)) & (near < _each(window.stop, b, device))
    columns, seen = torch.cat([columns, near], dim=-1), torch.cat([seen, near_seen], dim=-1)
    return _Keys(_latents(step, step.rows), window.keys, window.values, columns.unsqueeze(1), seen)


def _each(count: int | Tensor, b: int, device: torch.device) -> Tensor:
    """A number of every row, [B, 1]."""
    if isinstance(count, Tensor):
        return count.reshape(-1, 1).expand(b, 1)
    return torch.full((b, 1), count, device=device)


def _latents(step: Step, rows: tuple[Tensor, ...] | list[Tensor]) -> list[Tensor]:
    """Rows as latents [B, G/N, F, R]; codes are restored, once where keys and values share them."""
    sides = {side.row: side for side in (step.values, step.keys)}
    return [row if row.dtype != torch.uint8 else _restored(row, sides[i], step.q.dtype) for i, row in enumerate(rows)]


def _restored(row: Tensor, side: Side, dtype: torch.dtype) -> Tensor:
    return side.codebook.decode(row).to(dtype)


def _scores(step: Step, keys: _Keys, g: int) -> Tensor:
    """Scores [B, H, F + N] in fp32 or more, before scaling."""
    q, side, latents = step.q, step.keys, keys.rows[step.keys.row]
    dtype = score_dtype(q.dtype)
    if step.rotary is not None:
        queries, found = _rotated(step, step.rotary, keys, latents, g)
        return torch.bmm(queries.flatten(0, 1), found.flatten(0, 1).transpose(-1, -2)).view(*q.shape[:2], -1).to(dtype)
    q_far = q if side.decoder is None else (_by_group(q, g) @ side.decoder.transpose(-1, -2)).flatten(1, 2)
    scores = _times(q_far, latents.transpose(-1, -2)).to(dtype)
    if side.mean is not None:
        scores = scores + (_by_group(q, g) @ side.mean.unsqueeze(-1)).flatten(1, 2).to(dtype)
    if keys.near_keys is None:
        return scores
    return torch.cat([scores, _times(q, keys.near_keys.transpose(-1, -2)).to(dtype)], dim=-1)


def _rotated(step: Step, rotary: Rotary, keys: _Keys, latents: Tensor, g: int) -> tuple[Tensor, Tensor]:
    """Queries [B, G, H/G, D], and keys [B, G, F + N, D] decoded, at their positions, with dimensions in one order.

    On a CPU in fp32 they are put into one buffer, which is the same for all layers of a pass, pair by pair, and rotated
    there by one product of complex numbers. Elsewhere PyTorch's complex numbers are slow or absent.
    """
    q, side, width, count = _by_group(step.q, g), step.keys, rotary.width, keys.count
    turns = _turns(step, rotary, keys, g)
    plain = q.dtype == latents.dtype == torch.float32 and q.device.type == "cpu"  # under autocast they may differ
    if not plain or torch.compiler.is_compiling():
        found = _decoded(latents, side.decoder, side.mean if side.mean is None else side.mean.unsqueeze(1), g)
        x = torch.cat([found, q] if keys.near_keys is None else [found, keys.near_keys, q], dim=-2)
        first, second = (x[..., dims].to(score_dtype(q.dtype)) for dims in rotary.pairs())
        together = [first * turns.real - second * turns.imag, second * turns.real + first * turns.imag]
        rotated = torch.stack(together, -1).flatten(-2) if rotary.interleaved else torch.cat(together, dim=-1)
        x = torch.cat([rotated.to(q.dtype), x[..., width:]], dim=-1)
        return x[:, :, count:], x[:, :, :count]
    shape = (len(q), g, count + q.shape[2], q.shape[-1])
    room = step.memoised(("room", *shape), lambda: q.new_empty(shape))
    decoder, mean = side.paired(width, rotary.interleaved)
    if decoder is None:
        _put(room[:, :, : keys.far], _shared_out(latents, g), width, rotary.interleaved)
    else:
        _decoded(latents, decoder, mean, g, out=room[:, :, : keys.far])
    if keys.near_keys is not None:
        _put(room[:, :, keys.far : count], keys.near_keys, width, rotary.interleaved)
    _put(room[:, :, count:], q, width, rotary.interleaved)
    torch.view_as_complex(room[..., :width].unflatten(-1, (-1, 2))).mul_(turns)
    return room[:, :, count:], room[:, :, :count]


def _turns(step: Step, rotary: Rotary, keys: _Keys, g: int) -> Tensor:
    """Rotations of all keys, and behind them of a group's queries, as complex numbers.

    [B or 1, G or 1, F + N + H/G, width / 2].
    """
    columns, (positions, query) = keys.columns, step.rotary_positions

    def with_queries(found: Tensor) -> Tensor:
        own = rotary.turns(query[:, None, None])  # [B or 1, 1, 1, width / 2]
        b = max(len(found), len(own))
        own = own.expand(b, found.shape[1], step.q.shape[1] // g, -1)
        return torch.cat([found.expand(b, -1, -1, -1), own], dim=2)

    if columns is None:
        name = ("turns", rotary, keys.count, g)
        return step.memoised(name, lambda: with_queries(rotary.turns(positions[:, : keys.count]).unsqueeze(1)))
    positions = positions.expand(len(columns), *positions.shape[1:])
    table = step.memoised(("turns", rotary, positions.shape), lambda: rotary.turns(positions))  # [B, columns, w/2]

    def at_columns() -> Tensor:
        places = columns.clamp(0, positions.shape[1] - 1).long()
        rows = torch.arange(len(places), device=places.device).view(-1, 1, 1)
        return with_queries(_by_head(table[rows, places], g))

    if step.columns is not None:  # each layer evicts tokens of its own
        return at_columns()
    return step.memoised(("turns", rotary, keys.far, keys.count, g), at_columns)


def _decoded(latents: Tensor, decoder: Tensor | None, mean: Tensor | None, g: int, out: Tensor | None = None) -> Tensor:
    """Latents [B, G/N, F, R] through decoders [G, R, D] and means [G, 1, D] of each head: [B, G, F, D]."""
    if decoder is None:
        return _shared_out(latents, g)
    b, count = latents.shape[:2]
    if count < g:
        found = latents.unsqueeze(2) @ decoder.unflatten(0, (count, -1))  # [B, G/N, N, F, D]
        found = found.flatten(1, 2) if mean is None else found.flatten(1, 2) + mean
        return found if out is None else out.copy_(found)
    if b != 1:
        decoder, mean = decoder.repeat(b, 1, 1), None if mean is None else mean.repeat(b, 1, 1)
    rows, flat = None if out is None else out.flatten(0, 1), latents.flatten(0, 1)
    if out is None or rows is None or rows.data_ptr() != out.data_ptr():
        rows = None  # or a copy, of what could not be seen as one batch
    found = torch.bmm(flat, decoder, out=rows) if mean is None else torch.baddbmm(mean, flat, decoder, out=rows)
    found = found.unflatten(0, (b, g))
    return found if out is None or rows is not None else out.copy_(found)


def _put(into: Tensor, x: Tensor, width: int, interleaved: bool) -> None:
    """Write x with its rotating dimensions pair by pair."""
    into[..., :width].unflatten(-1, (-1, 2)).copy_(pairs(x, width, interleaved))
    if width < x.shape[-1]:
        into[..., width:].copy_(x[..., width:])


def _masked(step: Step, keys: _Keys, scores: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scores [B, H, F + N] with what is not seen at -inf, and what is seen [B, H or 1, F + N], None if all is."""
    seen, mask = None if keys.seen is None else keys.seen.unsqueeze(1), step.mask
    if mask is not None:
        if keys.columns is None:
            mask = mask[..., : keys.count]
        else:
            h = scores.shape[1]
            places = keys.columns.clamp(0, mask.shape[-1] - 1).long()
            places = places if mask.shape[1] == 1 else _by_head(places, h)
            mask = _by_head(torch.take_along_dim(mask, places, dim=-1), h)
        if mask.dtype == torch.bool:
            seen = mask if seen is None else seen & mask
        else:
            scores = scores + mask.float()
    return (scores, None) if seen is None else (scores.masked_fill(~seen, float("-inf")), seen)


def _columns(keys: _Keys, device: torch.device) -> Tensor:
    """The columns of all keys, [B or 1, heads or 1, F + N]."""
    return torch.arange(keys.count, device=device)[None, None] if keys.columns is None else keys.columns


def _by_head(x: Tensor, heads: int) -> Tensor:
    """Something of 1 head, of all, or of groups of neighbours [B, n, ...] for so many heads, unless of 1."""
    return x if x.shape[1] in (1, heads) else x.repeat_interleave(heads // x.shape[1], dim=1)


def _by_group(x: Tensor, count: int) -> Tensor:
    """Rows of query heads [B, H, n] under what they belong to, [B, count, H/count, n]."""
    return x.unflatten(1, (count, -1))


def _shared_out(latents: Tensor, g: int) -> Tensor:
    """Latents once for each head that shares them."""
    return latents if latents.shape[1] == g else latents.repeat_interleave(g // latents.shape[1], dim=1)


def _times(x: Tensor, held: Tensor) -> Tensor:
    """Each query head's row [B, H, n] times what its KV head or latent holds [B, G/N, n, m]: [B, H, m]."""
    b, h = x.shape[:2]
    rows = x.reshape(b * held.shape[1], h // held.shape[1], x.shape[-1])
    return torch.bmm(rows, held.flatten(0, 1)).view(b, h, held.shape[-1])
