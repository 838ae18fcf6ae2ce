"""Attention of many queries on a CPU, where a processor multiplies matrices of bf16."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from .native_library import address, library, multiplies
from .selection import decoding_backend

_ARGUMENTS = struct.Struct("=20q13qdq")


def joins_natively(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `join_natively` takes these: of one dtype, and no gradients are asked for."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    known = q.dtype in (torch.float32, torch.bfloat16) and q.dtype == k.dtype == v.dtype
    return known and all(x.stride(-1) == 1 for x in (q, k, v)) and decoding_backend(q) == "native" and multiplies()


def join_natively(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    first: int,
    window: int | None = None,
    seen_by_all: int = 0,
    hidden: Tensor | None = None,
    column: int = 0,
    scale: float,
) -> None:
    """Attention in which query i sees the last `window` of the keys `n <= first + i`, and those `n < seen_by_all`.

    Args:
        q: [B, H, T, D]; k: [B, G, N, D]; v: [B, G, N, V].
        out: mean values [B, H, T, V] in fp32, and lse: log-sum-exps of scores [B, H, T, 1], that queries found among
            other keys, which count too; minus infinity if nothing.
        window: all of these keys if it is None.
        hidden: keys in front of each row that its queries do not see, [B] in int64, counted from `column` keys before
            the first.
    """
    found, _ = library()
    assert found is not None  # it was chosen
    places = [y for x in (q, k, v, out, lse) for y in (x.data_ptr(), *x.stride()[:3])]
    sizes = *q.shape[:2], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3]
    hidden = hidden if hidden is None or len(hidden) == len(q) else hidden.expand(len(q)).contiguous()
    reach = first, 2**40 if window is None else window, seen_by_all, address(hidden), column
    found.eigenattn_join(
        _ARGUMENTS.pack(*places, *sizes, *reach, q.dtype == torch.bfloat16, scale, torch.get_num_threads())
    )
