"""The plug-in for vLLM: `vllm serve CHECKPOINT` with a paged cache of latents.

vLLM finds `register` through the entry point `vllm.general_plugins` and calls it in each of its processes. No other
part of eigenattn imports vLLM.
"""

from __future__ import annotations

from ..errors import EigenAttnError
from ..models.checkpoint_format import METHOD
from .versions import SUPPORTED, check_version, vllm_version

__all__ = ["SUPPORTED", "check_version", "register"]


def register() -> None:
    """Tell vLLM of compressed checkpoints: how to read their configuration, their models and their attention.

    With a version that is not supported other models are served as ever, and a compressed checkpoint is refused.
    """
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    if METHOD in QUANTIZATION_METHODS:  # vLLM may load plug-ins twice in a process
        return
    from .configuration import LatentsConfig, RefusingConfig

    try:
        check_version(vllm_version())
    except EigenAttnError:
        register_quantization_config(METHOD)(RefusingConfig)
        return
    from vllm import ModelRegistry
    from vllm.v1.attention.backends.registry import register_backend

    from .backend import LatentBackend
    from .configuration import ARCHITECTURES

    register_quantization_config(METHOD)(LatentsConfig)
    register_backend(LatentBackend.get_name(), ".".join(LatentBackend.full_cls_name()))
    for ours in ARCHITECTURES.values():
        ModelRegistry.register_model(ours, f"{__name__}.models:{ours}")
    # vLLM itself has no MPT any more, so the name in the checkpoint has to be known before it is replaced.
    ModelRegistry.register_model("MptForCausalLM", f"{__name__}.models:{ARCHITECTURES['MptForCausalLM']}")
