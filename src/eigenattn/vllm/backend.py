"""The attention backend: metadata of a batch, and attention of all its rows over pages of latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .attend import Queries, attend_prompt, decode_queries
from .engine import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    KVCacheLayout,
    KVCacheSpec,
    VllmConfig,
    get_attention_context,
)
from .pages import Held, Pages, latents_in, positions_in, window_in, write
from .registration import BACKEND

# Queries of a row that are decoded as rows of their own, in place of a prompt's way (chosen): drafts of speculative
# decoding are then verified by the arithmetic that decodes without them.
MOST_DECODED = 16


@dataclass(frozen=True)
class Prompt:
    """A row with many queries, the batch's tokens `start` to `stop`, or with some of images that see behind them."""

    start: int
    stop: int
    length: int
    table: Tensor  # int32 [1, n]
    images: Sequence[tuple[int, int]]  # places of the first and the last token of each


@dataclass(frozen=True)
class LatentMetadata(AttentionMetadata):
    """A batch, to the layers of one cache group.

    Args:
        tokens: tokens of the batch, without padding.
        slots: where they are written, int64 [tokens].
        queries: of rows that have few, or None.
        prompts: the other rows.
    """

    tokens: int
    slots: Tensor
    queries: Queries | None
    prompts: list[Prompt]

    def table(self, prompt: int | None) -> Tensor:
        """Pages of a prompt by its number, or of the rows that have few queries."""
        found = self.queries if prompt is None else self.prompts[prompt]
        assert found is not None  # they are asked for where there are any
        return found.table


class LatentMetadataBuilder(AttentionMetadataBuilder[LatentMetadata]):
    """Makes `LatentMetadata` of what vLLM says of a batch."""

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> LatentMetadata:
        """Layers of one group differ in the bytes of a token only, and so share what the first of them builds."""
        built = getattr(common_attn_metadata, "_eigenattn", None)
        if built is None:
            built = common_attn_metadata._eigenattn = _metadata(common_attn_metadata)
        return built


def _metadata(common: CommonAttentionMetadata) -> LatentMetadata:
    starts = common.query_start_loc_cpu.tolist()
    lengths = common.seq_lens[: common.num_reqs].tolist()
    table, device = common.block_table_tensor, common.block_table_tensor.device
    prompts, few, images = [], [], common.mm_req_doc_ranges or {}
    for row, (start, stop, length) in enumerate(zip(starts, starts[1:], lengths, strict=False)):
        seen = [image for image in images.get(row, ()) if image[1] >= length - (stop - start)]
        if stop - start > MOST_DECODED or seen:
            prompts.append(Prompt(start, stop, length, table[row : row + 1], seen))
        else:
            few += [(row, token, length - (stop - 1 - token)) for token in range(start, stop)]
    queries = None
    if few:
        rows, tokens, held = torch.tensor(few, device=device).unbind(1)
        positions = torch.arange(max(length for *_, length in few), dtype=torch.int32, device=device)
        queries = Queries(tokens, held.to(torch.int32), table[rows], positions.unsqueeze(0))
    tokens = min(common.num_actual_tokens, starts[-1])
    return LatentMetadata(tokens, common.slot_mapping[:tokens].long(), queries, prompts)


class LatentBackend(AttentionBackend):
    """Pages of latents, and of the exact window. Block-outermost layouts let layers differ in bytes without padding."""

    forward_includes_kv_cache_update: bool = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return BACKEND

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

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return True


class LatentImpl(AttentionImpl[LatentMetadata]):
    """What a layer's attention computes; it holds nothing of a layer.

    Args:
        num_heads, head_size, scale: of the layer, for vLLM.
    """

    def __init__(self, num_heads: int, head_size: int, scale: float) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.kv_cache_dtype = "auto"

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
            layer: the `LatentAttention`.
            query: before rotation [tokens, H, D].
            key, value: the same, [tokens, G, D].
            kv_cache: [pages, 1, N, bytes], see `eigenattn.vllm.pages`.
            attn_metadata: None while memory is profiled.
            output: [tokens, H, D].
        """
        if attn_metadata is None:
            return output.zero_()
        batch, attention = attn_metadata, layer.attention
        vectors = tuple(x[: batch.tokens].transpose(0, 1).unsqueeze(0) for x in (key, value))  # [1, G, T, D]
        rows, window, positions = latents_in(kv_cache, layer.layout, query.dtype), None, None
        write(rows, batch.slots, layer.stored(*vectors))
        if layer.window_name is not None:
            exact, _, cache, _ = get_attention_context(layer.window_name)
            window = window_in(cache), exact
            write(window[0], exact.slots, vectors)
        if layer.positions_name is not None:
            placed, holder, cache, _ = get_attention_context(layer.positions_name)
            positions = positions_in(cache), placed
            if layer.leads:
                write(positions[0], placed.slots, (holder.given(batch.tokens),))

        def held(prompt: int | None) -> Held:
            each = (None if of is None else Pages(of[0], of[1].table(prompt)) for of in (window, positions))
            return Held(Pages(rows, batch.table(prompt)), *each)

        for i, prompt in enumerate(batch.prompts):
            q = query[prompt.start : prompt.stop]
            output[prompt.start : prompt.stop] = attend_prompt(attention, q, prompt.length, held(i), prompt.images)
        if batch.queries is not None:
            q = query[batch.queries.tokens]
            output[batch.queries.tokens] = decode_queries(attention, q, batch.queries, held(None))
        return output
