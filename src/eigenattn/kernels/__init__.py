"""Attention over cached keys and values: one signature, one function a backend."""

from __future__ import annotations

from collections.abc import Callable

from .reference import attend as reference_attend
from .sdpa import attend as sdpa_attend
from .selection import decoding_step_reason, use

__all__ = ["BACKENDS", "decoding_step_reason", "reference_attend", "sdpa_attend", "use"]

BACKENDS: dict[str, Callable] = {"eager": reference_attend, "sdpa": sdpa_attend}
