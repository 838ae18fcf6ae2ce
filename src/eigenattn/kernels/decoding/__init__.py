"""Attention of one query a row over latents: one signature, three backends.

`reference` is loops in fp32; `torch` is batched and runs anywhere; `triton` is fused: latents are read once, keys are
decoded, rotated and scored in registers, and nothing is written back but one partial sum a split of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import EigenAttnError
from ..selection import HAS_TRITON
from .arguments import Near, Problem, Rotary, Side
from .batched import decode as torch_decode
from .reference import decode as reference_decode

__all__ = ["DECODE_BACKENDS", "Near", "Rotary", "Side", "decode", "default_backend"]


def _triton_decode(problem: Problem) -> Tensor:
    if not HAS_TRITON:
        raise EigenAttnError("the triton backend needs triton: pip install 'eigenattn[triton]'.")
    from .fused import decode as fused_decode

    return fused_decode(problem)


DECODE_BACKENDS: dict[str, Callable[[Problem], Tensor]] = {
    "reference": reference_decode,
    "torch": torch_decode,
    "triton": _triton_decode,
}


def default_backend(q: Tensor) -> str:
    """`triton` on a GPU that has it, else `torch`."""
    return "triton" if q.is_cuda and HAS_TRITON else "torch"


def decode(
    q: Tensor,
    far_keys: Tensor,
    far_values: Tensor,
    *,
    keys: Side,
    values: Side,
    scale: float,
    length: Tensor,
    first: Tensor | None = None,
    position: Tensor | None = None,
    rotary: Rotary | None = None,
    slopes: Tensor | None = None,
    near: Near | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention of one query a row over latents, and over the exact window if there is one.

    Columns count the tokens of a row from 0. Row b sees columns first[b] .. length[b] - 1 through latents and, of the
    window, the later ones before `near.stop[b]`; a row that sees nothing gives zeros. Everything beyond is never read,
    so rows may differ in length and tensors may have room to spare.

    Args:
        q: queries [B, H, D], with rotary positions already rotated to their own, scaling included. Where keys have no
            decoder and do not rotate, [B, H, R_k].
        far_keys: latents [B, G, S, R_k], or packed codes in uint8 [B, G, S, bytes]; [B, G/N, ...] where N heads share.
        far_values: latents [B, G, S, R_v], or packed codes.
        keys, values: how they are decoded. Without a decoder of values the output stays in their space.
        scale: multiplies the scores.
        length, first: int32 [B]; `first` is 0 by default, and is the padding of rows padded on the left.
        position: position of column 0, int32 [B], negative under padding; `-first` by default.
        rotary: rotates each decoded key, and each of the window, to its own position.
        slopes: ALiBi: `slope * column` joins the scores, [H] in fp32.
        near: the exact window.
        mask: joins the scores by column, [B or 1, H or 1, columns]: boolean (True is visible) or additive. It may hide
            some of what the other arguments let a row see, and shows nothing more.
        softcap: scores become `softcap * tanh(scores / softcap)` before slopes and mask.
        backend: one of `DECODE_BACKENDS`; by default `default_backend`.

    Returns:
        [B, H, D], or [B, H, R_v] without a decoder of values, in the dtype of the queries.

    Raises:
        EigenAttnError: on an unknown backend, on shapes that do not fit, or without Triton where it is asked for.
    """
    name = backend or default_backend(q)
    if name not in DECODE_BACKENDS:
        raise EigenAttnError(f"unknown decoding backend {name!r}: choose one of {', '.join(DECODE_BACKENDS)}.")
    if first is None:
        first = torch.zeros_like(length)
    problem = Problem(
        q=q,
        far_keys=far_keys,
        far_values=far_values,
        keys=keys,
        values=values,
        scale=scale,
        length=length,
        first=first,
        position=-first if position is None else position,
        rotary=rotary,
        slopes=slopes,
        near=near,
        mask=mask,
        softcap=softcap,
    )
    _check(problem)
    return DECODE_BACKENDS[name](problem)


def _check(problem: Problem) -> None:
    """Raise an `EigenAttnError` on shapes that do not fit."""
    size, heads = problem.q.shape[-1], problem.q.shape[1]
    for name, side, latents in (
        ("keys", problem.keys, problem.far_keys),
        ("values", problem.values, problem.far_values),
    ):
        stored = latents.shape[-1]
        if side.widths is not None and side.levels is None:
            raise EigenAttnError(f"packed {name} need levels.")
        if side.widths is not None and stored != side.widths.bytes:
            raise EigenAttnError(f"packed {name} of {stored} bytes do not have the widths {tuple(side.widths)}.")
        rank = stored if side.widths is None else side.widths.channels
        if side.decoder is not None and side.decoder.shape[1:] != (
            rank,
            size if name == "keys" else side.decoder.shape[2],
        ):
            raise EigenAttnError(f"latent {name} of rank {rank} do not fit a decoder {tuple(side.decoder.shape)}.")
        if problem.kv_heads % latents.shape[1]:
            raise EigenAttnError(
                f"{latents.shape[1]} latents of {name} are not shared evenly by {problem.kv_heads} heads."
            )
        if name == "keys" and side.decoder is None and rank != size:
            raise EigenAttnError(f"queries of size {size} meet keys of size {rank}, and there is no decoder.")
    mask = problem.mask
    if mask is not None and (
        mask.dim() != 3 or mask.shape[0] not in (1, len(problem.q)) or mask.shape[1] not in (1, heads)
    ):
        raise EigenAttnError(f"a mask is [B or 1, H or 1, columns], not {list(mask.shape)}.")
    if heads % problem.kv_heads:
        raise EigenAttnError(f"{heads} query heads do not share {problem.kv_heads} KV heads evenly.")
    if problem.near is not None and problem.size_out != problem.near.values.shape[-1]:
        raise EigenAttnError("with an exact window, far values need a decoder or full rank.")
