"""What every backend of decoding is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ...cache.packing import BITS, Widths


@dataclass(frozen=True)
class Side:
    """How latents of keys, or of values, become vectors: `x_hat = mean + z @ U`. Make it once a layer, and keep it.

    Args:
        decoder: `U` [G, R, D]; None where latents are vectors already, at full rank or folded. Where N neighbouring
            heads share a latent, each has a decoder of its own, and latents have G/N heads.
        mean: [G, D], or None for a basis through the origin.
        widths: channels of 8, 4 and 2 bits, if latents are packed codes (`eigenattn.cache.packing`).
        offset, step: [G, R], a latent is `offset + code * step`; the same for all heads that share a latent.
    """

    decoder: Tensor | None = None
    mean: Tensor | None = None
    widths: Widths | None = None
    offset: Tensor | None = None
    step: Tensor | None = None

    @cached_property
    def folded(self) -> tuple[Tensor | None, Tensor | None]:
        """What `fold` gives, kept."""
        return self.fold()

    def fold(self) -> tuple[Tensor | None, Tensor | None]:
        """Decoder [G, R, D] and mean [G, D] that take codes, not latents: `x_hat = mean' + (code - middle) @ U'`.

        A static quantiser is affine, so it costs the kernel nothing: `U' = step * U`, and the rest joins the mean.
        Codes are taken from the middle of their range, `2^(bits - 1)`, for sums of small numbers round less.
        """
        if self.widths is None:
            return self.decoder, self.mean
        middles = [2.0 ** (bits - 1) for bits, count in zip(BITS, self.widths, strict=True) for _ in range(count)]
        step = self.step.float()
        centre = self.offset.float() + step * torch.tensor(middles, device=step.device)  # [G, R]
        if self.decoder is None:
            return torch.diag_embed(self.step), centre
        decoder = self.decoder.float()
        mean = (centre.unsqueeze(1) @ decoder).squeeze(1)
        if self.mean is not None:
            mean = mean + self.mean.float()
        return (step.unsqueeze(-1) * decoder).to(self.decoder.dtype), mean


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
