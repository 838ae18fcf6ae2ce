"""Attention of many queries over the exact window on a CPU, where a processor multiplies matrices of bf16."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from .native_library import library, multiplies
from .selection import decoding_backend

_ARGUMENTS = struct.Struct("=20q9qdq")


def bands_natively(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `band_natively` takes these: in bfloat16, of which no gradients are asked for."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    plain = all(x.dtype == torch.bfloat16 and x.stride(-1) == 1 for x in (q, k, v))
    return plain and decoding_backend(q) == "native" and multiplies()


def band_natively(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, window: int, first: int, empty: int, scale: float
) -> None:
    """Attention in which query i sees the keys `first + i - window < n <= first + i`, of those from `empty` on.

    Args:
        q: [B, H, T, D]; k: [B, G, N, D]; v: [B, G, N, V].
        out: takes mean values [B, H, T, V] in fp32; lse: and log-sum-exps of scores [B, H, T, 1].
    """
    found, _ = library()
    assert found is not None  # it was chosen
    places = [y for x in (q, k, v, out, lse) for y in (x.data_ptr(), *x.stride()[:3])]
    sizes = *q.shape[:2], k.shape[1], q.shape[2], q.shape[3], v.shape[3], window, first, empty
    found.eigenattn_band(_ARGUMENTS.pack(*places, *sizes, scale, torch.get_num_threads()))
