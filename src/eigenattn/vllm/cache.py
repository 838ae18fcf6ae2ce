"""What a layer caches, as vLLM is told of it: pages of latents, and pages of the exact window.

Latents form one full-attention group, whatever their bytes, those of layers that slide one sliding-window group, and
the exact tokens of all layers another; where images have positions of their own, these lie in the first. A block of
the engine's pool holds all layers' pages of one group, so each group's has as many tokens as fit into the bytes of
the first one's. Layers that draft keep vLLM's own attention, and cache keys and values in the pages of the first
group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..cache.layout import Layout
from ..errors import EigenAttnError
from .backend import LatentBackend
from .blocks import BLOCKS, STEPS_AHEAD, BlockPlan
from .engine import (
    AttentionBackend,
    AttentionLayerBase,
    FullAttentionSpec,
    KVCacheSpec,
    KVCacheSpecRegistry,
    SlidingWindowManager,
    SlidingWindowSpec,
    VllmConfig,
    get_tensor_model_parallel_world_size,
    kv_cache_dtype_str_to_dtype,
    prepare_states,
)
from .modes import positions_in_rows
from .pages import POSITION


class Planning:
    """Plans blocks when they are asked for: layers that draft are built after the model, and beside states of other
    kinds the engine then chooses the size of blocks, so that a state fits into one.

    Args:
        layouts, sees: of all layers that hold latents, see `BlockPlan.of`.
        states: whether there are layers with states of other kinds.
    """

    def __init__(
        self, vllm_config: VllmConfig, layouts: Sequence[Layout], sees: Sequence[int | None], states: bool
    ) -> None:
        self._config, self._layers, self.states = vllm_config, (layouts, sees), states
        # Bytes of a token's positions, if they are cached.
        self.positions = (positions_in_rows(vllm_config) or 0) * POSITION.itemsize
        self._made: dict[tuple[int, tuple[int, ...]], BlockPlan] = {}

    @property
    def plan(self) -> BlockPlan:
        """Of the engine's blocks."""
        cache, longest = self._config.cache_config, self._config.model_config.max_model_len
        block, drafts = cache.block_size or BLOCKS[0], self._drafts()
        if (block, drafts) not in self._made:
            element = cache_dtype(self._config).itemsize
            fixed = cache.user_specified_block_size
            made = BlockPlan.of(*self._layers, element, longest, block, fixed, self.states, drafts, self.positions)
            self._made[block, drafts] = made
        return self._made[block, drafts]

    def _drafts(self) -> tuple[int, ...]:
        """Bytes of a token in each layer that drafts, of all devices that the latents are divided among.

        Raises:
            EigenAttnError: if it does not see everything.
        """
        if self.states:  # no layer drafts beside them
            return ()
        layers = self._config.compilation_config.static_forward_context.values()
        caching = [layer for layer in layers if isinstance(layer, AttentionLayerBase)]
        found = [each.get_kv_cache_spec(self._config) for each in caching if not isinstance(each, CachingLayer)]
        specs = [spec for spec in found if spec is not None]
        if any(type(spec) is not FullAttentionSpec for spec in specs):
            raise EigenAttnError("layers that draft beside latents have to see all tokens: use drafts by ngrams here.")
        devices = min(get_tensor_model_parallel_world_size(), self._layers[0][0].kv_heads)
        return tuple(spec.page_size_bytes // spec.block_size * devices for spec in specs)

    def spacers(self, kind: str, stages: int) -> int:
        """That the first of so many stages of a pipeline has in a group; if it has any, the others have one."""
        groups = self.plan.groups
        if kind not in groups or (len(groups) == 1 and not self.states):
            return 0
        return groups[kind].spacers(stages) - stages + 1


@dataclass(frozen=True, kw_only=True)
class WindowSpec(SlidingWindowSpec):
    """A sliding window whose size while decoding counts for the engine's capacity.

    vLLM counts a whole batch of prompt tokens for every sequence, which only those hold that are being read. Admission
    still reserves them, and `CachingLayer.bind_kv_cache` checks that one sequence has room.

    Args:
        kept: see `BlockPlan`.
    """

    kept: int

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        longest, queries = vllm_config.model_config.max_model_len, 1 + vllm_config.num_speculative_tokens
        return self.max_admission_blocks_per_request(STEPS_AHEAD * queries, longest) * self.page_size_bytes


class WindowManager(SlidingWindowManager):
    """Keeps windows for later prompts at intervals, not at the ends of prompts alone, unless the user says otherwise.

    vLLM's own default has a prefix that two prompts share hit by the third. Here windows are kept wherever as many
    blocks of the first group were filled as they take themselves, so that they are half of what a cached prefix takes
    at most.
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
            retention_interval = kv_cache_spec.kept * alignment_tokens
        return super().reachable_block_mask(
            start_block, end_block, alignment_tokens, kv_cache_spec, use_eagle, retention_interval, **options
        )


KVCacheSpecRegistry._ensure_registered()  # it takes whatever is registered first for all there is
KVCacheSpecRegistry.register(WindowSpec, WindowManager, uniform_type_base_spec=SlidingWindowSpec)


class CachingLayer(nn.Module, AttentionLayerBase):
    """A layer that vLLM gives a cache, under a name of its own.

    Args:
        planning: of the engine's blocks.
        kind: its group's name, see `BlockPlan`.
    """

    def __init__(self, vllm_config: VllmConfig, name: str, planning: Planning, kind: str) -> None:
        super().__init__()
        self.layer_name, self.planning, self.kind, self._config = name, planning, kind, vllm_config
        self.kv_cache = torch.tensor([])
        self.dtype = cache_dtype(vllm_config)
        layers = vllm_config.compilation_config.static_forward_context
        if name in layers:
            raise ValueError(f"duplicate layer name: {name}")
        layers[name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return LatentBackend

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Take the cache, if one sequence of the longest kind can be read into it.

        Raises:
            EigenAttnError: if not.
        """
        super().bind_kv_cache(kv_cache)
        if self.planning.states:
            prepare_states(self._config)
        blocks = self._config.cache_config.num_gpu_blocks
        if blocks is None:  # a small cache to profile memory with
            return
        longest = self._config.model_config.max_model_len
        needed = self.planning.plan.needed(self._config.max_in_flight_tokens, longest)
        if blocks < needed:
            raise EigenAttnError(
                f"a sequence of {longest} tokens takes {needed} blocks of the cache while it is read, and there are "
                f"{blocks}: give it more memory, or lower --max-model-len or --max-num-batched-tokens."
            )

    def page_spec(self, heads: int, size: int, dtype: torch.dtype) -> KVCacheSpec:
        """Pages with so many elements a head and token."""
        plan = self.planning.plan
        group = plan.groups[self.kind]
        common: dict[str, Any] = {
            "block_size": group.block,
            "num_kv_heads": heads,
            "head_size": size,
            "head_size_v": 0,
            "dtype": dtype,
            "block_stride_alignment": self.dtype.itemsize,
        }
        if group.sees is None:
            return FullAttentionSpec(**common)
        return WindowSpec(**common, sliding_window=group.sees, kept=plan.kept)


def cache_dtype(vllm_config: VllmConfig) -> torch.dtype:
    """Of what is cached and not coded."""
    return kv_cache_dtype_str_to_dtype(vllm_config.cache_config.cache_dtype, vllm_config.model_config)


class WindowCache(CachingLayer):
    """Exact keys, before rotation, and values of the last tokens, side by side."""

    def __init__(self, vllm_config: VllmConfig, name: str, planning: Planning, kv_heads: int, head_dim: int) -> None:
        super().__init__(vllm_config, name, planning, "exact")
        self.kv_heads, self.head_dim = kv_heads, head_dim

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return self.page_spec(self.kv_heads, 2 * self.head_dim, self.dtype)


class PositionsCache(CachingLayer):
    """Positions of all tokens in several rows: those of a pass are noted as the model is given them."""

    def __init__(self, vllm_config: VllmConfig, name: str, planning: Planning) -> None:
        super().__init__(vllm_config, name, planning, "full")
        self._given = torch.tensor([])

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return self.page_spec(1, self.planning.positions, torch.uint8)

    def note(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Before a pass of the model, whose second argument are positions [rows, T]."""
        self._given = named["positions"] if "positions" in named else arguments[1]

    def given(self, tokens: int) -> Tensor:
        """Positions of the pass's first tokens, [1, 1, tokens, rows]."""
        return self._given[:, :tokens].T.to(POSITION)[None, None]


class Spacer(CachingLayer):
    """Caches one element a token, which nobody reads, and keeps a group in one piece (`Group.spacers`).

    Of a group that slides it has to be the first.

    Args:
        number: of its group's, from 0. It has a cache if there have to be so many.
    """

    def __init__(self, vllm_config: VllmConfig, name: str, planning: Planning, kind: str, number: int) -> None:
        super().__init__(vllm_config, f"{name}.{kind}_spacer_{number}", planning, kind)
        self.number = number

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        if self.number >= self.planning.spacers(self.kind, vllm_config.parallel_config.pipeline_parallel_size):
            return None
        return self.page_spec(1, self.dtype.itemsize, torch.uint8)
