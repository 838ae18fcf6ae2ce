"""vLLM's models with compressed attention in them; ours alone where vLLM has none any more."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.opt import OPTForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from .layers import check_loaded, compress_layers
from .mpt import MptForCausalLM


class Compressed(nn.Module):
    """Stands before a model of vLLM's: its attention is replaced, and its loading checked."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        compress_layers(self, vllm_config)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded = super().load_weights(weights)  # pyright: ignore[reportAttributeAccessIssue] (of vLLM's model)
        check_loaded(self, loaded)
        return loaded


class EigenLlamaForCausalLM(Compressed, LlamaForCausalLM):
    """Llama, SmolLM, SmolLM2."""


class EigenMistralForCausalLM(Compressed, MistralForCausalLM):
    """Mistral."""


class EigenQwen2ForCausalLM(Compressed, Qwen2ForCausalLM):
    """Qwen 2, Qwen 2.5."""


class EigenQwen3ForCausalLM(Compressed, Qwen3ForCausalLM):
    """Qwen 3."""


class EigenOPTForCausalLM(Compressed, OPTForCausalLM):
    """OPT."""


class EigenMptForCausalLM(Compressed, MptForCausalLM):
    """MPT."""
