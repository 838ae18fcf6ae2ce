"""Attention over pages of latents: plain PyTorch, which knows nothing of vLLM.

Queries that are few to a row are decoded together by `eigenattn.kernels.decoding`, which reads pages itself. Those of
prompts attend row by row, and meet the keys in chunks (`eigenattn.kernels.chunked`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..cache.context import CacheContext
from ..cache.layout import SIDES
from ..cache.sight import Near
from ..errors import EigenAttnError
from ..kernels import chunked
from ..kernels.decoding import Rotary, Step, Window, accepted, decode_accepted
from ..kernels.reference import both_masks
from ..kernels.selection import decoding_backend
from ..models.attention import EigenAttention
from ..models.maps import LatentMaps
from ..models.rotary import rotate
from .pages import Held, Pages

# Types of layers, where a model has several: others see everything.
SLIDING, CHUNKED = "sliding_attention", "chunked_attention"


def sight_of(layer: EigenAttention) -> int | None:
    """Tokens that each of a layer's queries sees, itself included; None for all before it.

    Raises:
        EigenAttnError: if it sees chunks.
    """
    if layer.layer_type == CHUNKED:
        raise EigenAttnError("attention in chunks is not served by vLLM once compressed.")
    return layer.sliding_window if layer.layer_type in (None, SLIDING) else None


def shows_later(layer: EigenAttention) -> bool:
    """Whether tokens of an image see those behind them, too, where images are let in."""
    return layer.family.both_directions == "all" or (
        layer.family.both_directions == "sliding" and sight_of(layer) is not None
    )


def angles_of(layer: EigenAttention) -> Hashable:
    """What layers that rotate by the same angles have in common."""
    if not layer.rotates:
        return None
    return id(layer.rotary_module), layer.layer_type if layer.by_layer_type else None


def rotary_of(layer: EigenAttention, rows: int | None = None) -> Rotary | None:
    """Rotary positions of a layer, which may be without memory; None if it does not rotate.

    Args:
        rows: how many rows positions have, if several.

    Raises:
        EigenAttnError: if it rotates otherwise than by frequencies.
    """
    if not layer.rotates:
        return None
    device, stored = torch.get_default_device(), layer.rotary_module
    prefix = f"{layer.layer_type}_" if layer.by_layer_type else ""
    with torch.device("cpu"):
        module: Any = type(stored)(getattr(stored, "config", layer.config))
        frequencies = getattr(module, f"{prefix}inv_freq", None)
        if frequencies is not None:
            scaling = float(getattr(module, f"{prefix}attention_scaling", 1.0))
            positions, turned = torch.tensor([[0, 1, 7, 300]]), None
            if rows is not None:
                positions = torch.stack([positions + 2 * row for row in range(rows)], dim=-1)
                turned = layer.row_of_pair(positions, module)
            found = Rotary(frequencies.float(), scaling, layer.family.interleaved, turned)
            # The engine's default dtype is the model's.
            x = torch.linspace(1, 2, 4 * layer.head_dim, dtype=torch.float32).view(1, 1, 4, -1)
            expected = rotate(x, *layer.angles(x, positions, module), layer.family.interleaved)
            if torch.allclose(found.rotate(x, positions), expected, rtol=1e-3, atol=1e-3):
                turned = None if turned is None else turned.to(device)
                return dataclasses.replace(found, inverse_frequencies=frequencies.float().to(device), rows=turned)
    raise EigenAttnError("rotary positions of this kind are not served by vLLM once compressed.")


@dataclass(frozen=True)
class PagedAttention:
    """How a layer attends over its pages.

    Args:
        maps: vectors to latents and back.
        scale: multiplies the scores.
        rotary: rotates queries and keys, or None.
        slopes: ALiBi's slope of each query head [H] in fp32, or None.
        softcap: see `Step`.
        sees: tokens that a query sees, itself included; None for all before it.
        sinks: see `Step`.
        shows_later: see the function.
    """

    maps: LatentMaps
    scale: float
    rotary: Rotary | None = None
    slopes: Tensor | None = None
    softcap: float | None = None
    sees: int | None = None
    sinks: Tensor | None = None
    shows_later: bool = False

    @property
    def window(self) -> int:
        """Tokens that a query sees exactly."""
        window = self.maps.layout.window
        return window if self.sees is None else min(window, self.sees)

    def rotated(self, x: Tensor, start: int, held: Held) -> Tensor:
        """Vectors [1, heads, n, D] of a row's tokens `start` and on; untouched without rotary positions."""
        if self.rotary is None:
            return x
        stop = start + x.shape[-2]
        if held.positions is None:
            return self.rotary.rotate_between(x, start, stop)
        (positions,) = held.positions.at(torch.arange(start, stop, device=x.device))
        return self.rotary.rotate(x.float(), positions).to(x.dtype)


@dataclass(frozen=True)
class Queries:
    """Queries that are decoded together, to all layers of a pass: each is a row of its own.

    Args:
        tokens: which of the batch they are, int64 [b].
        lengths: tokens of each row up to its query, which is the last, int32 [b].
        table: pages of each row, int32 [b, n].
        positions: 0 .. and as many as the longest row has tokens, int32 [1, n].
        context: what the layers compute once for all.
    """

    tokens: Tensor
    lengths: Tensor
    table: Tensor
    positions: Tensor
    context: CacheContext = field(default_factory=CacheContext, repr=False, compare=False)

    def rotary_positions(self, pages: Pages | None) -> tuple[Tensor, Tensor]:
        """Positions of each row's tokens and of its query, as a `Step` has them: those that pages hold, if any do."""
        last = self.lengths - 1
        if pages is None:
            return self.positions, last
        return self.context.memoised("positions", lambda: self._held(pages, last.unsqueeze(1)))

    def _held(self, pages: Pages, last: Tensor) -> tuple[Tensor, Tensor]:
        (found,) = pages.at(self.positions.minimum(last))  # what lies behind is not this row's
        (query,) = pages.at(last)
        return found[:, 0], query[:, 0, 0]


def decode_queries(layer: PagedAttention, q: Tensor, batch: Queries, held: Held) -> Tensor:
    """Queries [b, H, D] before rotation, over latents and the exact window, if there is one: [b, H, D]."""
    lengths, sees, far, near = batch.lengths, layer.sees, held.far, held.near

    def behind(tokens: int) -> Tensor:
        """How many each row has but for so many."""
        return batch.context.memoised(("behind", tokens), lambda: (lengths - tokens).clamp_min(0))

    keys, values = layer.maps.decoding_sides()
    exact = None
    if near is not None:
        near_keys, near_values = near.rows
        exact = Window(near_keys, near_values, 0, lengths, near.table)
    positions, query = batch.rotary_positions(held.positions)
    step = Step(
        q=q,
        query=query,
        rows=far.rows,
        table=far.table,
        keys=keys,
        values=values,
        scale=layer.scale,
        length=behind(layer.window),
        first=None if sees is None else behind(sees),
        positions=None if layer.rotary is None else positions,
        rotary=layer.rotary,
        slopes=layer.slopes,
        window=exact,
        softcap=layer.softcap,
        sinks=layer.sinks,
        memoised=batch.context.memoised,
    )
    return decode_accepted(step, accepted(step, decoding_backend(q)))


def attend_prompt(
    layer: PagedAttention, q: Tensor, length: int, held: Held, images: Sequence[tuple[int, int]] = ()
) -> Tensor:
    """The last T of a row's tokens; of layers that slide some at a time, since each sees but a few others.

    Args:
        q: their queries before rotation [T, H, D].
        length: the row's tokens, the queries' included.
        images: places of the first and the last token of each in the row.

    Returns:
        [T, H, D].
    """
    most = len(q) if layer.sees is None else max(layer.sees, chunked.QUERY_BLOCK)
    parts, stop = [], length - len(q)
    for some in q.split(most):
        stop += len(some)
        parts.append(_attend_part(layer, some, stop, held, images))
    return torch.cat(parts)


def _attend_part(
    layer: PagedAttention, q: Tensor, length: int, held: Held, images: Sequence[tuple[int, int]]
) -> Tensor:
    maps, t, window, far, near = layer.maps, q.shape[0], layer.window, held.far, held.near
    query = length - t
    first = 0 if layer.sees is None else max(query - layer.sees + 1, 0)  # that is seen
    columns = torch.arange(first, length, device=q.device)
    q = layer.rotated(q.transpose(0, 1).unsqueeze(0), query, held)  # [1, H, T, D]

    def decode_chunk(start: int, stop: int) -> tuple[Tensor, Tensor]:
        chunk = columns[start:stop]
        latents = maps.restored(far.at(chunk), q.dtype)
        keys, values = (maps.latent(latents, side) for side in SIDES)
        values = maps.for_each_head(values) if near is None else maps.decode(values, "value")
        return layer.rotated(maps.decode(keys, "key"), first + start, held), values

    exact = None
    if near is not None:
        start = max(query - window + 1 - first, 0)
        keys, values = near.at(columns[start:])
        exact = Near(layer.rotated(keys, first + start, held), values, start)
    reach = chunked.Reach(sees=layer.sees) if layer.slopes is None else None
    parts = chunked.attend(
        q,
        q,
        decode_chunk,
        exact,
        chunked.Scoring(mask_of(layer, columns, query - first), layer.scale, layer.softcap, reach),
        size=maps.layout.of("value").rank,
        tokens=len(columns),
        window=window,
        query_first=query - first,
    )
    if layer.shows_later:
        for image in images:
            _show_later(layer, parts, q, query, held, image)
    out = parts.out.to(q.dtype)
    out = maps.decode_output(out) if near is None else out
    if layer.sinks is not None:
        out = out * (parts.lse - layer.sinks.to(parts.lse.dtype).view(-1, 1, 1)).sigmoid().to(q.dtype)
    return out[0].transpose(0, 1)


def _show_later(
    layer: PagedAttention, parts: chunked.Parts, q: Tensor, query: int, held: Held, image: tuple[int, int]
) -> None:
    """Join what an image's tokens see of those behind them, which are exact, being of the same pass.

    Args:
        q: queries after rotation [1, H, T, D], of which the first is the row's token `query`.
    """
    first, last = max(image[0], query), image[1]
    stop = min(last, query + q.shape[2])  # the last token has none behind it
    if first >= stop:
        return
    assert held.near is not None  # asked for where images are let in
    columns = torch.arange(first + 1, last + 1, device=q.device)
    keys, values = held.near.at(columns)
    behind = columns > torch.arange(first, stop, device=q.device).unsqueeze(-1)
    out, lse = chunked.attend_with_lse(
        q[:, :, first - query : stop - query],
        layer.rotated(keys, first + 1, held),
        values,
        mask=behind[None, None],
        causal=False,
        scale=layer.scale,
        softcap=layer.softcap,
    )
    parts.join(first - query, out, lse)


def mask_of(layer: PagedAttention, columns: Tensor, query: int) -> chunked.Mask | None:
    """What slides out of sight and ALiBi, as tiles of a mask; None if there is neither.

    ALiBi is in fp32: half precision does not tell far columns apart.

    Args:
        columns: of all keys, [S].
        query: the place of the first query among them.
    """
    slopes, sees = layer.slopes, layer.sees
    if sees is not None and len(columns) <= sees:
        sees = None
    if slopes is None and sees is None:
        return None

    def tile(start: int, stop: int, low: int, high: int) -> Tensor | None:
        found = None
        if slopes is not None:
            found = slopes.view(1, -1, 1, 1) * (columns[low:high] - columns[-1])  # [1, H, 1, keys]
            found = found.float().expand(-1, -1, stop - start, -1)
        if sees is None or low + sees > query + stop - 1:
            return found
        seen = columns[low:high] > columns[query + start : query + stop].unsqueeze(-1) - sees
        return seen[None, None] if found is None else both_masks(found, seen)

    return tile
