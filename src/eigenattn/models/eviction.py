"""Between attention and a cache that evicts: what its rule may ask for."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..cache.evicting import EvictingLayer
from ..cache.rules import Held
from ..cache.sight import Sight
from .attend import weights_on_rows
from .forward_pass import ForwardPass
from .layer import AttentionLayer


@torch.no_grad()
def evict(layer: AttentionLayer, this: ForwardPass, q: Tensor, sight: Sight) -> None:
    """Have the layer's cache evict what is over its budget, after a pass, if it does that at all.

    Args:
        q: queries of this pass [B, H, T, D], before rotation.
    """
    held = this.cache.layers[layer.layer_idx] if this.evicts else None
    if not isinstance(held, EvictingLayer) or layer.is_read:
        return  # later layers may look at what this one has no use for
    seen = held.get_seq_length()
    first = this.first_token(q, seen).view(-1, 1, 1)

    @functools.cache
    def latents() -> tuple[Tensor, ...]:
        return layer.restored(sight.far.rows, q.dtype)

    def attention(queries: int) -> Tensor:
        observed = min(queries, q.shape[-2])
        weights = weights_on_rows(layer, this, q, sight, observed)
        # Padding sees nothing, of which the softmax makes everything.
        padding = torch.arange(seen - observed, seen, device=q.device).view(-1, 1) < first
        return weights.masked_fill(padding.unsqueeze(1), 0.0)

    def describe(columns: Tensor, kept: int, tally: Tensor | None = None) -> Held:
        return Held(
            columns=columns,
            first=first,
            seen=seen,
            queries=q.shape[-2],
            kept=kept,
            keys=lambda: layer.decode(layer.latent(latents(), "key"), "key"),
            values=lambda: layer.decode(layer.latent(latents(), "value"), "value"),
            attention=attention,
            tally=tally,
        )

    held.evict(q.shape[-2], describe)
