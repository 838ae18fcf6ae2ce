"""What every process of vLLM does with this plug-in, be it of a version that is supported or not.

Beside `engine` no other module names anything of vLLM.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from vllm import ModelRegistry
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import (
    QUANTIZATION_METHODS,
    QuantizationConfig,
    register_quantization_config,
)
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import register_backend

from ..errors import EigenAttnError
from ..models.checkpoint_format import EigenAttnCheckpointConfig
from ..models.conversion import METHOD
from ..models.families import FAMILIES
from .modes import check_served
from .versions import check_version, vllm_version

# Before the names of our classes in `models`.
PREFIX = "Eigen"
BACKEND = "EIGEN"
# What vLLM had under a name before this plug-in.
_stock: dict[str, Any] = {}


class LatentsConfig(QuantizationConfig):
    """A compressed checkpoint's `quantization_config` to vLLM: no weight is quantised.

    What it says of latents is read by `eigenattn.vllm.bases`.
    """

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LatentsConfig:
        """Called before the model is built.

        Raises:
            EigenAttnError: if it is malformed, or of bases alone, or this version of vLLM is not supported.
        """
        check_version(vllm_version())
        if EigenAttnCheckpointConfig(**config).base is not None:
            raise EigenAttnError(
                "these are bases alone: serve the model that they belong to, and give their folder by "
                """--additional-config '{"eigenattn": "FOLDER"}'."""
            )
        return cls()

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


def register() -> None:
    """See `eigenattn.vllm.register`. Each model of the table of families that vLLM has gets `Compressed` before it,
    under the model's own name."""
    if METHOD in QUANTIZATION_METHODS:  # vLLM may load plug-ins twice in a process
        return
    package = __package__
    register_quantization_config(METHOD)(LatentsConfig)
    register_backend(BACKEND, f"{package}.backend.LatentBackend")
    mapping = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    names = {mapping[model_type] for model_type in FAMILIES if model_type in mapping}
    names |= {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()}  # around which text model, a checkpoint says
    served = names & {*ModelRegistry.get_supported_archs()}
    for name in sorted(served):
        _stock[name] = ModelRegistry.models[name]
        ModelRegistry.register_model(name, f"{package}.models:{PREFIX}{name}")
    _refuse_others(served)


def _refuse_others(served: Collection[str]) -> None:
    """Look at each configuration of an engine where it is made: what is no class of ours would not notice bases."""
    platform = type(current_platform)
    plain = platform.check_and_update_config

    def checked(cls: type, vllm_config: Any) -> None:
        check_served(vllm_config, served)
        plain(vllm_config)

    platform.check_and_update_config = classmethod(checked)


def stock_class(name: str) -> type[torch.nn.Module]:
    """vLLM's own class of a name, in processes without the plug-in too."""
    return (_stock.get(name) or ModelRegistry.models[name]).load_model_cls()
