"""One step of decoding: what every backend is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...cache.codebook import Codebook
from ...cache.packing import Widths
from ...errors import EigenAttnError
from ..rotation import rotate_natively, rotates_natively
from .folded import Folded, fold


def pairs(x: Tensor, width: int, interleaved: bool) -> Tensor:
    """A view of x [..., D] whose leading `width` dimensions lie pair by pair, as [..., width / 2, 2]."""
    rotating = x[..., :width]
    return rotating.unflatten(-1, (-1, 2)) if interleaved else rotating.unflatten(-1, (2, -1)).transpose(-1, -2)


def in_pairs(x: Tensor, width: int, interleaved: bool) -> Tensor:
    """x [..., D] with its leading `width` dimensions pair by pair."""
    return torch.cat([pairs(x, width, interleaved).flatten(-2), x[..., width:]], dim=-1)


@dataclass(frozen=True)
class Side:
    """How keys, or values, come of stored rows: `x_hat = mean + z @ U`. Make it once a layer, and keep it.

    Args:
        row: which of the rows they are decoded from; keys and values that share a latent have the same.
        decoder: `U` [G, R, D]; None where latents are vectors already, at full rank or folded. Where N neighbouring
            heads share a latent, each has a decoder of its own, and latents have G/N heads.
        mean: [G, D], or None for a basis through the origin.
        widths: channels by bits, if latents are packed codes (`eigenattn.cache.packing`).
        levels: [G, R, 4], what codes stand for (`eigenattn.cache.codebook`); the same for heads that share a latent.
    """

    row: int
    decoder: Tensor | None = None
    mean: Tensor | None = None
    widths: Widths | None = None
    levels: Tensor | None = None
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def _once(self, name: Hashable, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    @property
    def codebook(self) -> Codebook:
        """What codes stand for, kept."""
        levels, widths = self.levels, self.widths
        assert levels is not None and widths is not None  # latents are coded
        return self._once("codebook", lambda: Codebook.of(levels, widths))

    def paired(self, width: int, interleaved: bool) -> tuple[Tensor | None, Tensor | None]:
        """Decoder [G, R, D] and mean [G, 1, D] with their leading `width` dimensions pair by pair, kept."""
        mean = None if self.mean is None else self.mean.unsqueeze(1)
        found = self.decoder, mean
        return self._once(
            (width, interleaved), lambda: tuple(x if x is None else in_pairs(x, width, interleaved) for x in found)
        )

    @property
    def folded(self) -> Folded:
        """What the fused kernel decodes with, kept."""
        return self._once("folded", lambda: fold(self.decoder, self.mean, self.widths, self.levels))


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotary positions. Make it once a model, and keep it.

    Args:
        inverse_frequencies: radians a token of each pair of dimensions [width / 2]; `width` at most D, dimensions past
            it stay.
        scaling: multiplies rotated dimensions, of queries and keys alike (YaRN's attention factor).
        interleaved: pairs are neighbours, not halves.
        rows: which row of positions each pair turns by [width / 2], where tokens have several (those in images: of the
            time, the height and the width). Positions have a last dimension of rows then.
    """

    inverse_frequencies: Tensor
    scaling: float = 1.0
    interleaved: bool = False
    rows: Tensor | None = None
    _tables: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def width(self) -> int:
        """Dimensions that rotate."""
        return 2 * self.inverse_frequencies.numel()

    def pairs(self) -> tuple[slice, slice]:
        """The dimensions that come first, and second, in their pairs."""
        if self.interleaved:
            return slice(0, self.width, 2), slice(1, self.width, 2)
        return slice(0, self.width // 2), slice(self.width // 2, self.width)

    def table(self, rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions 0 .. rows - 1, [rows, width / 2] in this dtype, without scaling; kept."""
        if (rows, dtype) not in self._tables:
            places = torch.arange(rows, dtype=torch.float32, device=self.inverse_frequencies.device)
            angles = places.unsqueeze(-1) * self.inverse_frequencies.float()
            self._tables[rows, dtype] = angles.cos().to(dtype), angles.sin().to(dtype)
        return self._tables[rows, dtype]

    def turns(self, positions: Tensor) -> Tensor:
        """Rotations to positions [...], as complex numbers, one a pair: [..., width / 2]."""
        angles = self._angles(positions)
        return torch.polar(torch.full_like(angles, self.scaling), angles)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate vectors [..., n, D] in fp32 to their positions [..., n]."""
        angles = self._angles(positions)
        return self._rotated(x, angles.cos() * self.scaling, angles.sin() * self.scaling)

    def rotate_between(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Rotate vectors [B, heads, n, D] to the positions start .. stop - 1, in fp32 arithmetic."""
        rows = 1 << (stop - 1).bit_length()
        name = ("both halves", rows)
        if name not in self._tables:
            found = (self.scaling * turn for turn in self.table(rows))
            self._tables[name] = [torch.cat([turn, turn], dim=-1).unsqueeze(0) for turn in found]
        cos, sin = (turn[:, start:stop] for turn in self._tables[name])
        if not self.interleaved and rotates_natively(x, cos, sin):
            return rotate_natively(x, cos, sin)
        half = self.width // 2
        return self._rotated(x.float(), cos[..., :half], sin[..., :half]).to(x.dtype)

    def _angles(self, positions: Tensor) -> Tensor:
        by_pair = positions.unsqueeze(-1) if self.rows is None else positions[..., self.rows]
        return by_pair * self.inverse_frequencies.float()

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = (x[..., dims] for dims in self.pairs())
        rotated = [first * cos - second * sin, second * cos + first * sin]
        together = torch.stack(rotated, dim=-1).flatten(-2) if self.interleaved else torch.cat(rotated, dim=-1)
        return torch.cat([together, x[..., self.width :]], dim=-1)


# A number that is the same for all rows, or int32 [B].
Count = int | Tensor


def out_of_pages(pages: Tensor, table: Tensor, columns: Tensor) -> Tensor:
    """Tokens of some rows, copied out of a paged cache.

    Args:
        pages: [pages, heads, tokens of a page, size].
        table: the pages of each row in order [B, n].
        columns: which tokens [B, m].

    Returns:
        [B, heads, m, size].
    """
    size = pages.shape[2]
    found = table.long().gather(1, columns // size)
    return pages[found, :, columns % size].transpose(1, 2)


@dataclass(frozen=True)
class Window:
    """The exact window: keys before rotation, as the cache holds them.

    Args:
        keys, values: [B, G, N, D].
        column: column of slot 0 in each row; negative where slots are empty.
        stop: columns before it are seen.
        table: of a paged cache, int32 [B, n]: keys and values are [pages, G, tokens of a page, D] then, and slot 0 is
            the first token of the row's first page.
    """

    keys: Tensor
    values: Tensor
    column: Count
    stop: Count
    table: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Step:
    """Softmax attention of one query a row over latents, and over the exact window if there is one.

    Columns count the tokens of a row from 0. Row b sees columns first[b] .. length[b] - 1 through latents and, of the
    window, the later ones before `stop[b]`; a row that sees nothing gives zeros. Everything beyond is never read, so
    rows may differ in length and tensors may have room to spare.

    Args:
        q: queries [B, H, D], before rotation if keys rotate here. Where keys have no decoder and do not rotate,
            [B, H, R_k].
        rows: what the cache holds, one tensor a latent: [B, G/N, S, R], or packed codes in uint8 [B, G/N, S, bytes].
        table: of a paged cache, int32 [B, n]: rows are [pages, G/N, tokens of a page, *] then, and row b's are those of
            the pages `table[b]`, one behind the other. What lies in pages past a row's length is never read.
        keys, values: how they come of rows. Without a decoder of values the output stays in their space.
        scale: multiplies the scores.
        length: columns before it are seen through latents.
        first: the first that is seen, int32 [B]; None is 0.
        positions, query: position of each column, [B or 1, columns], and of the query, [B or 1]; needed with `rotary`.
            In several rows, [B or 1, columns, rows] and [B or 1, rows].
        columns: where tokens were evicted, the column of each row of each head that keeps its own, [B, heads, S]; all
            lie before `length`. None: row n is column n.
        rotary: rotates queries, each decoded key, and each of the window, to its own position.
        slopes: ALiBi: `slope * column` joins the scores, [H] in fp32.
        window: the exact window.
        mask: joins the scores by column, [B or 1, H or 1, columns]: boolean (True is visible) or additive. It may hide
            some of what the other arguments let a row see, and shows nothing more.
        softcap: scores become `softcap * tanh(scores / softcap)` before slopes and mask.
        sinks: a logit of each head [H], with which the softmax is taken but for which there is no value.
        memoised: gives what has that name, or computes it; layers of a pass may share what they compute.
    """

    q: Tensor
    rows: tuple[Tensor, ...]
    keys: Side
    values: Side
    scale: float
    length: Count
    table: Tensor | None = None
    first: Tensor | None = None
    positions: Tensor | None = None
    query: Tensor | None = None
    columns: Tensor | None = None
    rotary: Rotary | None = None
    slopes: Tensor | None = None
    window: Window | None = None
    mask: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    memoised: Callable[[Hashable, Callable[[], Any]], Any] = lambda name, compute: compute()

    @property
    def rotary_positions(self) -> tuple[Tensor, Tensor]:
        """Positions of columns, and of queries, of a step in which they rotate."""
        assert self.positions is not None and self.query is not None  # `check`
        return self.positions, self.query

    @property
    def far_keys(self) -> Tensor:
        """The rows that keys are decoded from."""
        return self.rows[self.keys.row]

    @property
    def far_values(self) -> Tensor:
        """The rows that values are decoded from."""
        return self.rows[self.values.row]

    @property
    def kv_heads(self) -> int:
        """KV heads, G; latents that several share are fewer."""
        decoders = [side.decoder.shape[0] for side in (self.keys, self.values) if side.decoder is not None]
        return max(*decoders, *(row.shape[1] for row in self.rows))

    def gathered(self) -> Step:
        """The same step, with what is in sight copied out of its pages.

        Columns are counted from the first that is seen, unless there is a mask of them.
        """
        if self.table is None:
            return self
        b, device, window, first, positions = len(self.q), self.q.device, self.window, self.first, self.positions

        def of_each(count: Count) -> Tensor:
            return count if isinstance(count, Tensor) else torch.full((b,), count, device=device)

        lengths = of_each(self.length)
        away = torch.zeros_like(lengths) if first is None or self.mask is not None else first.minimum(lengths)
        columns = torch.arange(int((lengths - away).max()), device=device) + away.unsqueeze(1)
        columns = columns.minimum((lengths - 1).clamp_min(0).unsqueeze(1))
        rows = tuple(out_of_pages(row, self.table, columns) for row in self.rows)
        last = lengths
        if window is not None:
            keys, values, column, last = window.keys, window.values, of_each(window.column), of_each(window.stop)
            if window.table is not None:
                slots = torch.arange(int((last - lengths).max()), device=device) + lengths.unsqueeze(1)
                slots = slots.minimum(last.unsqueeze(1) - 1).clamp_min(0)
                keys, values = (out_of_pages(x, window.table, slots) for x in (keys, values))
                column = lengths
            window = Window(keys, values, column - away, last - away)
        if positions is not None and first is not None:
            seen = torch.arange(int((last - away).max()), device=device) + away.unsqueeze(1)
            row = torch.arange(b, device=device).unsqueeze(1)
            seen = seen.clamp_max(positions.shape[1] - 1).long()
            positions = positions.expand(b, *positions.shape[1:])[row, seen]
        first = None if first is None else first - away
        length = lengths - away
        return dataclasses.replace(
            self, rows=rows, table=None, window=window, length=length, first=first, positions=positions
        )

    @property
    def size_out(self) -> int:
        """Size of the output a head: D, or R_v if values are not decoded."""
        if self.values.decoder is not None:
            return self.values.decoder.shape[-1]
        return self.far_values.shape[-1] if self.values.widths is None else self.values.widths.channels

    def check(self) -> None:
        """Raise an `EigenAttnError` on shapes that do not fit."""
        size, heads = self.q.shape[-1], self.q.shape[1]
        for name, side in (("keys", self.keys), ("values", self.values)):
            row = self.rows[side.row]
            if side.widths is not None and side.levels is None:
                raise EigenAttnError(f"packed {name} need levels.")
            if side.widths is not None and row.shape[-1] != side.widths.bytes:
                raise EigenAttnError(f"packed {name} of {row.shape[-1]} bytes do not have the widths {side.widths}.")
            rank = row.shape[-1] if side.widths is None else side.widths.channels
            decoder = side.decoder
            if decoder is not None and (decoder.shape[1] != rank or (name == "keys" and decoder.shape[2] != size)):
                raise EigenAttnError(f"latent {name} of rank {rank} do not fit a decoder {tuple(decoder.shape)}.")
            if self.kv_heads % row.shape[1]:
                raise EigenAttnError(
                    f"{row.shape[1]} latents of {name} are not shared evenly by {self.kv_heads} heads."
                )
            if name == "keys" and decoder is None and rank != size:
                raise EigenAttnError(f"queries of size {size} meet keys of size {rank}, and there is no decoder.")
        mask = self.mask
        if mask is not None and (
            mask.dim() != 3 or mask.shape[0] not in (1, len(self.q)) or mask.shape[1] not in (1, heads)
        ):
            raise EigenAttnError(f"a mask is [B or 1, H or 1, columns], not {list(mask.shape)}.")
        if heads % self.kv_heads:
            raise EigenAttnError(f"{heads} query heads do not share {self.kv_heads} KV heads evenly.")
        if self.window is not None and self.size_out != self.window.values.shape[-1]:
            raise EigenAttnError("with an exact window, far values need a decoder or full rank.")
        if self.rotary is not None and (self.positions is None or self.query is None):
            raise EigenAttnError("queries and keys that rotate need positions.")
        if self.rotary is not None and self.rotary.rows is not None:
            positions, query = self.rotary_positions
            if (positions.dim(), query.dim()) != (3, 2):
                raise EigenAttnError("positions in rows are [B or 1, columns, rows], and the query's [B or 1, rows].")
