"""Versions of this package and of what it stands on."""

from __future__ import annotations

import platform
from importlib.metadata import version


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {"python": platform.python_version()} | {
        name: version(name) for name in ("eigenattn", "torch", "transformers", "safetensors")
    }
