"""The maps of one attention layer: vectors to latents, to what the cache holds, and back."""

from __future__ import annotations

import functools
import operator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..cache.codebook import DEGREE, Codebook
from ..cache.layout import SIDES, Latent, Layout
from ..kernels.coding import Encoder, codes_of, codes_of_vectors, levels_of
from ..kernels.decoding import Side
from .memoised import memoised

# A side whose vectors are stored as they are needs none of these. Maps are stored as [G * R, D] and means as [G * D],
# so that tensor parallelism can split them by head. Where N KV heads share a latent, maps are [G/N * R, N * D]. Where a
# token's keys and values share one, both sides' maps are to and from it; where values are keys, they have keys' maps.
MAPS = ("key_encoder", "key_decoder", "key_mean", "value_encoder", "value_decoder", "value_mean")
# What codes of each channel of a coded latent stand for (`eigenattn.cache.codebook`), [G/N * R, 4], under the name of
# the first of its sides.
QUANTISERS = ("key_levels", "value_levels")


class LatentMaps(nn.Module):
    """What a layer's encoders, decoders, means and quantisers do to keys, values, queries and sums.

    The layer that inherits it has registered `MAPS` and `QUANTISERS`, and sets what is annotated here. Latents, and
    rows that a cache holds, are tuples with one tensor for each latent of the layout.
    """

    heads: int
    kv_heads: int
    head_dim: int
    layout: Layout
    key_encoder: nn.Parameter | None
    key_decoder: nn.Parameter | None
    key_mean: nn.Parameter | None
    value_encoder: nn.Parameter | None
    value_decoder: nn.Parameter | None
    value_mean: nn.Parameter | None
    key_levels: nn.Parameter | None
    value_levels: nn.Parameter | None

    def _by_latent(self, name: str) -> Tensor:
        """A run-time map as [G/N, R, N * D], or a mean as [G/N, 1, N * D]."""
        stored, latent = local_part(getattr(self, name)), self.layout.of(side_of(name))
        return stored.view(-1, 1 if stored.dim() == 1 else latent.rank, latent.heads * self.head_dim)

    def map_of(self, side: str, kind: str) -> str:
        """The name of the `encoder`, `decoder` or `mean` of keys, or of values."""
        return f"{self.layout.side_of(side)}_{kind}"

    def by_head(self, name: str) -> Tensor | None:
        """A decoder as [G, R, D], or a mean as [G, 1, D]; None where the side has none."""
        shared, stored = self.layout.of(side_of(name)).heads, getattr(self, name)
        if stored is None or shared == 1:
            return None if stored is None else self._by_latent(name)

        def apart() -> Tensor:
            return self._by_latent(name).unflatten(-1, (shared, -1)).transpose(1, 2).flatten(0, 1)

        trains = stored.requires_grad and torch.is_grad_enabled()
        return apart() if trains else memoised(self, f"_{name}_by_head", [stored], apart)

    def encode(self, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """Keys and values [B, G, T, D] to latents [B, G/N, T, R]; what is latent, or stored as it is, passes."""
        vectors = {"key": keys, "value": values}
        return tuple(self._latent_of(latent, vectors) for latent in self.layout.latents)

    def _latent_of(self, latent: Latent, vectors: dict[str, Tensor]) -> Tensor:
        return functools.reduce(operator.add, (self._encode(vectors[side], side) for side in latent.sides))

    def _encode(self, x: Tensor, side: str) -> Tensor:
        if getattr(self, f"{side}_encoder") is None:
            return x
        x = joined(x, self.layout.count(self.layout.of(side)))
        if getattr(self, f"{side}_mean") is not None:
            x = x - self._by_latent(f"{side}_mean")
        return x @ self._by_latent(f"{side}_encoder").transpose(-1, -2)

    def codebook(self, latent: Latent) -> Codebook:
        """The quantisers of a coded latent."""
        name = f"{latent.sides[0]}_levels"
        stored, widths = getattr(self, name), latent.widths
        assert widths is not None  # it is coded

        def made() -> Codebook:
            levels = local_part(stored).detach().view(self.layout.count(latent), -1, DEGREE + 1)
            return Codebook.of(levels, widths)

        return memoised(self, f"_{name}_codebook", [stored, latent], made)

    def stored(self, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """What the cache holds of keys and values [B, G, T, D]: latents [B, G/N, T, R], or bytes of packed codes.

        Bytes carry no gradients: coded models are trained without a cache.
        """
        vectors = {"key": keys, "value": values}
        return tuple(
            self._latent_of(latent, vectors) if latent.widths is None else self._codes(latent, vectors)
            for latent in self.layout.latents
        )

    def _codes(self, latent: Latent, vectors: dict[str, Tensor]) -> Tensor:
        codebook, encoders, found = self.codebook(latent), self._encoders(latent), None
        if encoders is not None:
            found = codes_of_vectors([vectors[side] for side in latent.sides], encoders, codebook)
        return codes_of(self._latent_of(latent, vectors), codebook) if found is None else found

    def _encoders(self, latent: Latent) -> list[Encoder] | None:
        """What makes a latent of vectors; None where projections have done so."""
        names = [(f"{side}_encoder", f"{side}_mean") for side in latent.sides]
        source = [getattr(self, name) for pair in names for name in pair]
        if any(encoder is None for encoder in source[::2]):
            return None

        def made() -> list[Encoder]:
            parts = [
                [None if getattr(self, name) is None else self._by_latent(name) for name in pair] for pair in names
            ]
            return [Encoder.of(encoder, mean) for encoder, mean in parts if encoder is not None]

        return memoised(self, f"_{latent.sides[0]}_encoders", [*source, latent], made)

    def restored(self, rows: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The latents [B, G/N, S, R] of what the cache holds; packed ones in `dtype`, and others as they are."""
        return tuple(
            row
            if latent.widths is None or row.dtype != torch.uint8
            else levels_of(row, self.codebook(latent)).to(dtype)
            for latent, row in zip(self.layout.latents, rows, strict=True)
        )

    def rounded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """Latents [B, G/N, T, R] of keys and values [B, G, T, D] as they come back from the cache, without one.

        Gradients pass the quantisers as if they were not there (the straight-through estimator, arXiv 1308.3432).
        """
        vectors = {"key": keys, "value": values}
        return tuple(
            self._latent_of(latent, vectors) if latent.widths is None else self._rounded(latent, vectors)
            for latent in self.layout.latents
        )

    def _rounded(self, latent: Latent, vectors: dict[str, Tensor]) -> Tensor:
        codebook = self.codebook(latent)
        if not torch.is_grad_enabled():
            return levels_of(self._codes(latent, vectors), codebook).to(vectors[latent.sides[0]].dtype)
        z = self._latent_of(latent, vectors)
        found = levels_of(codes_of(z.detach(), codebook), codebook).to(z.dtype)
        return z + (found - z).detach() if z.requires_grad else found

    def latent(self, latents: tuple[Tensor, ...], side: str) -> Tensor:
        """The latent that keys, or values, are decoded from."""
        return latents[self.layout.index(side)]

    def decode(self, latent: Tensor, side: str) -> Tensor:
        """A latent [B, G/N, T, R] to the keys, or values, that are decoded from it, [B, G, T, D].

        Where they are stored as they are, they are given back.
        """
        decoder, mean = self.map_of(side, "decoder"), self.map_of(side, "mean")
        if getattr(self, decoder) is None:
            return latent
        x = latent @ self._by_latent(decoder)
        if getattr(self, mean) is not None:
            x = x + self._by_latent(mean)
        return x.unflatten(-1, (self.layout.of(side).heads, -1)).transpose(2, 3).flatten(1, 2)

    def decode_output(self, sums: Tensor, weight: Tensor | None = None) -> Tensor:
        """Attention's sums of value latents [B, H, T, R] to sums of values [B, H, T, D].

        Args:
            weight: [B, H, T, 1], the attention weight that latents were summed with, which the mean comes in with; None
                means 1.
        """
        decoder = self.by_head(self.map_of("value", "decoder"))
        if decoder is None:
            return sums
        x = by_group(sums, self.kv_heads) @ decoder
        mean = self.by_head(self.map_of("value", "mean"))
        if mean is not None:
            x = x + (mean if weight is None else mean * by_group(weight, self.kv_heads))
        return x.view(*sums.shape[:-1], self.head_dim)

    def for_each_head(self, latent: Tensor) -> Tensor:
        """A latent [B, G/N, S, R] once for every KV head that shares it: [B, G, S, R]."""
        return latent.repeat_interleave(self.kv_heads // latent.shape[1], dim=1)

    def query_in_latent_space(self, q: Tensor) -> tuple[Tensor, Tensor | None]:
        """Queries [B, H, T, D] without rotary positions as they meet latent keys, and what the mean adds to scores.

        Returns:
            `q @ U.T` [B, H, T, R_k], and `q . mean` [B, H, T, 1], or None for a basis through the origin.
        """
        decoder, mean = self.by_head("key_decoder"), self.by_head("key_mean")
        if decoder is None:
            return q, None
        grouped = by_group(q, len(decoder))
        offset = None if mean is None else (grouped @ mean.transpose(-1, -2)).view(*q.shape[:-1], 1)
        return (grouped @ decoder.transpose(-1, -2)).view(*q.shape[:-1], -1), offset

    def decoding_sides(self) -> tuple[Side, Side]:
        """How a step of decoding takes keys, and values, from the rows that the cache holds."""
        names = [f"{side}_{name}" for side in SIDES for name in ("decoder", "mean", "levels")]

        def side(name: str) -> Side:
            latent, mean = self.layout.of(name), self.by_head(self.map_of(name, "mean"))
            decoder = self.by_head(self.map_of(name, "decoder"))
            # Without a decoder a mean is of what was folded, or of what the softmax drops.
            mean = None if mean is None or decoder is None else mean.flatten(1)
            if latent.widths is None:
                return Side(self.layout.index(name), decoder, mean)
            levels = self.codebook(latent).levels.repeat_interleave(latent.heads, dim=0)  # [G, R, 4]
            return Side(self.layout.index(name), decoder, mean, latent.widths, levels)

        source = [*(getattr(self, name) for name in names), self.layout]
        return memoised(self, "_decoding_sides", source, lambda: (side("key"), side("value")))


def side_of(name: str) -> str:
    """Whose a map is: the key's or the value's."""
    return name.split("_")[0]


def joined(x: Tensor, latents: int) -> Tensor:
    """Vectors [B, G, T, D] of the heads that share a latent side by side: [B, G/N, T, N * D], of G/N latents."""
    return x if x.shape[1] == latents else x.unflatten(1, (latents, -1)).transpose(2, 3).flatten(3)


def local_part(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter that may be split over several."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def by_group(x: Tensor, kv_heads: int) -> Tensor:
    """[B, H or G, T, n] as rows of the KV heads they belong to, [B, G, H/G * T, n]."""
    return x.reshape(x.shape[0], kv_heads, -1, x.shape[-1])
