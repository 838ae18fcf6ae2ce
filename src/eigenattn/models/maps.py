"""The maps of one attention layer: vectors to latents, to what the cache holds, and back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..cache.codebook import DEGREE, Codebook
from ..cache.packing import Widths, pack, unpack
from ..config import Sharing
from .kept import kept

# A side at full rank needs none of these. Maps are stored as [G * R, D] and means as [G * D], so that tensor
# parallelism can split them by head. Where N KV heads share a latent, maps are [G/N * R, N * D]; keys and values may
# have an N of their own. Where a token's keys and values share one, both sides' maps are to and from it, and R is its
# rank.
MAPS = ("key_encoder", "key_decoder", "key_mean", "value_encoder", "value_decoder", "value_mean")
# What codes of each channel of a quantised latent stand for (`eigenattn.cache.codebook`): stored as [G * R, 4]. A joint
# latent's stand where the keys' do.
QUANTISERS = ("key_levels", "value_levels")


class LatentMaps(nn.Module):
    """What a layer's encoders, decoders, means and quantisers do to keys, values, queries and sums.

    The layer that inherits it has registered `MAPS` and `QUANTISERS`, and sets what is annotated here.
    """

    heads: int
    kv_heads: int
    head_dim: int
    sharing: Sharing
    rank_k: int
    rank_v: int
    widths_k: Widths | None
    widths_v: Widths | None

    @property
    def joint(self) -> bool:
        """Whether a token's keys and values share a latent: it stands where those of keys do, and values have none."""
        return self.rank_v == 0

    def rank_of(self, side: str) -> int:
        """Size of the latents that keys, or values, are decoded from."""
        return self.rank_k if side == "key" or self.joint else self.rank_v

    def shared_heads(self, side: str) -> int:
        """KV heads that share a latent of keys, or of values: N."""
        return self.sharing.keys if side == "key" else self.sharing.values

    def latent_heads(self, side: str) -> int:
        """Latents of keys, or of values, that a token has: G/N."""
        return self.kv_heads // self.shared_heads(side)

    def latent_dim(self, side: str) -> int:
        """What a latent is made of, and its full rank: N * D."""
        return self.shared_heads(side) * self.head_dim

    def _by_latent(self, name: str) -> Tensor:
        """A run-time map as [G/N, R, N * D], or a mean as [G/N, 1, N * D]."""
        stored, side = local_part(getattr(self, name)), side_of(name)
        return stored.view(-1, 1 if stored.dim() == 1 else self.rank_of(side), self.latent_dim(side))

    def by_head(self, name: str) -> Tensor | None:
        """A decoder as [G, R, D], or a mean as [G, 1, D]; None where the side has none."""
        shared, stored = self.shared_heads(side_of(name)), getattr(self, name)
        if stored is None or shared == 1:
            return None if stored is None else self._by_latent(name)

        def apart() -> Tensor:
            return self._by_latent(name).unflatten(-1, (shared, -1)).transpose(1, 2).flatten(0, 1)

        trains = stored.requires_grad and torch.is_grad_enabled()
        return apart() if trains else kept(self, f"_{name}_by_head", [stored], apart)

    def encode(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, T, D] to latents [B, G/N, T, R]; what is latent already, or at full rank, passes.

        A joint latent comes in the place of the keys', and nothing, [B, G/N, T, 0], in that of the values'.
        """
        latents_k, latents_v = self._encode(keys, "key"), self._encode(values, "value")
        if self.joint:
            latents_k = latents_k + latents_v
            latents_v = latents_k[..., :0]
        return latents_k, latents_v

    def _encode(self, x: Tensor, side: str) -> Tensor:
        if getattr(self, f"{side}_encoder") is None:
            return x
        x = joined(x, self.latent_heads(side))
        if getattr(self, f"{side}_mean") is not None:
            x = x - self._by_latent(f"{side}_mean")
        return x @ self._by_latent(f"{side}_encoder").transpose(-1, -2)

    def codebook(self, side: str) -> Codebook:
        """The quantisers of latents that keys, or values, are decoded from."""
        side = "key" if self.joint else side
        stored, widths = getattr(self, f"{side}_levels"), self.widths_k if side == "key" else self.widths_v

        def made() -> Codebook:
            return Codebook.of(local_part(stored).detach().view(self.latent_heads(side), -1, DEGREE + 1), widths)

        return kept(self, f"_{side}_codebook", [stored, widths], made)

    def stored(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What the cache holds of keys and values [B, G, T, D]: latents [B, G/N, T, R], or bytes of packed codes.

        Bytes carry no gradients: quantised models are trained without a cache.
        """
        latents_k, latents_v = self.encode(keys, values)
        if self.widths_k is None:
            return latents_k, latents_v
        packed = self._packed(latents_k, "key")
        return packed, packed[..., :0] if self.joint else self._packed(latents_v, "value")

    def _packed(self, latents: Tensor, side: str) -> Tensor:
        codebook = self.codebook(side)
        return pack(codebook.quantise(latents), codebook.widths)

    def restored(self, keys: Tensor, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Latents [B, G/N, S, R] to decode keys and values from, of what the cache holds; packed ones in `dtype`."""
        if self.widths_k is not None:
            keys = self._unpacked(keys, "key", dtype)
            values = values if self.joint else self._unpacked(values, "value", dtype)
        return keys, keys if self.joint else values

    def _unpacked(self, packed: Tensor, side: str, dtype: torch.dtype) -> Tensor:
        codebook = self.codebook(side)
        return codebook.dequantise(unpack(packed, codebook.widths)).to(dtype)

    def rounded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, G/N, T, R] of keys and values [B, G, T, D] as they come back from the cache, without one.

        Gradients pass the quantisers as if they were not there (the straight-through estimator, arXiv 1308.3432).
        """
        latents_k, latents_v = self.encode(keys, values)
        if self.widths_k is not None:
            latents_k = self._rounded(latents_k, "key")
            latents_v = latents_v if self.joint else self._rounded(latents_v, "value")
        return latents_k, latents_k if self.joint else latents_v

    def _rounded(self, latents: Tensor, side: str) -> Tensor:
        codebook = self.codebook(side)
        found = codebook.dequantise(codebook.quantise(latents.detach())).to(latents.dtype)
        return latents + (found - latents).detach() if latents.requires_grad else found

    def decode(self, latents: Tensor, side: str) -> Tensor:
        """Latents [B, G/N, T, R] of keys or values to vectors [B, G, T, D]; at full rank they are those already."""
        if getattr(self, f"{side}_decoder") is None:
            return latents
        x = latents @ self._by_latent(f"{side}_decoder")
        if getattr(self, f"{side}_mean") is not None:
            x = x + self._by_latent(f"{side}_mean")
        return x.unflatten(-1, (self.shared_heads(side), -1)).transpose(2, 3).flatten(1, 2)

    def decode_output(self, sums: Tensor, weight: Tensor | None = None) -> Tensor:
        """Attention's sums of value latents [B, H, T, R] to sums of values [B, H, T, D].

        Args:
            weight: [B, H, T, 1], the attention weight that latents were summed with, which the mean comes in with; None
                means 1.
        """
        if self.value_decoder is None:
            return sums
        x = _by_group(sums, self.kv_heads) @ self.by_head("value_decoder")
        if self.value_mean is not None:
            mean = self.by_head("value_mean")
            x = x + (mean if weight is None else mean * _by_group(weight, self.kv_heads))
        return x.view(*sums.shape[:-1], self.head_dim)

    def for_each_head(self, latents: Tensor) -> Tensor:
        """Latents [B, G/N, S, R] once for every KV head that shares them: [B, G, S, R]."""
        return latents.repeat_interleave(self.kv_heads // latents.shape[1], dim=1)

    def query_in_small_space(self, q: Tensor) -> Tensor:
        """Queries [B, H, T, D] without rotary positions, to meet latent keys: `q @ U.T`, [B, H, T, R_k]."""
        decoder = self.by_head("key_decoder")
        return (_by_group(q, decoder.shape[0]) @ decoder.transpose(-1, -2)).view(*q.shape[:-1], -1)

    def query_on_mean(self, q: Tensor) -> Tensor | None:
        """`q . mean` [B, H, T, 1], or None for a basis through the origin."""
        if self.key_mean is None:
            return None
        mean = self.by_head("key_mean")
        return (_by_group(q, mean.shape[0]) @ mean.transpose(-1, -2)).view(*q.shape[:-1], 1)


def side_of(name: str) -> str:
    """Whose a map is: the key's or the value's."""
    return name.split("_")[0]


def joined(x: Tensor, latents: int) -> Tensor:
    """Vectors [B, G, T, D] of the heads that share a latent side by side: [B, G/N, T, N * D], of G/N latents."""
    return x if x.shape[1] == latents else x.unflatten(1, (latents, -1)).transpose(2, 3).flatten(3)


def local_part(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter that may be split over several."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def _by_group(x: Tensor, kv_heads: int) -> Tensor:
    """[B, H or G, T, n] as rows of the KV heads they belong to, [B, G, H/G * T, n]."""
    return x.reshape(x.shape[0], kv_heads, -1, x.shape[-1])
