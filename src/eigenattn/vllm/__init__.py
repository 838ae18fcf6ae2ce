"""The plug-in for vLLM: a paged cache of latents, of a compressed checkpoint or of a stock one and a folder of bases.

vLLM calls `register` in each of its processes, by the entry point `vllm.general_plugins` (`eigenattn_autoload.serve`).
No other part of eigenattn imports vLLM.
"""

from __future__ import annotations

from .versions import SUPPORTED, check_version

__all__ = ["SUPPORTED", "check_version", "register"]


def register() -> None:
    """Tell vLLM of compressed checkpoints and of bases.

    With a version that is not supported all is served that asks for neither, and these are refused.
    """
    from .registration import register as tell

    tell()
