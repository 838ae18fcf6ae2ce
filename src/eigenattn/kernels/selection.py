"""Which kernels models decode with, chosen at run time."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from ..errors import EigenAttnError
from .native_library import unavailable

CHOICES = ("auto", "torch", "triton", "native")
VARIABLE = "EIGENATTN_KERNELS"
HAS_TRITON = find_spec("triton") is not None
HALF = (torch.bfloat16, torch.float16)
# Dimensions of a head up to which the fused kernel is taken unless it is asked for: it holds decoded keys in registers
# (chosen: those of multi-head latent attention have more, and were not tried).
LARGEST_HEAD = 512

_chosen = os.environ.get(VARIABLE, "auto")  # looked at when it is needed: importing fails on nothing


def _check(name: str) -> None:
    if name not in CHOICES:
        raise EigenAttnError(f"unknown kernels {name!r}: choose one of {', '.join(CHOICES)}.")
    if name == "triton" and not HAS_TRITON:
        raise EigenAttnError("triton kernels need triton: pip install 'eigenattn[triton]'.")
    if name == "native" and (reason := unavailable()) is not None:
        raise EigenAttnError(f"there are no native kernels: {reason}.")


def use(name: str) -> str:
    """Choose the kernels that models decode with, for the whole process.

    Args:
        name: `auto`, the fused Triton kernel on GPUs that have Triton, in half precision, and the native one on CPUs
            with a C++ compiler; `torch`, PyTorch's own operations always; `triton`, the fused kernel in fp32 too, and
            on a CPU under `TRITON_INTERPRET=1`; `native`, the same as `auto` on a CPU, and an error where it cannot be
            had. What a kernel cannot serve (gradients, attention weights, other attention implementations) is left to
            PyTorch by all of them. The environment variable `EIGENATTN_KERNELS` says the same from outside.

    Returns:
        What was chosen before.

    Raises:
        EigenAttnError: on another name, or without Triton or a compiler where they are asked for.
    """
    global _chosen
    _check(name)
    before, _chosen = _chosen, name
    return before


def is_chosen(name: str) -> bool:
    """Whether kernels were asked for by this name."""
    return _chosen == name


def decoding_backend(q: Tensor) -> str:
    """The backend of `eigenattn.kernels.decoding` for queries of this device and dtype; it may decline a step.

    Raises:
        EigenAttnError: if the environment asks for what is not there.
    """
    if _chosen == "auto":
        if q.is_cuda:
            fits = q.dtype in HALF and q.shape[-1] <= LARGEST_HEAD
            return "triton" if fits and HAS_TRITON else "torch"
        return "native" if q.device.type == "cpu" and unavailable() is None else "torch"
    _check(_chosen)
    if _chosen == "native":
        return "native" if q.device.type == "cpu" else "torch"
    return "triton" if _chosen == "triton" and q.dtype in (*HALF, torch.float32) else "torch"


def decoding_step_reason() -> str:
    """Which decoding step models run on this machine's CPU, and why."""
    if _chosen in ("torch", "triton"):
        return f"{_chosen}, as chosen (`eigenattn.kernels.use`, or {VARIABLE})"
    reason = unavailable()
    return "native" if reason is None else f"torch: {reason}"
