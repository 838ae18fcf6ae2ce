"""Second moments of queries, keys and values, streamed over calibration batches in float64."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EigenAttnError
from ..models.attention import EigenAttention
from ..models.projections import Heads


@dataclass
class LayerMoments:
    """Uncentred second moments of one layer, sums over tokens, [G, D, D] in float64.

    Queries and attention outputs are summed over the query heads of a group. Queries and keys are taken before
    rotation.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, kv_heads: int, head_dim: int, device: torch.device) -> LayerMoments:
        return cls(*(torch.zeros(kv_heads, head_dim, head_dim, dtype=torch.float64, device=device) for _ in range(4)))


def second_moment(x: Tensor, valid: Tensor | None, kv_heads: int) -> Tensor:
    """Sum of outer products of vectors [B, heads, T, D], per KV head: [G, D, D] in float64.

    Args:
        valid: [B, T] of booleans, or None; vectors of other tokens (padding) do not count.
    """
    if valid is not None:
        x = torch.where(valid[:, None, :, None], x, 0)
    d = x.shape[-1]
    # Query heads of a group lie next to each other, so that they join the tokens of their KV head.
    rows = x.transpose(0, 1).reshape(kv_heads, -1, d).double()  # [G, H/G * B * T, D]
    return rows.transpose(-1, -2) @ rows


class MomentCollector:
    """Sums the moments of every layer while a converted model runs (`EigenAttention.observer`)."""

    def __init__(self, layers: list[EigenAttention]) -> None:
        self.layers = layers
        self.moments = [LayerMoments.zeros(a.kv_heads, a.head_dim, _device(a)) for a in layers]
        self.valid: Tensor | None = None

    @contextmanager
    def attached(self) -> Iterator[MomentCollector]:
        """Observe for the duration of the block."""
        hooks = []
        for attention, moments in zip(self.layers, self.moments, strict=True):
            attention.observer = lambda _, heads, kwargs, moments=moments: self._heads(moments, heads)
            hook = attention.output_projection.register_forward_pre_hook(
                lambda _, inputs, attention=attention, moments=moments: self._output(attention, moments, inputs[0])
            )
            hooks.append(hook)
        try:
            yield self
        finally:
            for attention, hook in zip(self.layers, hooks, strict=True):
                attention.observer = None
                hook.remove()

    def _heads(self, moments: LayerMoments, heads: Heads) -> None:
        kv_heads = moments.key.shape[0]
        moments.query += second_moment(heads.query, self.valid, kv_heads)
        moments.key += second_moment(heads.key, self.valid, kv_heads)
        moments.value += second_moment(heads.value, self.valid, kv_heads)
        moments.tokens += heads.key.shape[0] * heads.key.shape[2] if self.valid is None else int(self.valid.sum())

    def _output(self, attention: EigenAttention, moments: LayerMoments, flat: Tensor) -> None:
        outputs = flat.unflatten(-1, (attention.heads, attention.head_dim)).transpose(1, 2)  # [B, H, T, D]
        moments.output += second_moment(outputs, self.valid, attention.kv_heads)

    def check(self) -> None:
        """Raise an `EigenAttnError` naming the first layer whose statistics are empty or not finite."""
        for attention, moments in zip(self.layers, self.moments, strict=True):
            if moments.tokens == 0:
                raise EigenAttnError("the calibration batches held no tokens.")
            for name in ("query", "key", "value", "output"):
                if not getattr(moments, name).isfinite().all():
                    raise EigenAttnError(
                        f"layer {attention.layer_idx} gives NaN or infinite {name} vectors on the calibration text: "
                        "try --dtype float32, or check the model's weights."
                    )


def _device(attention: EigenAttention) -> torch.device:
    return attention.output_projection.weight.device


@dataclass(frozen=True)
class Batch:
    """Token ids [B, T] and, with padding, their attention mask [B, T]."""

    input_ids: Tensor
    attention_mask: Tensor | None = None

    @classmethod
    def of(cls, value: Any, device: torch.device) -> Batch:
        """Read one element of a user's `batches`: a tensor of token ids, or a mapping as tokenizers return it.

        Raises:
            EigenAttnError: on anything else, or on sequences of fewer than 2 tokens.
        """
        mask = None
        if isinstance(value, Tensor):
            ids = value
        elif hasattr(value, "get") and isinstance(value.get("input_ids"), Tensor):
            ids, mask = value["input_ids"], value.get("attention_mask")
        else:
            raise EigenAttnError(
                "batches must yield token-id tensors [B, T] or dictionaries with input_ids and attention_mask, not "
                f"{type(value).__name__}."
            )
        ids = ids.unsqueeze(0) if ids.dim() == 1 else ids
        if ids.dim() != 2 or ids.shape[1] < 2 or ids.is_floating_point():
            raise EigenAttnError(f"token ids must be whole numbers [B, T], T at least 2, not {tuple(ids.shape)}.")
        if mask is not None and mask.shape != ids.shape:
            raise EigenAttnError(f"attention_mask {tuple(mask.shape)} and input_ids {tuple(ids.shape)} must agree.")
        return cls(ids.to(device), None if mask is None else mask.to(device))

    @property
    def valid(self) -> Tensor | None:
        return None if self.attention_mask is None else self.attention_mask.bool()

    @property
    def tokens(self) -> int:
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())


@torch.no_grad()
def forward_hidden(model: nn.Module, batch: Batch) -> None:
    """Run a causal language model on a batch for its side effects: no cache, and logits of one position only."""
    model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, logits_to_keep=1)


def collect_moments(model: nn.Module, layers: list[EigenAttention], batches: Iterable[Batch]) -> list[LayerMoments]:
    """Second moments of every layer over all batches; memory does not grow with their number.

    Raises:
        EigenAttnError: if there were no tokens, or a layer's activations are not finite.
    """
    collector = MomentCollector(layers)
    with collector.attached():
        for batch in batches:
            collector.valid = batch.valid
            forward_hidden(model, batch)
    collector.check()
    return collector.moments
