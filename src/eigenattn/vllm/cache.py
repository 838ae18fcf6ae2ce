"""What a layer caches, as vLLM is told of it: pages of latents, and pages of the exact window.

Latents of all tokens form one full-attention group, whatever the ranks, and the window's tokens a sliding-window group.
A block of the engine's pool holds all layers' pages of either group, so the window's has as many tokens as fit into the
other's bytes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import _encode_layer_name, kv_cache_dtype_str_to_dtype
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec

from ..cache.layout import Layout
from ..errors import EigenAttnError
from .backend import LatentBackend, LatentImpl

# Tokens of a block beside a window, unless the user says otherwise. A sequence holds whole blocks of its window: larger
# ones waste more of them, smaller ones make longer tables.
BLOCK_WITH_WINDOW = 16
# Queries of a decoding step and, where the engine schedules ahead, of the step before it.
STEPS_AHEAD = 2


@dataclass(frozen=True)
class BlockPlan:
    """Of how many tokens the engine's blocks are, beside an exact window; without one that is the engine's own choice.

    Args:
        window: exact tokens, W.
        latents: tokens of a block of latents.
        exact: tokens of a block of the window.
        spacers: layers that cache next to nothing, see `Spacer`.
    """

    window: int
    latents: int
    exact: int
    spacers: int

    @classmethod
    def of(cls, layouts: list[Layout], cache_config: Any) -> BlockPlan | None:
        """For the layers of a model, which have one window; None without."""
        window = layouts[0].window
        if not window:
            return None
        block = cache_config.block_size if cache_config.user_specified_block_size else BLOCK_WITH_WINDOW
        sizes = [layout.bytes_per_token(1) for layout in layouts]  # elements
        exact, room = sum(layout.original_elements for layout in layouts), block * sum(sizes)
        fitting = [size for size in range(1, block + 1) if block % size == 0 and size * exact <= room]
        return cls(window, block, max(fitting, default=1), spacers_for(sizes))

    def needed(self, in_flight: int, longest: int) -> int:
        """Blocks that a sequence of `longest` tokens takes while so many are computed, and one that vLLM reserves."""
        exact = -(-min(self.window - 1 + in_flight, longest) // self.exact) + 1
        return 1 + -(-longest // self.latents) + exact


def spacers_for(sizes: list[int]) -> int:
    """How many spacers keep the window's layers in one group: none, unless each size of page occurs equally often."""
    counts = Counter(sizes)
    if len(counts) < 2 or len(set(counts.values())) > 1:
        return 0
    return 2 if max(counts.values()) == 1 else 1


@dataclass(frozen=True, kw_only=True)
class WindowSpec(SlidingWindowSpec):
    """A sliding window whose size while decoding counts for the engine's capacity.

    vLLM counts a whole batch of prompt tokens for every sequence, which only those hold that are being read. Admission
    still reserves them, and `WindowCache.bind_kv_cache` checks that one sequence has room.
    """

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        longest = vllm_config.model_config.max_model_len
        return self.max_admission_blocks_per_request(STEPS_AHEAD, longest) * self.page_size_bytes


class _CachingLayer(nn.Module, AttentionLayerBase):
    """A layer that vLLM gives a cache, under a name of its own."""

    def __init__(self, vllm_config: VllmConfig, name: str, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.layer_name, self.num_heads, self.num_kv_heads = name, heads, kv_heads
        self.kv_cache = torch.tensor([])
        self.dtype = kv_cache_dtype_str_to_dtype(vllm_config.cache_config.cache_dtype, vllm_config.model_config)
        layers = vllm_config.compilation_config.static_forward_context
        if name in layers:
            raise ValueError(f"duplicate layer name: {name}")
        layers[name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return LatentBackend


class WindowCache(_CachingLayer):
    """Exact keys, before rotation, and values of the last tokens."""

    def __init__(
        self, vllm_config: VllmConfig, name: str, heads: int, kv_heads: int, head_dim: int, plan: BlockPlan
    ) -> None:
        super().__init__(vllm_config, name, heads, kv_heads)
        self.head_dim, self.plan, self._config = head_dim, plan, vllm_config

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return WindowSpec(
            block_size=self.plan.exact,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_dim,
            dtype=self.dtype,
            sliding_window=self.plan.window,
        )

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Take the cache, if one sequence of the longest kind can be read into it.

        Raises:
            EigenAttnError: if not.
        """
        super().bind_kv_cache(kv_cache)
        blocks = self._config.cache_config.num_gpu_blocks
        if blocks is None:  # a small cache to profile memory with
            return
        longest = self._config.model_config.max_model_len
        needed = self.plan.needed(self._config.max_in_flight_tokens, longest)
        if blocks < needed:
            raise EigenAttnError(
                f"a sequence of {longest} tokens takes {needed} blocks of the cache while it is read, and there are "
                f"{blocks}: give it more memory, or lower --max-model-len or --max-num-batched-tokens."
            )


def _latent_spec(block_size: int, heads: int, size: int, dtype: torch.dtype) -> KVCacheSpec:
    """Pages of `size` elements a head in one piece: like latents of vLLM's own, not keys with values behind them."""
    return FullAttentionSpec(block_size=block_size, num_kv_heads=heads, head_size=size, head_size_v=0, dtype=dtype)


class Spacer(_CachingLayer):
    """Caches one element a token, which nobody reads.

    Where each size of page occurs equally often, vLLM takes the layers for a repeating pattern and splits the window's
    group by it, so that each part holds blocks of its own. One more page, of a size unlike the others, is no pattern.
    """

    def __init__(self, vllm_config: VllmConfig, name: str, block_size: int) -> None:
        super().__init__(vllm_config, name, heads=1, kv_heads=1)
        self.block_size = block_size

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return _latent_spec(self.block_size, 1, 1, self.dtype)


class LatentAttention(_CachingLayer):
    """Attention through vLLM's own operation, which keeps it out of compiled graphs.

    Args:
        name: of the layer, among all of the model.
        heads: H of this device.
        page: P and C, see `eigenattn.vllm.pages`.
        size_out: of an output head.
        block_size: tokens of a page; None takes the engine's.
        impl: what it computes.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        name: str,
        *,
        heads: int,
        page: tuple[int, int],
        size_out: int,
        block_size: int | None,
        impl: LatentImpl,
    ) -> None:
        pages, self.size = page
        super().__init__(vllm_config, name, heads, pages)
        self.size_out, self.block_size = size_out, block_size
        self.impl = impl

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        block_size = self.block_size or vllm_config.cache_config.block_size
        return _latent_spec(block_size, self.num_kv_heads, self.size, self.dtype)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The output [tokens, H * size_out] of queries, keys and values as `LatentImpl.forward` has them."""
        output = query.new_empty(query.shape[0], self.num_heads, self.size_out)
        torch.ops.vllm.unified_attention_with_output(query, key, value, output, _encode_layer_name(self.layer_name))
        return output.flatten(1)
