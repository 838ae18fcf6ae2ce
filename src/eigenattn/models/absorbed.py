"""Multi-head latent attention as attention of one KV head (arXiv 2405.04434, section 2.1).

A token's cache is a latent of all heads, and the part of the keys that is rotated, which all heads share. Each head has
a matrix that makes its keys of the latent, and one that makes its values. `q . (W_UK c) = (W_UK.T q) . c`, and sums of
values are those of latents: so the first is absorbed into queries, and the second follows attention. What is left is
one KV head of `D = rotated + latent` dimensions whose values are its keys. In values nothing reads the rotated ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .memoised import memoised
from .placement import execution_device, offloaded
from .projections import Heads, is_plain, weight_of


@dataclass(frozen=True, kw_only=True)
class Absorbed:
    """How a family projects what it caches, and brings what it attends to back to heads. Names are DeepSeek's.

    Args:
        pairs: whether projections give rotary pairs as neighbours (0, 1), (2, 3) ..., and not halves; None if the
            configuration says.
    """

    projections: ClassVar[tuple[str, ...]] = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
    norms: ClassVar[tuple[str, ...]] = ("q_a_layernorm", "kv_a_layernorm")

    pairs: bool | None = None

    @staticmethod
    def parts(config: Any) -> tuple[int, int]:
        """Dimensions of what is cached of a token: those that are rotated, and of the latent."""
        return config.qk_rope_head_dim, config.kv_lora_rank

    @staticmethod
    def size(config: Any) -> int:
        """All of them, D."""
        return config.qk_rope_head_dim + config.kv_lora_rank

    def project(self, layer: Any, hidden_states: Tensor) -> Heads[Tensor]:
        """Queries [B, H, T, D] and keys [B, 1, T, D], rotated dimensions first, before rotation; values are the keys.

        Args:
            layer: the `AttentionLayer`, which has the projections and norms.
        """
        config = layer.config
        if hasattr(layer, "q_proj"):
            flat = layer.q_proj(hidden_states)
        else:
            flat = layer.q_b_proj(layer.q_a_layernorm(layer.q_a_proj(hidden_states)))
        queries = flat.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        plain, rotated = queries.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        query = torch.cat([self._in_halves(rotated, config), plain @ self._of_heads(layer, plain.dtype)[0]], dim=-1)
        found = layer.kv_a_proj_with_mqa(hidden_states)
        latent, rotated = found.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        key = torch.cat([self._in_halves(rotated, config), layer.kv_a_layernorm(latent)], dim=-1).unsqueeze(1)
        return Heads(query, key, key)

    def expand(self, layer: Any, sums: Tensor) -> Tensor:
        """Attention's sums of values [B, H, T, D] to those of each head's own [B, H, T, V]."""
        return sums[..., layer.config.qk_rope_head_dim :] @ self._of_heads(layer, sums.dtype)[1].transpose(-1, -2)

    def _in_halves(self, x: Tensor, config: Any) -> Tensor:
        """The rotated dimensions as rotation takes them: their order is free, as long as queries and keys share it."""
        pairs = config.rope_interleave if self.pairs is None else self.pairs
        return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) if pairs else x

    def _of_heads(self, layer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What makes each head's keys [H, K, C], and its values [H, V, C], of a latent [C].

        Args:
            dtype: of what meets it.
        """
        config, projection = layer.config, layer.kv_b_proj

        def asked() -> Tensor:
            """The matrix of what is not simply there: quantised, with an adapter, or offloaded."""
            device = execution_device(projection)
            return projection(torch.eye(config.kv_lora_rank, device=device, dtype=dtype)[None])[0].T

        if is_plain(projection) and not offloaded(projection):
            whole = weight_of(projection)
        else:
            source = [*projection.parameters(), *projection.buffers()]
            trained = torch.is_grad_enabled() and any(each.requires_grad for each in source)
            anew = trained or offloaded(projection)
            whole = asked() if anew else memoised(layer, "_expansion", [*source, dtype], asked)
        by_head, size = whole.unflatten(0, (layer.heads, -1)), config.qk_nope_head_dim
        return by_head[:, :size], by_head[:, size:]
