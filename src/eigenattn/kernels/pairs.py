"""One query a row over latent keys that rotate, on a CPU in fp32: few passes over memory, few operations.

Decoding a token is many small operations, which cost a CPU more to start than to do, and a few large ones, bound by
memory. Here far keys are decoded into one buffer, near keys and queries are copied behind them, and all are rotated in
place by one product of complex numbers; the buffer is the same for all layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import cap_and_mask


def in_pairs(x: Tensor, width: int, interleaved: bool) -> Tensor:
    """A view of x [..., D] whose leading `width` dimensions lie pair by pair, as [..., width / 2, 2]."""
    rotating = x[..., :width]
    return rotating.unflatten(-1, (-1, 2)) if interleaved else rotating.unflatten(-1, (2, -1)).transpose(-1, -2)


def _put(into: Tensor, x: Tensor, width: int, interleaved: bool, scale: float = 1.0) -> None:
    """Write `scale * x` with its rotating dimensions pair by pair."""
    torch.mul(in_pairs(x, width, interleaved), scale, out=into[..., :width].unflatten(-1, (-1, 2)))
    if width < x.shape[-1]:
        torch.mul(x[..., width:], scale, out=into[..., width:])


def paired(x: Tensor | None, width: int, interleaved: bool) -> Tensor | None:
    """x [..., D] with its leading `width` dimensions pair by pair."""
    if x is None:
        return None
    found = torch.empty_like(x)
    _put(found, x, width, interleaved)
    return found


def attend_one_in_pairs(
    q: Tensor,
    far_keys: Tensor,
    far_values: Tensor,
    near_keys: Tensor,
    near_values: Tensor,
    *,
    decoder: Tensor | None,
    mean: Tensor | None,
    turns: Tensor,
    room: Tensor,
    interleaved: bool,
    seen: Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `eigenattn.kernels.windowed.attend_one`, but queries and keys come before rotation; without gradients.

    Args:
        q: [B, H, 1, D].
        far_keys: latents [B, G, F, R_k], or keys without a decoder; far_values: [B, G or fewer, F, V].
        near_keys, near_values: [B, G, N, D].
        decoder: [G, R_k, D] or None; mean: [G, 1, D] or None; both in pairs (`paired`).
        turns: complex rotations of F + N keys, and H/G times that of the query, [B or 1, G or 1, F + N + H/G,
            width / 2].
        room: [B, G, F + N + H/G, D], written over.
    """
    b, h, _, d = q.shape
    g, far, columns = far_keys.shape[1], far_keys.shape[2], far_keys.shape[2] + near_keys.shape[2]
    width = 2 * turns.shape[-1]
    if decoder is None:
        _put(room[:, :, :far], far_keys, width, interleaved)
    else:
        rows = room.flatten(0, 1)[:, :far]
        decoder, mean = (x if x is None or b == 1 else x.repeat(b, 1, 1) for x in (decoder, mean))
        if mean is None:
            torch.bmm(far_keys.flatten(0, 1), decoder, out=rows)
        else:
            torch.baddbmm(mean, far_keys.flatten(0, 1), decoder, out=rows)
    _put(room[:, :, far:columns], near_keys, width, interleaved)
    _put(room[:, :, columns:], q.reshape(b, g, h // g, d), width, interleaved, scale)
    torch.view_as_complex(room[..., :width].unflatten(-1, (-1, 2))).mul_(turns)
    keys, queries = room.flatten(0, 1).split([columns, h // g], dim=1)
    scores = torch.bmm(queries, keys.transpose(-1, -2)).view(b, h, 1, columns)
    weights = cap_and_mask(scores, seen, softcap).softmax(dim=-1)
    far_weights, near_weights = weights.view(b * g, h // g, columns).split([far, columns - far], dim=-1)
    latents = far_values.flatten(0, 1)
    far_sum = torch.bmm(far_weights.reshape(len(latents), b * h // len(latents), far), latents)
    near_sum = torch.bmm(near_weights, near_values.flatten(0, 1))
    far_weight = far_weights.sum(-1, keepdim=True)
    return far_sum.view(b, h, 1, -1), far_weight.view(b, h, 1, 1), near_sum.view(b, h, 1, -1), weights
