"""Attention of one query a row over latents: one signature, three backends.

`reference` is loops in fp32; `torch` is batched and runs anywhere; `triton`, on GPUs, and `native`, on CPUs, are fused:
latents are read once, keys are decoded, rotated and scored in registers, and nothing is written back but one partial
sum a split of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...errors import EigenAttnError
from ..selection import HAS_TRITON
from .arguments import Rotary, Side, Step, Window, out_of_pages
from .batched import decode as torch_decode
from .native import decode as native_decode
from .native import why_not
from .reference import decode as reference_decode

__all__ = [
    "DECODE_BACKENDS",
    "Rotary",
    "Side",
    "Step",
    "Window",
    "accepted",
    "decode",
    "decode_accepted",
    "default_backend",
    "out_of_pages",
    "why_not",
]


def _triton_decode(step: Step) -> Tensor:
    if not HAS_TRITON:
        raise EigenAttnError("the triton backend needs triton: pip install 'eigenattn[triton]'.")
    from .fused import decode as fused_decode

    return fused_decode(step)


DECODE_BACKENDS: dict[str, Callable[[Step], Tensor]] = {
    "reference": reference_decode,
    "torch": torch_decode,
    "triton": _triton_decode,
    "native": native_decode,
}


def _why_not_triton(step: Step) -> str | None:
    if step.columns is not None:
        return "it does not decode where tokens were evicted"
    return None


# Why a backend does not take a step; None if it does. Others take all.
DECLINES: dict[str, Callable[[Step], str | None]] = {"triton": _why_not_triton, "native": why_not}


def default_backend(step: Step) -> str:
    """`triton` on a GPU that has it, `native` on a CPU, where they take the step, else `torch`."""
    if step.q.is_cuda:
        return accepted(step, "triton") if HAS_TRITON else "torch"
    return accepted(step, "native")


def accepted(step: Step, backend: str) -> str:
    """The backend asked for, or `torch` where it does not take the step."""
    return "torch" if backend in DECLINES and DECLINES[backend](step) else backend


def decode(step: Step, backend: str | None = None) -> Tensor:
    """One step of decoding.

    Args:
        backend: one of `DECODE_BACKENDS`; by default `default_backend`.

    Returns:
        [B, H, D], or [B, H, R_v] without a decoder of values, in the dtype of the queries.

    Raises:
        EigenAttnError: on an unknown backend, on shapes that do not fit, or if the backend does not take the step.
    """
    name = backend or default_backend(step)
    if name not in DECODE_BACKENDS:
        raise EigenAttnError(f"unknown decoding backend {name!r}: choose one of {', '.join(DECODE_BACKENDS)}.")
    step.check()
    if name in DECLINES and (reason := DECLINES[name](step)) is not None:
        raise EigenAttnError(f"the {name} backend does not take this step: {reason}. Use torch.")
    return DECODE_BACKENDS[name](step)


def decode_accepted(step: Step, backend: str) -> Tensor:
    """The same for a step that a backend has accepted, and whose shapes fit, as a model's do: nothing is looked at."""
    return DECODE_BACKENDS[backend](step)
