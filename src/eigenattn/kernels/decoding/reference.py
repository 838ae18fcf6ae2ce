"""Decoding written out by row and head, in fp32: the ground truth of the other backends."""

from __future__ import annotations

import torch
from torch import Tensor

from ...cache.codebook import OCTAVE, UNIT_SCALE, level_table
from ...cache.packing import unpack
from .arguments import Count, Side, Step


def _vectors(stored: Tensor, side: Side, g: int) -> Tensor:
    """Latents [n, R] or packed codes [n, bytes] of KV head g, decoded [n, D]."""
    z = stored.float()
    if side.widths is not None:
        widths, levels = side.codebook.widths, side.codebook.levels[g]
        planes = zip(
            widths.split(unpack(stored[:, : widths.of_codes], widths)), widths.split(levels, dim=0), strict=True
        )
        z = torch.cat(
            [level_table(of.float(), bits).T.gather(0, codes.long()) for (bits, codes), (_, of) in planes], dim=-1
        )
        if widths.scaled:
            z = z * 2.0 ** ((stored[:, -1:].float() - UNIT_SCALE) / OCTAVE)
    x = z if side.decoder is None else z @ side.decoder[g].float()
    return x if side.mean is None else x + side.mean[g].float()


def _at(count: Count | None, row: int) -> int:
    """The number that counts for a row."""
    if count is None:
        return 0
    return count if isinstance(count, int) else int(count[row])


def _of_head(stored: Tensor, g: int, kv_heads: int) -> Tensor:
    """Of what heads may share [G/N, ...], what KV head g has."""
    return stored[g // (kv_heads // len(stored))]


def decode(step: Step) -> Tensor:
    """See `eigenattn.kernels.decoding.Step`."""
    step = step.gathered()
    b, h = step.q.shape[:2]
    window, mask = step.window, step.mask
    if mask is not None:
        mask = mask.expand(b, h, -1)
    q = step.q.float()
    if step.rotary is not None:
        positions, query = (x.expand(b, *x.shape[1:]) for x in step.rotary_positions)
        q = step.rotary.rotate(q, query.unsqueeze(1))
    out = torch.zeros(b, h, step.size_out, device=step.q.device)
    for row in range(b):
        first, length = _at(step.first, row), _at(step.length, row)
        for head in range(h):
            g = head // (h // step.kv_heads)
            columns = torch.arange(step.far_keys.shape[2], device=out.device)
            if step.columns is not None:
                columns = _of_head(step.columns[row], g, step.kv_heads).long()
            seen = (columns >= first) & (columns < length)
            columns = columns[seen]
            latents = [_of_head(each[row], g, step.kv_heads)[seen] for each in step.rows]
            k, v = (_vectors(latents[side.row], side, g) for side in (step.keys, step.values))  # [n, D]
            if window is not None:
                column, stop = _at(window.column, row), _at(window.stop, row)
                from_, to = max(first, length) - column, min(stop - column, window.keys.shape[-2])
                slots = slice(max(from_, 0), max(from_, to, 0))
                k = torch.cat([k, window.keys[row, g, slots].float()])
                v = torch.cat([v, window.values[row, g, slots].float()])
                columns = torch.cat([columns, torch.arange(column + slots.start, column + slots.stop, device=k.device)])
            if step.rotary is not None:
                k = step.rotary.rotate(k, positions[row, columns])
            scores = k @ q[row, head] * step.scale
            if step.softcap is not None:
                scores = step.softcap * torch.tanh(scores / step.softcap)
            if step.slopes is not None:
                scores = scores + step.slopes[head] * (columns - length)
            if mask is not None:
                found = mask[row, head, columns]
                scores = scores.masked_fill(~found, float("-inf")) if found.dtype == torch.bool else scores + found
            if not (scores > float("-inf")).any():
                continue  # it sees nothing
            sink = scores.new_full((1,), float("-inf")) if step.sinks is None else step.sinks[head : head + 1].float()
            out[row, head] = torch.cat([scores, sink]).softmax(0)[:-1] @ v
    return out.to(step.q.dtype)
