"""The attention backend: metadata of a batch, and attention of all its rows over pages of latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import KVCacheLayout, KVCacheSpec

from .attend import DecodingRows, PagedAttention, attend_prompt, decode_rows
from .pages import Pages, write


@dataclass(frozen=True)
class PromptRow:
    """A row with several queries, the batch's tokens `start` to `stop`."""

    row: Tensor
    start: int
    stop: int
    length: int


@dataclass(frozen=True)
class LatentMetadata(AttentionMetadata):
    """A batch, to the layers of one cache group.

    Args:
        tokens: tokens of the batch, without padding.
        slots: where they are written, int64 [tokens].
        table: blocks of each row, int64 [rows, n].
        decoding, prompts: the rows.
    """

    tokens: int
    slots: Tensor
    table: Tensor
    decoding: list[DecodingRows]
    prompts: list[PromptRow]


class LatentMetadataBuilder(AttentionMetadataBuilder[LatentMetadata]):
    """Makes `LatentMetadata` of what vLLM says of a batch."""

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> LatentMetadata:
        """Layers of one group differ in rank only, and so share what the first of them builds."""
        built = getattr(common_attn_metadata, "_eigenattn", None)
        if built is None:
            built = common_attn_metadata._eigenattn = _metadata(common_attn_metadata)
        return built


def _metadata(common: CommonAttentionMetadata) -> LatentMetadata:
    starts = common.query_start_loc_cpu.tolist()
    lengths = common.seq_lens[: common.num_reqs].tolist()
    table, device = common.block_table_tensor, common.block_table_tensor.device
    prompts, similar = [], {}
    for row, (start, stop, length) in enumerate(zip(starts, starts[1:], lengths, strict=False)):
        if stop - start == 1:
            # Rows decoded together are padded to the longest: within a power of two that at most doubles the work.
            similar.setdefault(length.bit_length(), []).append((row, start, length))
        elif stop > start:
            prompts.append(PromptRow(torch.tensor([row], device=device), start, stop, length))
    positions = torch.arange(max(lengths, default=0), dtype=torch.int32, device=device).unsqueeze(0)
    decoding = []
    for found in similar.values():
        rows, tokens, held = torch.tensor(found, device=device).unbind(1)
        longest = max(length for *_, length in found)
        decoding.append(DecodingRows(rows, tokens, held.to(torch.int32), longest, positions))
    tokens = min(common.num_actual_tokens, starts[-1])
    return LatentMetadata(tokens, common.slot_mapping[:tokens].long(), table.long(), decoding, prompts)


class LatentBackend(AttentionBackend):
    """Pages of latents, and of the exact window. Block-outermost layouts let layers differ in rank without padding."""

    forward_includes_kv_cache_update: bool = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return "EIGEN"

    @staticmethod
    def get_impl_cls() -> type[LatentImpl]:
        return LatentImpl

    @staticmethod
    def get_builder_cls() -> type[LatentMetadataBuilder]:
        return LatentMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.BLNHC, KVCacheLayout.BLHNC)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True


class LatentImpl(AttentionImpl[LatentMetadata]):
    """What a layer's attention computes.

    Args:
        attention: gives how it attends; asked once weights are loaded.
        num_heads, head_size, scale: of the original attention.
        window_layer: name of the layer that caches the exact window, or None.
    """

    def __init__(
        self,
        attention: Callable[[], PagedAttention],
        num_heads: int,
        head_size: int,
        scale: float,
        window_layer: str | None,
    ) -> None:
        self._make_attention = attention
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.window_layer = window_layer
        self.kv_cache_dtype = "auto"

    @cached_property
    def attention(self) -> PagedAttention:
        """How it attends."""
        return self._make_attention()

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: LatentMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write what the tokens leave in the caches, and attend.

        Args:
            query: before rotation [tokens, H, D or R_k].
            key: latents as they lie in a page, [tokens, P, C].
            value: exact keys and values as they lie in a page, [tokens, G, 2 D]; anything without a window.
            kv_cache: [blocks, P, N, C], see `eigenattn.vllm.pages`.
            attn_metadata: None while memory is profiled.
            output: [tokens, H, D or R_v].
        """
        if attn_metadata is None:
            return output.zero_()
        batch, near = attn_metadata, None
        write(kv_cache, batch.slots, key[: batch.tokens])
        far = Pages(kv_cache, batch.table)
        if self.window_layer is not None:
            context = get_forward_context()
            window = context.attn_metadata[self.window_layer]
            near = Pages(context.no_compile_layers[self.window_layer].kv_cache, window.table)
            write(near.cache, window.slots, value[: batch.tokens])
        for row in batch.prompts:
            q = query[row.start : row.stop]
            output[row.start : row.stop] = attend_prompt(self.attention, q, row.row, row.length, far, near)
        for rows in batch.decoding:
            output[rows.tokens] = decode_rows(self.attention, query[rows.tokens], rows, far, near)
        return output
