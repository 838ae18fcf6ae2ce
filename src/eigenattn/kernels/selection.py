"""Which kernels models decode with, chosen at run time."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from ..errors import EigenAttnError

CHOICES = ("auto", "torch", "triton")
VARIABLE = "EIGENATTN_KERNELS"
HAS_TRITON = find_spec("triton") is not None
HALF = (torch.bfloat16, torch.float16)

_chosen = os.environ.get(VARIABLE, "auto")  # looked at when it is needed: importing fails on nothing


def _check(name: str) -> None:
    if name not in CHOICES:
        raise EigenAttnError(f"unknown kernels {name!r}: choose one of {', '.join(CHOICES)}.")
    if name == "triton" and not HAS_TRITON:
        raise EigenAttnError("triton kernels need triton: pip install 'eigenattn[triton]'.")


def use(name: str) -> str:
    """Choose the kernels that models decode with, for the whole process.

    Args:
        name: `auto`, the fused Triton kernel on GPUs that have Triton, in half precision; `torch`, PyTorch's own
            operations always; `triton`, the fused kernel in fp32 too, and on a CPU under `TRITON_INTERPRET=1`. What the
            kernel cannot serve (gradients, attention weights, other attention implementations) is left to PyTorch by
            all of them. The environment variable `EIGENATTN_KERNELS` says the same from outside.

    Returns:
        What was chosen before.

    Raises:
        EigenAttnError: on another name, or without Triton where it is asked for.
    """
    global _chosen
    _check(name)
    before, _chosen = _chosen, name
    return before


def decoding_backend(q: Tensor) -> str:
    """The backend of `eigenattn.kernels.decoding` for queries of this device and dtype.

    Raises:
        EigenAttnError: if the environment asks for what is not there.
    """
    if _chosen == "auto":
        return "triton" if q.is_cuda and q.dtype in HALF and HAS_TRITON else "torch"
    _check(_chosen)
    return "triton" if _chosen == "triton" and q.dtype in (*HALF, torch.float32) else "torch"
