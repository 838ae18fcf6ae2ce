"""Rotating many vectors on a CPU in one pass over them, where PyTorch's operations take five and memory for each."""

from __future__ import annotations

import torch
from torch import Tensor

from .native_library import library
from .selection import decoding_backend

DTYPES = (torch.float32, torch.bfloat16)


def rotates_natively(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotate_natively` takes these: several tokens, of which no gradients are asked for."""
    if x.shape[-2] == 1 or cos.dim() != 3 or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    plain = all(each.stride(-1) == 1 for each in (x, cos, sin)) and cos.stride() == sin.stride()
    known = x.dtype in DTYPES and cos.dtype == sin.dtype and cos.dtype in (torch.float32, x.dtype)
    return plain and known and decoding_backend(x) == "native"


def rotate_natively(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Vectors [B, heads, T, D] at positions of cosines and sines [B or 1, T, width], pairs being halves.

    By angles in fp32 what comes out is rounded once to the dtype of the vectors; by angles in bf16 everything is where
    PyTorch's operations round, and comes to the same.
    """
    found, _ = library()
    assert found is not None  # it was chosen
    b, heads, t, d = x.shape
    out = torch.empty(b, t, heads, d, dtype=x.dtype).transpose(1, 2)
    turns = cos.data_ptr(), sin.data_ptr(), cos.shape[-1], cos.stride(0) if len(cos) > 1 else 0, cos.stride(1)
    of_vectors = x.data_ptr(), *x.shape, *x.stride()[:3], x.dtype == torch.bfloat16
    of_turns = *turns, cos.dtype == torch.bfloat16
    found.eigenattn_rotate(*of_vectors, *of_turns, torch.get_num_threads(), out.data_ptr())
    return out
