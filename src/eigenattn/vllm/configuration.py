"""What vLLM reads of a compressed checkpoint's configuration, and what it cannot serve."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QuantizationConfig

from ..errors import EigenAttnError
from ..models.attention import EigenAttention
from ..models.checkpoint_format import METHOD, EigenAttnCheckpointConfig, allocate
from ..models.conversion import convert_attention, eigen_layers
from ..models.loading import empty_model
from .versions import check_version, vllm_version

# Class in the checkpoint's `architectures` -> ours, in `eigenattn.vllm.models`.
ARCHITECTURES = {
    name: f"Eigen{name}"
    for name in (
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "OPTForCausalLM",
        "MptForCausalLM",
    )
}
# Their angles depend on the length of a text, which differs from row to row of a batch.
VARYING_ROPE = ("dynamic", "longrope")


def check_served(config: Any, checkpoint: EigenAttnCheckpointConfig) -> None:
    """Refuse checkpoints with what the plug-in does not have.

    Args:
        config: the model's configuration, as transformers has it.

    Raises:
        EigenAttnError: naming what is not supported.
    """
    architecture = (config.architectures or ["none"])[0]
    if architecture not in ARCHITECTURES and architecture not in ARCHITECTURES.values():
        raise EigenAttnError(
            f"compressed {architecture} is not served by vLLM; these are: {', '.join(ARCHITECTURES)}. "
            "transformers runs it."
        )
    if any(layout.coded for layout in checkpoint.layouts(config)):
        raise EigenAttnError("coded latents are not served by vLLM: compress without --coded.")
    if _slides(config):
        raise EigenAttnError("models with a sliding window of their own are not served by vLLM once compressed.")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in VARYING_ROPE:
        raise EigenAttnError(f"rotary positions of type {rope['rope_type']} are not served by vLLM once compressed.")


def _slides(config: Any) -> bool:
    types = getattr(config, "layer_types", None)
    if types:
        return "sliding_attention" in types
    return getattr(config, "sliding_window", None) is not None


def blueprints(config: Any, checkpoint: EigenAttnCheckpointConfig) -> list[EigenAttention]:
    """The layers' attention as transformers would have it, without memory: shapes, scale, and what is folded.

    Args:
        config: the model's configuration, as transformers has it.
    """
    model = empty_model(config)
    convert_attention(model)
    layers = eigen_layers(model)
    allocate(layers, checkpoint)
    return layers


class LatentsConfig(QuantizationConfig):
    """vLLM's view of `quantization_config`: no weight is quantised, but models and cache are of another shape.

    Args:
        checkpoint: as `eigenattn` reads it.
    """

    def __init__(self, checkpoint: EigenAttnCheckpointConfig) -> None:
        super().__init__()
        self.checkpoint = checkpoint

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Called for every checkpoint with the model's configuration, before its class is looked up: ours is named."""
        if hf_quant_cfg.get("quant_method") != METHOD:
            return None
        if hf_config is not None:
            check_served(hf_config, EigenAttnCheckpointConfig(**hf_quant_cfg))
            hf_config.architectures = [ARCHITECTURES.get(name, name) for name in hf_config.architectures]
        return METHOD

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LatentsConfig:
        return cls(EigenAttnCheckpointConfig(**config))

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


class RefusingConfig(LatentsConfig):
    """What stands in for `LatentsConfig` in a version of vLLM that is not supported."""

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        if hf_quant_cfg.get("quant_method") == METHOD:
            check_version(vllm_version())
        return None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LatentsConfig:
        check_version(vllm_version())
        return super().from_config(config)
