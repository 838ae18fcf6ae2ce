"""Attention to latents alone, without an exact window: the paper's way (arXiv 2408.05646, section 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..cache.layers import Far, prepare, with_window
from ..kernels import BACKENDS
from ..kernels.reference import attend as reference_attend
from ..kernels.reference import causal_mask
from ..kernels.sdpa import widen
from ..kernels.windowed import by_column
from .decoding import decode_latents, has_kernel
from .eviction import check_backend, evict, for_each_kv_head, for_each_query_head, mask_for_rows
from .prefill import is_long, read_latents
from .projections import Heads
from .rotary import at_columns, rotate

if TYPE_CHECKING:
    from .attention import EigenAttention


def attend_to_latents(
    attention: EigenAttention, heads: Heads, cache: Any, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """The attention output [B, H, T, D or R_v] of queries, keys and values before rotation, and weights if eager."""
    q, (k, v) = heads.query, (attention.rounded if cache is None else attention.stored)(heads.key, heads.value)
    interleaved = attention.family.interleaved
    decodes_keys = attention.rotates and attention.key_decoder is not None
    if attention.rotates:
        q = rotate(q, *kwargs["position_embeddings"], interleaved)
        if not decodes_keys:
            k = rotate(k, *kwargs["position_embeddings"], interleaved)
    elif attention.key_decoder is not None:
        q = attention.query_in_small_space(q)
    columns = None
    if cache is not None:
        held = _update(attention, k, v, cache, kwargs)
        k, v = held.keys, held.values
        columns = for_each_query_head(attention, held.columns)
    length = k.shape[-2] if cache is None else cache.get_seq_length(attention.layer_idx)
    if has_kernel(attention, q, cache, kwargs):
        return decode_latents(attention, q, k, v, rotates=decodes_keys, length=length, kwargs=kwargs), None
    if is_long(attention, q, k.shape[-2], cache, kwargs):
        return read_latents(attention, q, Far(k, v), cache is not None, decodes_keys, length, kwargs), None
    if cache is not None:
        k, v = attention.restored(k, v, q.dtype)
    seen = k.shape[-2] if columns is None else length
    if decodes_keys:
        angles = attention.key_angles(k, kwargs["position_ids"], seen, length)
        if columns is not None:
            of_keys = for_each_kv_head(attention, columns)
            angles = [at_columns(table, of_keys) for table in angles]
        k = rotate(attention.decode(k, "key"), *angles, interleaved)  # [B, G, S, D]
    k, v = attention.for_each_head(k), attention.for_each_head(v)
    if columns is None:
        mask = attention.mask_for(q, seen, kwargs)
    else:
        mask = mask_for_rows(attention, q, seen, columns, kwargs)
    out, weights = _attend(attention, q, k, v, mask, kwargs)  # [B, H, T, *]
    if weights is not None and columns is not None:
        weights = by_column(weights, columns, columns.new_zeros(0), seen)

    def last_weights(queries: int) -> Tensor:
        rows = causal_mask(q.shape[-2], k.shape[-2], q.device)[None, None] if mask is None else mask
        options = {"mask": rows[:, :, -queries:], "scale": attention.scaling, "softcap": attention.softcap}
        return reference_attend(q[:, :, -queries:], k, v, **options)[1]

    evict(attention, cache, q, kwargs, last_weights)
    return attention.decode_output(out), weights


def _update(attention: EigenAttention, k: Tensor, v: Tensor, cache: Any, kwargs: dict[str, Any]) -> Far:
    """Put latents [B, G/N, T, width] into the cache, and give all that it holds then."""
    if getattr(cache, "eviction", None) is None:
        prepare(cache, attention.layer_idx, (k, v))
        return Far(*cache.update(k, v, attention.layer_idx))
    check_backend(attention, kwargs)
    with_window(cache, attention.layer_idx, 0, attention.sliding_window)
    return cache.update(k, v, attention.layer_idx)[0]


def _attend(
    attention: EigenAttention, q: Tensor, k: Tensor, v: Tensor, mask: Any, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    implementation = attention.implementation_for(kwargs)
    dropout = attention.dropout if attention.training else 0.0
    if implementation in BACKENDS:
        options = {"mask": mask, "scale": attention.scaling, "dropout": dropout, "softcap": attention.softcap}
        return BACKENDS[implementation](q, k, v, **options)
    # FlashAttention, FlexAttention and kernels from the hub take one head size for all three.
    size, size_v = max(q.shape[-1], v.shape[-1]), v.shape[-1]
    consumed = {"attention_mask", "position_embeddings", "output_attentions", attention.family.cache_argument}
    options = {name: value for name, value in kwargs.items() if name not in consumed}
    options |= {"dropout": dropout, "scaling": attention.scaling, "sliding_window": attention.sliding_window}
    if attention.softcap is not None:
        options["softcap"] = attention.softcap
    attend = ALL_ATTENTION_FUNCTIONS[implementation]
    out, weights = attend(attention, widen(q, size), widen(k, size), widen(v, size), mask, **options)
    return out.transpose(1, 2)[..., :size_v], weights
