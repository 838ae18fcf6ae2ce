"""Between attention and a cache that evicts: which tokens its rows are, what they are looked at with, and the votes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..cache.evicting import EigenCache, EvictingLayer
from ..errors import EigenAttnError
from ..kernels import BACKENDS
from ..kernels.reference import causal_mask
from ..kernels.windowed import take_columns

if TYPE_CHECKING:
    from .attention import EigenAttention


def check_backend(attention: EigenAttention, kwargs: dict[str, Any]) -> None:
    """Look whether the attention backend can see another mask in each head.

    Raises:
        EigenAttnError: if it cannot.
    """
    implementation = attention.implementation_for(kwargs)
    if implementation not in BACKENDS:
        raise EigenAttnError(
            f'{implementation} cannot attend where tokens are evicted: load the model with attn_implementation="sdpa".'
        )


def for_each_query_head(attention: EigenAttention, columns: Tensor | None) -> Tensor | None:
    """Columns [B, heads, F] of the cache's rows once for every query head, [B, H, F], as indices."""
    if columns is None:
        return None
    return columns.long().repeat_interleave(attention.heads // columns.shape[1], dim=1)


def for_each_kv_head(attention: EigenAttention, columns: Tensor) -> Tensor:
    """Columns [B, H, F] of query heads once for every KV head, [B, G, F]."""
    return columns[:, :: attention.num_key_value_groups]


def mask_for_rows(attention: EigenAttention, q: Tensor, seen: int, columns: Tensor, kwargs: dict[str, Any]) -> Any:
    """As `EigenAttention.mask_for` of all tokens seen, but for rows at columns [B, H, F]: [B, H, T, F] or None."""
    mask, t = attention.mask_for(q, seen, kwargs), q.shape[-2]
    if mask is None and t > 1:
        mask = causal_mask(seen, seen, q.device)[None, None, seen - t :]
    return None if mask is None else take_columns(mask, columns)


def evict(
    attention: EigenAttention, cache: Any, q: Tensor, kwargs: dict[str, Any], weights: Callable[[int], Tensor] | None
) -> None:
    """Have the layer's cache evict what is over its budget, if it does that at all.

    Args:
        q: queries of this pass [B, H, T, D].
        weights: gives the attention [B, H, n, F] that the last n queries pay to the rows held behind the window; None
            for a single query, of which no rule counts the attention.
    """
    layer = cache.layers[attention.layer_idx] if isinstance(cache, EigenCache) else None
    if not isinstance(layer, EvictingLayer):
        return

    def votes(queries: int) -> Tensor:
        return weights(queries).float().mean(-2)

    layer.evict(q.shape[-2], lambda: _first_token(attention, layer.get_seq_length(), q, kwargs), votes)


def _first_token(attention: EigenAttention, seen: int, q: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The first column [B or 1] that is no left padding: the first one that the last query sees."""
    mask = kwargs.get("attention_mask")
    if mask is None:
        return torch.zeros(1, dtype=torch.int64, device=q.device)
    last = mask[:, 0, -1, :seen]
    if last.dtype != torch.bool:
        last = last > torch.finfo(last.dtype).min / 2  # ALiBi may have been added to it
    elif attention.family.mask_true_is_masked:
        last = ~last
    return last.int().argmax(-1)
