"""What every backend of decoding is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ...cache.codebook import Codebook, middles
from ...cache.packing import Widths


@dataclass(frozen=True)
class Side:
    """How latents of keys, or of values, become vectors: `x_hat = mean + z @ U`. Make it once a layer, and keep it.

    Args:
        decoder: `U` [G, R, D]; None where latents are vectors already, at full rank or folded. Where N neighbouring
            heads share a latent, each has a decoder of its own, and latents have G/N heads.
        mean: [G, D], or None for a basis through the origin.
        widths: channels of 8, 6, 4 and 2 bits, if latents are packed codes (`eigenattn.cache.packing`).
        levels: [G, R, 4], what codes stand for (`eigenattn.cache.codebook`); the same for heads that share a latent.
    """

    decoder: Tensor | None = None
    mean: Tensor | None = None
    widths: Widths | None = None
    levels: Tensor | None = None

    @cached_property
    def codebook(self) -> Codebook:
        """What codes stand for."""
        return Codebook.of(self.levels, self.widths)

    @cached_property
    def folded(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What `fold` gives, kept."""
        return self.fold()

    def fold(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Decoder [G, R, D], mean [G, D] and shape [G, 3, R] that take codes u, counted from the middle of their range.

        `x_hat = mean' + y @ U'` with `y = u (shape_0 + u (shape_1 + u shape_2))`. The mean distance of levels, s, has
        gone into the decoder, `U' = s U`, so that y is about as large as u, and the level of u = 0 into the mean.
        """
        if self.widths is None:
            return self.decoder, self.mean, None
        levels = self.levels.float()
        _, a, b, c = levels.unbind(-1)
        at = middles(self.widths, levels.device)
        step = a - b + c * (at * at - at + 1)  # [G, R]: of the levels at both ends, -at and at - 1
        step = torch.where(step > 0, step, 1.0)
        shape, centre = (levels[..., 1:] / step.unsqueeze(-1)).transpose(1, 2).contiguous(), levels[..., 0]
        if self.decoder is None:
            return torch.diag_embed(step), centre, shape
        decoder = self.decoder.float()
        mean = (centre.unsqueeze(1) @ decoder).squeeze(1)
        if self.mean is not None:
            mean = mean + self.mean.float()
        return (step.unsqueeze(-1) * decoder).to(self.decoder.dtype), mean, shape


@dataclass(frozen=True)
class Rotary:
    """Rotary positions. Make it once a model, and keep it.

    Args:
        inverse_frequencies: radians a token of each pair of dimensions [width / 2]; `width` at most D, dimensions past
            it stay.
        scaling: multiplies rotated dimensions, of queries and keys alike (YaRN's attention factor).
        interleaved: pairs are neighbours, not halves.
    """

    inverse_frequencies: Tensor
    scaling: float = 1.0
    interleaved: bool = False
    _tables: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def width(self) -> int:
        """Dimensions that rotate."""
        return 2 * self.inverse_frequencies.numel()

    def pairs(self) -> tuple[slice, slice]:
        """The dimensions that come first, and second, in their pairs."""
        if self.interleaved:
            return slice(0, self.width, 2), slice(1, self.width, 2)
        return slice(0, self.width // 2), slice(self.width // 2, self.width)

    def table(self, rows: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions 0 .. rows - 1, [rows, width / 2] in fp32, without scaling; kept."""
        if rows not in self._tables:
            places = torch.arange(rows, dtype=torch.float32, device=self.inverse_frequencies.device)
            angles = places.unsqueeze(-1) * self.inverse_frequencies.float()
            self._tables[rows] = angles.cos(), angles.sin()
        return self._tables[rows]


@dataclass(frozen=True)
class Near:
    """The exact window: keys before rotation, as the cache holds them.

    Args:
        keys, values: [B, G, N, D].
        column: column of slot 0 in each row, int32 [B]; negative where slots are empty.
        stop: columns before it are seen, int32 [B].
    """

    keys: Tensor
    values: Tensor
    column: Tensor
    stop: Tensor


@dataclass(frozen=True)
class Problem:
    """One step of decoding: see `eigenattn.kernels.decoding.decode`, whose arguments it holds."""

    q: Tensor
    far_keys: Tensor
    far_values: Tensor
    keys: Side
    values: Side
    scale: float
    length: Tensor
    first: Tensor
    position: Tensor
    rotary: Rotary | None
    slopes: Tensor | None
    near: Near | None
    mask: Tensor | None
    softcap: float | None

    @property
    def kv_heads(self) -> int:
        """KV heads, G; latents that several share are fewer."""
        decoders = [side.decoder.shape[0] for side in (self.keys, self.values) if side.decoder is not None]
        return max(*decoders, self.far_keys.shape[1], self.far_values.shape[1])

    @property
    def size_out(self) -> int:
        """Size of the output a head: D, or R_v if values are not decoded."""
        if self.values.decoder is not None:
            return self.values.decoder.shape[-1]
        return self.far_values.shape[-1] if self.values.widths is None else self.values.widths.channels
