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

from .attend import Head, Pages, attend_prompt, decode_rows, write


@dataclass(frozen=True)
class DecodingRows:
    """Rows of similar length with one query each.

    Args:
        rows: rows of the block table, int64 [b].
        tokens: their queries in the batch, int64 [b].
        lengths: tokens of each, int32 [b].
        longest: the largest of them.
    """

    rows: Tensor
    tokens: Tensor
    lengths: Tensor
    longest: int


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
    decoding = []
    for found in similar.values():
        rows, tokens, held = torch.tensor(found, device=device).unbind(1)
        decoding.append(DecodingRows(rows, tokens, held.to(torch.int32), max(length for *_, length in found)))
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
        head: gives how it attends; asked once weights are loaded.
        num_heads, head_size, scale: of the original attention.
        window_layer: name of the layer that caches the exact window, or None.
    """

    def __init__(
        self, head: Callable[[], Head], num_heads: int, head_size: int, scale: float, window_layer: str | None
    ) -> None:
        self._make_head = head
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.window_layer = window_layer
        self.kv_cache_dtype = "auto"

    @cached_property
    def head(self) -> Head:
        return self._make_head()

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
            key, value: latents of all heads side by side, [tokens, n]; with a window what is exact, G * D, before them.
            kv_cache: [blocks, P, N, C], see `attend`.
            attn_metadata: None while memory is profiled.
            output: [tokens, H, D or R_v].
        """
        if attn_metadata is None:
            return output.zero_()
        batch, near = attn_metadata, None
        query, key, value = (x[: batch.tokens] for x in (query, key, value))
        if self.window_layer is not None:
            context = get_forward_context()
            window, cache = (
                context.attn_metadata[self.window_layer],
                context.no_compile_layers[self.window_layer].kv_cache,
            )
            exact = cache.shape[1] * self.head_size
            _write_pages(cache, window.slots, key[:, :exact], value[:, :exact])
            near = Pages(cache, window.table)
            key, value = key[:, exact:], value[:, exact:]
        _write_pages(kv_cache, batch.slots, key, value)
        far = Pages(kv_cache, batch.table)
        for row in batch.prompts:
            q = query[row.start : row.stop]
            output[row.start : row.stop] = attend_prompt(self.head, q, row.row, row.length, far, near)
        for found in batch.decoding:
            q = query[found.tokens]
            output[found.tokens] = decode_rows(self.head, q, found.rows, found.lengths, found.longest, far, near)
        return output


def _write_pages(cache: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Put keys and values, or their latents, of all heads side by side [tokens, n] into a cache [blocks, P, N, C]."""
    pages = cache.shape[1]
    write(cache, slots, torch.cat([x.unflatten(-1, (pages, -1)) for x in (keys, values) if x.shape[-1]], dim=-1))
