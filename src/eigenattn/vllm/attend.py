"""Attention over pages of latents: plain PyTorch, which knows nothing of vLLM.

Rows with one query each are decoded together by `eigenattn.kernels.decoding`. Prompts attend one by one, and meet the
keys in chunks (`eigenattn.kernels.chunked`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..cache.context import CacheContext
from ..cache.layout import Layout
from ..kernels import chunked
from ..kernels.decoding import Rotary, Side, Step, Window, accepted, decode_accepted
from ..kernels.selection import decoding_backend
from ..models.attention import EigenAttention
from .pages import Pages, from_page


def rotary_of(layer: EigenAttention) -> Rotary | None:
    """Rotary positions of a layer, which may be without memory; None if it does not rotate."""
    if not layer.rotates:
        return None
    with torch.device("cpu"):
        module: Any = type(layer.rotary_module)(layer.config)
    frequencies = module.inv_freq.float().to(torch.get_default_device())
    return Rotary(frequencies, float(module.attention_scaling), layer.family.interleaved)


def slopes_of(layer: EigenAttention) -> Tensor | None:
    """ALiBi's slope of each query head [H] in fp32; None with other positions."""
    if layer.family.positions_of(layer.config) != "alibi":
        return None
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    # Of two keys the second one is at distance 0, and the first has minus the slope.
    return -build_mpt_alibi_tensor(layer.heads, 2, device=torch.get_default_device())[:, 0, 0].float()


def bias_of(slopes: Tensor, columns: Tensor, dtype: torch.dtype) -> chunked.Mask:
    """ALiBi as tiles of an additive mask.

    Args:
        slopes: of each query head [H].
        columns: of all keys, [S].
    """

    def tile(start: int, stop: int, low: int, high: int) -> Tensor:
        found = slopes.view(1, -1, 1, 1) * (columns[low:high] - len(columns))  # [1, H, 1, keys]
        return found.to(dtype).expand(-1, -1, stop - start, -1)

    return tile


@dataclass(frozen=True)
class PagedAttention:
    """How a layer attends over its pages.

    Args:
        layout: what a token leaves in them.
        keys, values: how latents become vectors; values have no decoder where it is folded into the output projection.
        scale: multiplies the scores.
        rotary: rotates queries and keys, or None.
        slopes: ALiBi's slope of each query head [H] in fp32, or None.
    """

    layout: Layout
    keys: Side
    values: Side
    scale: float
    rotary: Rotary | None = None
    slopes: Tensor | None = None

    @property
    def window(self) -> int:
        """Exact tokens, W."""
        return self.layout.window

    @property
    def size_out(self) -> int:
        """Size of the output a head: D, or R_v if values are not decoded."""
        return self.layout.of("value").rank if self.values.decoder is None else self.values.decoder.shape[-1]

    def rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        """Vectors [..., n, D] at positions [..., n]; untouched without rotary positions."""
        return x if self.rotary is None else self.rotary.rotate(x.float(), positions).to(x.dtype)

    def vectors(self, latents: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Keys, before rotation, and values [B, G, S, D] of latents [B, G/N, S, R]; values R_v without a decoder."""
        keys, values = (_decoded(latents[side.row], side) for side in (self.keys, self.values))
        return keys, values


def _decoded(latents: Tensor, side: Side) -> Tensor:
    if side.decoder is None:
        return latents
    by_latent = side.decoder.unflatten(0, (latents.shape[1], -1))  # [G/N, N, R, D]
    x = (latents.unsqueeze(2) @ by_latent).flatten(1, 2)
    return x if side.mean is None else x + side.mean.unsqueeze(1)


@dataclass(frozen=True)
class DecodingRows:
    """Rows of similar length with one query each, to all layers of a pass.

    Args:
        rows: rows of the block table, int64 [b].
        tokens: their queries in the batch, int64 [b].
        lengths: tokens of each, its query's included, int32 [b].
        longest: the largest of them.
        positions: of columns 0 .. longest - 1 at least, int32 [1, n].
        context: what the layers compute once for all.
    """

    rows: Tensor
    tokens: Tensor
    lengths: Tensor
    longest: int
    positions: Tensor
    context: CacheContext = field(default_factory=CacheContext, repr=False, compare=False)


def decode_rows(layer: PagedAttention, q: Tensor, batch: DecodingRows, far: Pages, near: Pages | None) -> Tensor:
    """One query a row.

    Args:
        q: queries before rotation [b, H, D or R_k].
        far, near: latents, and the exact window if there is one.

    Returns:
        [b, H, D or R_v].
    """
    lengths, window = batch.lengths, None
    if near is not None:
        column = lengths - layer.window
        columns = column.unsqueeze(-1) + torch.arange(layer.window, device=q.device)  # [b, W]
        k, v = near.at(batch.rows, columns.clamp_min(0).long()).chunk(2, dim=-1)
        window = Window(k, v, column, lengths)
    step = Step(
        q=q,
        query=lengths - 1,
        rows=from_page(layer.layout, far.first(batch.rows, max(batch.longest - layer.window, 0))),
        keys=layer.keys,
        values=layer.values,
        scale=layer.scale,
        length=(lengths - layer.window).clamp_min(0),
        positions=None if layer.rotary is None else batch.positions,
        rotary=layer.rotary,
        slopes=layer.slopes,
        window=window,
        memoised=batch.context.memoised,
    )
    return decode_accepted(step, accepted(step, decoding_backend(q)))


def attend_prompt(layer: PagedAttention, q: Tensor, row: Tensor, length: int, far: Pages, near: Pages | None) -> Tensor:
    """The last T tokens of one row.

    Args:
        q: their queries before rotation [T, H, D or R_k].
        row: which row of the tables it is, int64 [1].
        length: its tokens, the queries' included.

    Returns:
        [T, H, D or R_v].
    """
    t, window = q.shape[0], layer.window
    query = length - t
    columns = torch.arange(length, device=q.device)
    q = layer.rotated(q.transpose(0, 1), columns[query:]).unsqueeze(0)  # [1, H, T, D]

    def decode_chunk(start: int, stop: int) -> tuple[Tensor, Tensor]:
        chunk = columns[start:stop]
        keys, values = layer.vectors(from_page(layer.layout, far.at(row, chunk.unsqueeze(0))))
        return layer.rotated(keys, chunk), values

    mask = None if layer.slopes is None else bias_of(layer.slopes, columns, q.dtype)
    if near is None:
        parts = chunked.Parts(q, layer.size_out)
    else:
        first = max(query - window + 1, 0)
        keys, values = near.at(row, columns[first:].unsqueeze(0)).chunk(2, dim=-1)
        parts = chunked.attend_near(
            q,
            layer.rotated(keys, columns[first:]),
            values,
            window=window,
            key_first=first,
            query_first=query,
            mask=mask,
            scale=layer.scale,
            softcap=None,
        )
    chunked.attend_far(
        parts,
        q,
        decode_chunk,
        keys=max(length - window, 0),
        seen_by_all=max(query - window + 1, 0),
        first=query - window,
        mask=mask,
        scale=layer.scale,
        softcap=None,
    )
    return parts.out[0].transpose(0, 1).to(q.dtype)
