"""Second moments of queries, keys and values, streamed over calibration batches in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import EigenAttnError
from ..models.attention import EigenAttention
from ..models.forward_pass import ForwardPass
from ..models.placement import execution_device
from ..models.projections import Heads


@dataclass
class LayerMoments:
    """Uncentred second moments of one layer, sums over tokens, [G, D, D] in float64.

    Queries are summed over the query heads of a group. Queries and keys are taken before rotation.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    tokens: int = 0

    @classmethod
    def of(cls, attention: EigenAttention) -> LayerMoments:
        """Empty moments for a layer."""
        shape = (attention.kv_heads, attention.head_dim, attention.head_dim)
        device = execution_device(attention.output_projection)
        query, key, value = (torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(3))
        return cls(query, key, value)

    def observe(self, attention: EigenAttention, heads: Heads[Tensor], this: ForwardPass, valid: Tensor | None) -> None:
        """Add one batch."""
        for sums, x in zip((self.query, self.key, self.value), heads, strict=True):
            sums += second_moment(x, valid, attention.kv_heads)


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


class Counted(Protocol):
    """Sums that know how many tokens they are of."""

    tokens: int


class Moments(Protocol):
    """What a basis is made of: sums over calibration text for one layer.

    Its tensors, and those of data classes in it, are what an interrupted command takes up: they are changed in place.
    """

    tokens: int

    def observe(self, attention: EigenAttention, heads: Heads[Tensor], this: ForwardPass, valid: Tensor | None) -> None:
        """Add one batch: queries, keys and values before rotation, and the pass that they are of.

        Args:
            valid: [B, T] of booleans, or None; other tokens (padding) do not count.
        """


def tensors_of(moments: Any) -> Iterator[tuple[str, Tensor]]:
    """All tensors of moments, by name."""
    for name, value in vars(moments).items():
        if isinstance(value, Tensor):
            yield name, value
        elif dataclasses.is_dataclass(value):
            yield from ((f"{name}.{inner}", tensor) for inner, tensor in tensors_of(value))


def named_tensors(moments: Iterable[Any]) -> dict[str, Tensor]:
    """All tensors of the moments of some layers, by their names in a file."""
    return {f"{place}.{name}": value for place, sums in enumerate(moments) for name, value in tensors_of(sums)}


AnyMoments = TypeVar("AnyMoments", bound=Moments)
Summed = TypeVar("Summed", bound=Counted)


@dataclass(frozen=True)
class Batch:
    """Token ids [B, T] and, with padding, their attention mask [B, T]."""

    input_ids: Tensor
    attention_mask: Tensor | None = None

    @classmethod
    def of(cls, value: Any, device: torch.device) -> Batch:
        """Read one element of a user's `batches`: a tensor of token ids, or a mapping as tokenizers return it.

        A single sequence, as `Dataset.with_format("torch")` gives rows, is a batch of one. A batch that was read
        already goes to the device.

        Raises:
            EigenAttnError: on anything else, or on sequences of fewer than 2 tokens.
        """
        mask = None
        if isinstance(value, Tensor):
            ids = value
        elif isinstance(value, Batch):
            ids, mask = value.input_ids, value.attention_mask
        elif hasattr(value, "get") and isinstance(value.get("input_ids"), Tensor):
            ids, mask = value["input_ids"], value.get("attention_mask")
        else:
            raise EigenAttnError(
                "batches must yield token-id tensors [B, T] or dictionaries with input_ids and attention_mask, not "
                f"{type(value).__name__}."
            )
        if ids.dim() == 1:
            ids, mask = ids[None], None if mask is None else mask[None]
        if ids.dim() != 2 or ids.shape[1] < 2 or ids.is_floating_point():
            raise EigenAttnError(f"token ids must be whole numbers [B, T], T at least 2, not {tuple(ids.shape)}.")
        if mask is not None and mask.shape != ids.shape:
            raise EigenAttnError(f"attention_mask {tuple(mask.shape)} and input_ids {tuple(ids.shape)} must agree.")
        return cls(ids.to(device), None if mask is None else mask.to(device))

    @property
    def valid(self) -> Tensor | None:
        """Which tokens are no padding, [B, T] of booleans; None if none is."""
        return None if self.attention_mask is None else self.attention_mask.bool()

    @property
    def tokens(self) -> int:
        """How many they are, padding left out."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())


@torch.no_grad()
def forward_hidden(model: PreTrainedModel, batch: Batch) -> None:
    """Run a causal language model on a batch for its side effects: no cache, and logits of one position only."""
    model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, logits_to_keep=1)


def collect_moments(
    model: PreTrainedModel,
    layers: Sequence[EigenAttention],
    batches: Iterable[Batch],
    empty: Callable[[EigenAttention], AnyMoments],
) -> list[AnyMoments]:
    """Moments of every layer over all batches; memory does not grow with their number.

    Args:
        empty: gives the empty moments of a layer.

    Raises:
        EigenAttnError: if there were no tokens, or a layer's activations are not finite.
    """
    moments = [empty(attention) for attention in layers]
    valid: Tensor | None = None
    for attention, sums in zip(layers, moments, strict=True):
        attention.observer = lambda layer, heads, this, sums=sums: sums.observe(
            layer, heads, this, None if valid is None else valid.to(heads.key.device)
        )
    try:
        for batch in batches:
            valid = batch.valid
            forward_hidden(model, batch)
            for sums in moments:
                sums.tokens += batch.tokens
    finally:
        for attention in layers:
            attention.observer = None
    return checked_moments(layers, moments)


def checked_moments(layers: Sequence[EigenAttention], moments: list[Summed]) -> list[Summed]:
    """The same moments.

    Raises:
        EigenAttnError: if there were no tokens, or a layer's activations are not finite.
    """
    for attention, sums in zip(layers, moments, strict=True):
        if sums.tokens == 0:
            raise EigenAttnError("the calibration batches held no tokens.")
        for name, value in tensors_of(sums):
            if not value.isfinite().all():
                raise not_finite(attention, f"{name} vectors")
    return moments


def not_finite(attention: EigenAttention, what: str) -> EigenAttnError:
    """What is said of a layer that gives no numbers."""
    return EigenAttnError(
        f"layer {attention.layer_idx} gives NaN or infinite {what} on the calibration text: try --dtype float32, or "
        "check the model's weights."
    )
