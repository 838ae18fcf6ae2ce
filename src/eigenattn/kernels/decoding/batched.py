"""Decoding in PyTorch's batched operations, on any device, in the dtype of the queries."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...cache.packing import unpack
from ..pairs import in_pairs
from .arguments import Problem, Rotary, Side
from .reference import rotate_to


def _latents(stored: Tensor, side: Side, g: int, dtype: torch.dtype) -> Tensor:
    """[B, G, S, R] from what is stored, once for each head that shares it."""
    if stored.shape[1] < g:
        stored = stored.repeat_interleave(g // stored.shape[1], dim=1)
    if side.widths is None:
        return stored
    return side.codebook.dequantise(unpack(stored, side.widths)).to(dtype)


def _rotation(dtype: torch.dtype, rotary: Rotary) -> tuple[Callable[[Tensor], Tensor], Callable[..., Tensor]]:
    """How to order the dimensions of new vectors, and how to rotate vectors so ordered to positions.

    In fp32 pairs lie side by side and are rotated in place by one product of complex numbers; PyTorch has no complex
    numbers of half precision that run everywhere.
    """
    if dtype != torch.float32:
        return (lambda x: x), (lambda x, positions: rotate_to(x.float(), positions, rotary).to(dtype))

    def arrange(x: Tensor) -> Tensor:
        pairs = in_pairs(x, rotary.width, rotary.interleaved).flatten(-2)
        return torch.cat([pairs, x[..., rotary.width :]], dim=-1)

    def turn(x: Tensor, positions: Tensor) -> Tensor:
        angles = positions.unsqueeze(-1) * rotary.inverse_frequencies.float()
        pairs = torch.view_as_complex(x[..., : rotary.width].unflatten(-1, (-1, 2)))
        pairs.mul_(torch.polar(torch.full_like(angles, rotary.scaling), angles))
        return x

    return arrange, turn


def _masked(scores: Tensor, seen: Tensor, mask: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [B, G, H/G, S], and who sees whom, with a mask [B or 1, H or 1, columns] looked up by column [B, S]."""
    b, g, members, s = scores.shape
    heads = mask.shape[1]
    places = columns.clamp(0, mask.shape[-1] - 1)[:, None].expand(b, heads, s)
    found = mask.expand(b, -1, -1).gather(-1, places).unflatten(1, (g, members) if heads > 1 else (1, 1))
    return (scores, seen & found) if found.dtype == torch.bool else (scores + found.float(), seen)


def decode(problem: Problem) -> Tensor:
    """See `eigenattn.kernels.decoding.decode`."""
    q, near, rotary = problem.q, problem.near, problem.rotary
    b, h = q.shape[:2]
    g, far = problem.kv_heads, problem.far_keys.shape[2]
    keys, values = problem.keys, problem.values
    q = q.view(b, g, h // g, -1)
    z_k, z_v = _latents(problem.far_keys, keys, g, q.dtype), _latents(problem.far_values, values, g, q.dtype)
    columns = torch.arange(far, device=q.device).expand(b, far)
    if rotary is None:
        q_far = q if keys.decoder is None else q @ keys.decoder.transpose(-1, -2)
        scores = (q_far @ z_k.transpose(-1, -2)).float()  # [B, G, H/G, S]
        if keys.mean is not None:
            scores = scores + (q @ keys.mean.unsqueeze(-1)).float()
    else:
        arrange, turn = _rotation(q.dtype, rotary)
        q = arrange(q)
        k = arrange(z_k) if keys.decoder is None else z_k @ arrange(keys.decoder)
        if keys.mean is not None:
            k = k + arrange(keys.mean).unsqueeze(1)
        k = turn(k, (columns + problem.position.unsqueeze(-1)).unsqueeze(1))
        scores = (q @ k.transpose(-1, -2)).float()
    seen = (columns >= problem.first.unsqueeze(-1)) & (columns < problem.length.unsqueeze(-1))  # [B, S]
    if near is not None:
        near_columns = near.column.unsqueeze(-1) + torch.arange(near.keys.shape[-2], device=q.device)  # [B, N]
        k = near.keys
        if rotary is not None:
            positions = (near_columns + problem.position.unsqueeze(-1)).unsqueeze(1)
            k = turn(arrange(k), positions)
        scores = torch.cat([scores, (q @ k.transpose(-1, -2)).float()], dim=-1)
        floor = torch.maximum(problem.first, problem.length).unsqueeze(-1)
        near_seen = (near_columns >= floor) & (near_columns < near.stop.unsqueeze(-1))
        seen, columns = torch.cat([seen, near_seen], dim=-1), torch.cat([columns, near_columns], dim=-1)
    scores = scores * problem.scale
    if problem.softcap is not None:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    if problem.slopes is not None:
        distance = (columns - problem.length.unsqueeze(-1))[:, None, None]
        scores = scores + problem.slopes.view(g, h // g, 1) * distance
    seen = seen[:, None, None]  # [B, 1, 1, S + N]
    if problem.mask is not None:
        scores, seen = _masked(scores, seen, problem.mask, columns)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1).masked_fill(~seen, 0.0)  # a row may see nothing
    far_weights = weights[..., :far].to(q.dtype)
    # What no query sees may be anything, NaN too, and 0 * NaN is no zero.
    anyone = seen.flatten(1, 2).any(1)[:, None, :, None]  # [B, 1, S + N, 1]
    out = far_weights @ z_v.masked_fill(~anyone[:, :, :far], 0)
    if values.decoder is not None:
        out = out @ values.decoder
    if values.mean is not None:
        out = out + weights[..., :far].sum(-1, keepdim=True).to(q.dtype) * values.mean.unsqueeze(1)
    if near is not None:
        near_values = near.values.masked_fill(~anyone[:, :, far:], 0)
        out = out + weights[..., far:].to(q.dtype) @ near_values
    return out.reshape(b, h, -1)
