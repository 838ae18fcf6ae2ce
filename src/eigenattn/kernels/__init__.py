"""Attention over cached keys and values: one signature, one function a backend."""

from __future__ import annotations

from collections.abc import Callable

from .reference import attend as reference_attend
from .sdpa import attend as sdpa_attend

BACKENDS: dict[str, Callable] = {"eager": reference_attend, "sdpa": sdpa_attend}
