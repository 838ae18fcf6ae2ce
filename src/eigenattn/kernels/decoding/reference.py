"""Decoding written out by row and head, in fp32: the ground truth of the other backends."""

from __future__ import annotations

import torch
from torch import Tensor

from ...cache.codebook import level_table
from ...cache.packing import BITS, unpack
from .arguments import Problem, Rotary, Side


def rotate_to(x: Tensor, positions: Tensor, rotary: Rotary) -> Tensor:
    """Rotate vectors [..., n, D] in fp32 to their positions [..., n]."""
    angles = positions.unsqueeze(-1) * rotary.inverse_frequencies.float()
    cos, sin = angles.cos() * rotary.scaling, angles.sin() * rotary.scaling
    first, second = (x[..., dims] for dims in rotary.pairs())
    turned = [first * cos - second * sin, second * cos + first * sin]
    together = torch.stack(turned, dim=-1).flatten(-2) if rotary.interleaved else torch.cat(turned, dim=-1)
    return torch.cat([together, x[..., rotary.width :]], dim=-1)


def _vectors(stored: Tensor, side: Side, g: int) -> Tensor:
    """Latents [n, R] or packed codes [n, bytes] of KV head g, decoded [n, D]."""
    z = stored.float()
    if side.widths is not None:
        planes = zip(
            BITS, unpack(stored, side.widths).split(side.widths, dim=-1), side.levels[g].split(side.widths), strict=True
        )
        z = torch.cat([level_table(of.float(), bits).T.gather(0, codes.long()) for bits, codes, of in planes], dim=-1)
    x = z if side.decoder is None else z @ side.decoder[g].float()
    return x if side.mean is None else x + side.mean[g].float()


def decode(problem: Problem) -> Tensor:
    """See `eigenattn.kernels.decoding.decode`."""
    b, h = problem.q.shape[:2]
    near, mask = problem.near, problem.mask
    if mask is not None:
        mask = mask.expand(b, h, -1)
    out = torch.zeros(b, h, problem.size_out, device=problem.q.device)
    for row in range(b):
        first, length = int(problem.first[row]), int(problem.length[row])
        for head in range(h):
            g = head // (h // problem.kv_heads)
            k, v = (
                _vectors(latents[row, g // (problem.kv_heads // latents.shape[1]), first:length], side, g)  # [n, D]
                for latents, side in ((problem.far_keys, problem.keys), (problem.far_values, problem.values))
            )
            columns = torch.arange(first, max(first, length), device=k.device)
            if near is not None:
                column, stop = int(near.column[row]), int(near.stop[row])
                from_, to = max(first, length) - column, min(stop - column, near.keys.shape[-2])
                slots = slice(max(from_, 0), max(from_, to, 0))
                k = torch.cat([k, near.keys[row, g, slots].float()])
                v = torch.cat([v, near.values[row, g, slots].float()])
                columns = torch.cat([columns, torch.arange(column + slots.start, column + slots.stop, device=k.device)])
            if problem.rotary is not None:
                k = rotate_to(k, columns + problem.position[row], problem.rotary)
            scores = k @ problem.q[row, head].float() * problem.scale
            if problem.softcap is not None:
                scores = problem.softcap * torch.tanh(scores / problem.softcap)
            if problem.slopes is not None:
                scores = scores + problem.slopes[head] * (columns - length)
            if mask is not None:
                found = mask[row, head, columns]
                scores = scores.masked_fill(~found, float("-inf")) if found.dtype == torch.bool else scores + found
            if not (scores > float("-inf")).any():
                continue  # it sees nothing
            out[row, head] = scores.softmax(0) @ v
    return out.to(problem.q.dtype)
