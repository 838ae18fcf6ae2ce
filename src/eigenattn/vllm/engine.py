"""All that the plug-in knows of vLLM by name: the rest of this folder has it from here.

Beside the registration of models vLLM promises plug-ins no interface. A release is supported once its sources have what
stands here, as `tests/vllm/test_versions.py` reads them, and once it was served with.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.ops.ssu_dispatch import initialize_mamba_ssu_backend
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import _encode_layer_name as encode_layer_name
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout, KVCacheSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

__all__ = [
    "Attention",
    "AttentionBackend",
    "AttentionImpl",
    "AttentionLayerBase",
    "AttentionMetadata",
    "AttentionMetadataBuilder",
    "CommonAttentionMetadata",
    "FullAttentionSpec",
    "KVCacheLayout",
    "KVCacheSpec",
    "KVCacheSpecRegistry",
    "LinearBase",
    "MambaBase",
    "RowParallelLinear",
    "SlidingWindowManager",
    "SlidingWindowSpec",
    "VllmConfig",
    "encode_layer_name",
    "extract_layer_index",
    "get_attention_context",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
    "kv_cache_dtype_str_to_dtype",
    "prepare_states",
    "read_outermost_blocks",
    "run_attention",
]


def run_attention(query: Tensor, key: Tensor, value: Tensor, output: Tensor, layer: object) -> None:
    """vLLM's own operation, which keeps attention out of compiled graphs: `layer.impl.forward`.

    Args:
        layer: its name, as `encode_layer_name` gives it.
    """
    torch.ops.vllm.unified_attention_with_output(query, key, value, output, layer)


def prepare_states(vllm_config: VllmConfig) -> None:
    """Have vLLM choose its kernels for Mamba layers, which it does by itself where a group has one spec for all."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    specs = [layer.get_kv_cache_spec(vllm_config) for layer in layers if isinstance(layer, MambaBase)]
    told: Any = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in specs])
    initialize_mamba_ssu_backend(vllm_config.mamba_config, told, use_replayssm=vllm_config.cache_config.use_replayssm)


def read_outermost_blocks() -> None:
    """Have vLLM's own attention on CPUs say that it reads pools whose blocks are outermost, not layers alone.

    Its kernels go from block to block by strides, and take these from the tensors.
    """
    layouts = (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)
    CPUAttentionBackend.supported_kv_cache_layouts = classmethod(lambda cls: layouts)
