"""Attention over pages of latents: plain PyTorch, which knows nothing of vLLM.

Queries that are few to a row are decoded together by `eigenattn.kernels.decoding`, which reads pages itself. Those of
prompts attend row by row, and meet the keys in chunks (`eigenattn.kernels.chunked`).
"""

from __future__ import annotations

import dataclasses
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
from ..kernels.selection import decoding_backend
from ..models.attention import EigenAttention
from ..models.maps import LatentMaps
from ..models.rotary import rotate
from .pages import Pages


def rotary_of(layer: EigenAttention) -> Rotary | None:
    """Rotary positions of a layer, which may be without memory; None if it does not rotate.

    Raises:
        EigenAttnError: if it rotates otherwise than by frequencies that all layers have.
    """
    if not layer.rotates:
        return None
    device = torch.get_default_device()
    with torch.device("cpu"):
        module: Any = type(layer.rotary_module)(layer.config)
        if not layer.by_layer_type:
            found = Rotary(module.inv_freq.float(), float(module.attention_scaling), layer.family.interleaved)
            # The engine's default dtype is the model's.
            x = torch.linspace(1, 2, 4 * layer.head_dim, dtype=torch.float32).view(1, 1, 4, -1)
            positions = torch.tensor([[0, 1, 7, 300]])
            expected = rotate(x, *layer.laid_out(module(x, positions)), layer.family.interleaved)
            if torch.allclose(found.rotate(x, positions), expected, rtol=1e-3, atol=1e-3):
                frequencies = found.inverse_frequencies.to(device)
                return dataclasses.replace(found, inverse_frequencies=frequencies)
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
    """

    maps: LatentMaps
    scale: float
    rotary: Rotary | None = None
    slopes: Tensor | None = None
    softcap: float | None = None

    def rotated(self, x: Tensor, start: int) -> Tensor:
        """Vectors [1, heads, n, D] at positions `start` and on; untouched without rotary positions."""
        return x if self.rotary is None else self.rotary.rotate_between(x, start, start + x.shape[-2])


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


def decode_queries(layer: PagedAttention, q: Tensor, batch: Queries, far: Pages, near: Pages | None) -> Tensor:
    """Queries [b, H, D] before rotation, over latents and the exact window, if there is one: [b, H, D]."""
    lengths, window = batch.lengths, layer.maps.layout.window
    keys, values = layer.maps.decoding_sides()
    exact = None
    if near is not None:
        near_keys, near_values = near.rows
        exact = Window(near_keys, near_values, 0, lengths, near.table)
    step = Step(
        q=q,
        query=lengths - 1,
        rows=far.rows,
        table=far.table,
        keys=keys,
        values=values,
        scale=layer.scale,
        length=batch.context.memoised(("border", window), lambda: (lengths - window).clamp_min(0)),
        positions=None if layer.rotary is None else batch.positions,
        rotary=layer.rotary,
        slopes=layer.slopes,
        window=exact,
        softcap=layer.softcap,
        memoised=batch.context.memoised,
    )
    return decode_accepted(step, accepted(step, decoding_backend(q)))


def attend_prompt(layer: PagedAttention, q: Tensor, length: int, far: Pages, near: Pages | None) -> Tensor:
    """The last T of a row's tokens.

    Args:
        q: their queries before rotation [T, H, D].
        length: the row's tokens, the queries' included.

    Returns:
        [T, H, D].
    """
    maps, t, window = layer.maps, q.shape[0], layer.maps.layout.window
    query = length - t
    columns = torch.arange(length, device=q.device)
    q = layer.rotated(q.transpose(0, 1).unsqueeze(0), query)  # [1, H, T, D]

    def decode_chunk(start: int, stop: int) -> tuple[Tensor, Tensor]:
        chunk = columns[start:stop]
        latents = maps.restored(far.at(chunk), q.dtype)
        keys, values = (maps.latent(latents, side) for side in SIDES)
        values = maps.for_each_head(values) if near is None else maps.decode(values, "value")
        return layer.rotated(maps.decode(keys, "key"), start), values

    exact = None
    if near is not None:
        first = max(query - window + 1, 0)
        keys, values = near.at(columns[first:])
        exact = Near(layer.rotated(keys, first), values, first)
    mask = None if layer.slopes is None else bias_of(layer.slopes, columns)
    parts = chunked.attend(
        q,
        q,
        decode_chunk,
        exact,
        chunked.Scoring(mask, layer.scale, layer.softcap),
        size=maps.layout.of("value").rank,
        tokens=length,
        window=window,
        query_first=query,
    )
    out = parts.out.to(q.dtype)
    return (maps.decode_output(out) if near is None else out)[0].transpose(0, 1)


def bias_of(slopes: Tensor, columns: Tensor) -> chunked.Mask:
    """ALiBi as tiles of an additive mask, in fp32: half precision does not tell far columns apart.

    Args:
        slopes: of each query head [H].
        columns: of all keys, [S].
    """

    def tile(start: int, stop: int, low: int, high: int) -> Tensor:
        found = slopes.view(1, -1, 1, 1) * (columns[low:high] - len(columns))  # [1, H, 1, keys]
        return found.float().expand(-1, -1, stop - start, -1)

    return tile
