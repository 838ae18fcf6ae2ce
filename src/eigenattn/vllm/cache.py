"""What a layer caches, as vLLM is told of it: pages of latents, and pages of the exact window.

Latents of all tokens form one full-attention group, whatever their bytes, and the window's tokens a sliding-window
group. A block of the engine's pool holds all layers' pages of either group, so the window's has as many tokens as fit
into the other's bytes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..cache.layout import Layout
from ..cache.size import baseline_bytes_per_token
from ..errors import EigenAttnError
from .backend import LatentBackend
from .engine import (
    AttentionBackend,
    AttentionLayerBase,
    FullAttentionSpec,
    KVCacheSpec,
    KVCacheSpecRegistry,
    SlidingWindowManager,
    SlidingWindowSpec,
    VllmConfig,
    kv_cache_dtype_str_to_dtype,
)

# Tokens that a block of latents may have beside a window, unless the user says otherwise (chosen). Smaller ones make
# longer tables. By fours, pages begin where elements of four bytes may.
BLOCKS_WITH_WINDOW = range(16, 129, 4)
# Where the engine schedules ahead, tokens of two steps are not settled.
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
    def of(cls, layouts: Sequence[Layout], element_size: int, block: int | None) -> BlockPlan | None:
        """For the layers of a model, which have one window; None without.

        Args:
            element_size: bytes of an element that is not coded.
            block: tokens of a block of latents, if the user has chosen.
        """
        window = layouts[0].window
        if not window:
            return None
        sizes = [layout.bytes_per_token(element_size) for layout in layouts]
        ratio = baseline_bytes_per_token(layouts, element_size) / sum(sizes)

        def exact(latents: int) -> int:
            return max((n for n in range(1, latents + 1) if latents % n == 0 and n * ratio <= latents), default=0)

        def cost(latents: int) -> float:
            """Tokens whose latents would take the room of a sequence's window, and of what its last block wastes."""
            held = exact(latents)
            return latents * (-(-(window + 1) // held) + 1.5) if held else math.inf

        latents = block or min(BLOCKS_WITH_WINDOW, key=cost)
        return cls(window, latents, exact(latents) or 1, spacers_for(sizes))

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
        longest, queries = vllm_config.model_config.max_model_len, 1 + vllm_config.num_speculative_tokens
        return self.max_admission_blocks_per_request(STEPS_AHEAD * queries, longest) * self.page_size_bytes


class WindowManager(SlidingWindowManager):
    """Keeps windows for later prompts at intervals, not at the ends of prompts alone, unless the user says otherwise.

    vLLM's own default has a prefix that two prompts share hit by the third. Here a window is kept wherever as many
    blocks of latents were filled as it takes itself, so that windows are half of what a cached prefix takes at most.
    """

    @classmethod
    def reachable_block_mask(
        cls,
        start_block: int,
        end_block: int,
        alignment_tokens: int | None,
        kv_cache_spec: KVCacheSpec,
        use_eagle: bool,
        retention_interval: int | None = None,
        **options: Any,
    ) -> list[bool] | None:
        if retention_interval == 0 and alignment_tokens is not None:
            window, block = kv_cache_spec.sliding_window, kv_cache_spec.block_size
            retention_interval = cls._contiguous_blocks_for_hit(window, block, use_eagle) * alignment_tokens
        return super().reachable_block_mask(
            start_block, end_block, alignment_tokens, kv_cache_spec, use_eagle, retention_interval, **options
        )


KVCacheSpecRegistry._ensure_registered()  # it takes whatever is registered first for all there is
KVCacheSpecRegistry.register(WindowSpec, WindowManager, uniform_type_base_spec=SlidingWindowSpec)


class CachingLayer(nn.Module, AttentionLayerBase):
    """A layer that vLLM gives a cache, under a name of its own."""

    def __init__(self, vllm_config: VllmConfig, name: str) -> None:
        super().__init__()
        self.layer_name = name
        self.kv_cache = torch.tensor([])
        self.dtype = cache_dtype(vllm_config)
        layers = vllm_config.compilation_config.static_forward_context
        if name in layers:
            raise ValueError(f"duplicate layer name: {name}")
        layers[name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return LatentBackend


def cache_dtype(vllm_config: VllmConfig) -> torch.dtype:
    """Of what is cached and not coded."""
    return kv_cache_dtype_str_to_dtype(vllm_config.cache_config.cache_dtype, vllm_config.model_config)


class WindowCache(CachingLayer):
    """Exact keys, before rotation, and values of the last tokens."""

    def __init__(self, vllm_config: VllmConfig, name: str, kv_heads: int, head_dim: int, plan: BlockPlan) -> None:
        super().__init__(vllm_config, name)
        self.kv_heads, self.head_dim, self.plan, self._config = kv_heads, head_dim, plan, vllm_config

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return WindowSpec(
            block_size=self.plan.exact,
            num_kv_heads=self.kv_heads,
            head_size=self.head_dim,
            dtype=self.dtype,
            sliding_window=self.plan.window,
            block_stride_alignment=self.dtype.itemsize,
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


def byte_spec(block_size: int, size: int, alignment: int = 1) -> KVCacheSpec:
    """Pages of `size` bytes a token in one piece.

    Args:
        alignment: of a page's first byte.
    """
    return FullAttentionSpec(
        block_size=block_size,
        num_kv_heads=1,
        head_size=size,
        head_size_v=0,
        dtype=torch.uint8,
        block_stride_alignment=alignment,
    )


class Spacer(CachingLayer):
    """Caches one byte a token, which nobody reads.

    Where each size of page occurs equally often, vLLM takes the layers for a repeating pattern and splits the window's
    group by it, so that each part holds blocks of its own. One more page, of a size unlike the others, is no pattern.
    """

    def __init__(self, vllm_config: VllmConfig, name: str, block_size: int) -> None:
        super().__init__(vllm_config, name)
        self.block_size = block_size

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return byte_spec(self.block_size, self.dtype.itemsize, self.dtype.itemsize)
