"""The step of decoding by a fused kernel (`eigenattn.kernels.decoding`), where one is chosen and can serve the case."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..cache import layers
from ..kernels.decoding import Near, Rotary, Side, decode
from ..kernels.selection import takes_triton
from .kept import kept
from .rotary import once_a_pass, rotate

if TYPE_CHECKING:
    from .attention import EigenAttention

Number = int | Tensor


def has_kernel(attention: EigenAttention, q: Tensor, cache: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a fused kernel attends for queries [B, H, T, *]: one a row, without gradients, and nothing evicted."""
    if q.shape[-2] > 1 or cache is None or torch.is_grad_enabled() or not takes_triton(q):
        return False
    if getattr(cache, "eviction", None) is not None:
        return False
    return gives_no_weights(attention, kwargs) and (not attention.rotates or _frequencies(attention) is not None)


def gives_no_weights(attention: EigenAttention, kwargs: dict[str, Any]) -> bool:
    """Whether any way to attend will do: without attention weights, dropout, or masks of a backend's own kind."""
    if attention.training and attention.dropout:
        return False
    mask = kwargs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 4):
        return False
    implementation = attention.implementation_for(kwargs)
    if implementation == "eager":
        # A must for what has soft caps or ALiBi as an argument, and else a wish for the weights.
        must = attention.softcap is not None or attention.family.bias_argument is not None
        return must and not (kwargs.get("output_attentions") or getattr(attention.config, "output_attentions", False))
    return implementation == "sdpa"


def decode_latents(
    attention: EigenAttention,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    rotates: bool,
    length: Number,
    kwargs: dict[str, Any],
) -> Tensor:
    """The output [B, H, 1, D or R_v] of queries [B, H, 1, *] over all that a cache without a window holds.

    Args:
        q: rotated to their positions; taken to the small space where keys do not rotate.
        keys, values: as stored, [B, G/N, S, width].
        rotates: whether keys are decoded and rotated; otherwise they are what the queries meet.
        length: tokens the cache has seen; it may hold fewer, or have more room.
    """
    held = keys.shape[-2]
    length = torch.clamp(length, max=held) if isinstance(length, Tensor) else min(length, held)
    return _decode(attention, q, keys, values, rotates, rotates, length, length - 1, held, None, kwargs)


def decode_with_window(
    attention: EigenAttention, q: Tensor, far: layers.Far, near: layers.Near, columns: int, kwargs: dict[str, Any]
) -> Tensor:
    """The output [B, H, 1, D] of queries before rotation, over latents as stored and the exact window."""
    if attention.rotates:
        q = rotate(q, *kwargs["position_embeddings"], attention.family.interleaved)
    border = near.query - attention.window + 1
    border = torch.maximum(border, near.first) if isinstance(border, Tensor) else max(border, near.first)
    return _decode(
        attention, q, far.keys, far.values, True, attention.rotates, border, near.query, columns, near, kwargs
    )


def _decode(
    attention: EigenAttention,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    decodes_keys: bool,
    rotates: bool,
    length: Number,
    query: Number,
    columns: int,
    near: layers.Near | None,
    kwargs: dict[str, Any],
) -> Tensor:
    b, position_ids = q.shape[0], kwargs.get("position_ids")
    mask = attention.mask_for(q, columns, kwargs)

    def shared(name: tuple, compute: Callable[[], Any]) -> Any:
        """The same for all layers of a pass whose caches are alike."""
        if position_ids is None:
            return compute()
        alike = any(isinstance(number, Tensor) for number in (length, query))  # their own, though equal
        key = (name, attention.layer_idx if alike else (length, query, columns))
        return once_a_pass(position_ids, attention.layer_idx, key, compute)

    def each_row(number: Number) -> Tensor:
        if isinstance(number, Tensor):
            return number.to(torch.int32).reshape(-1).expand(b)
        return torch.full((b,), number, dtype=torch.int32, device=q.device)

    def first() -> Tensor:
        """Columns that the mask hides in front of each row, so that they need not be read."""
        if mask is None or mask.dtype != torch.bool or mask.shape[1] > 1:
            return torch.zeros(b, dtype=torch.int32, device=q.device)
        return mask[:, 0, -1].to(torch.uint8).argmax(-1).to(torch.int32).expand(b)

    def position() -> Tensor:
        """Position of column 0; under left padding it is negative."""
        return (position_ids[:, -1] - query).to(torch.int32).expand(b)

    window = None
    if near is not None:
        window = Near(
            near.keys,
            near.values,
            column=shared(("column", near.first if isinstance(near.first, int) else 0), lambda: each_row(near.first)),
            stop=shared(("stop",), lambda: each_row(query + 1)),
        )
    side_k, side_v = _sides(attention, decodes_keys)
    out = decode(
        q[:, :, 0],
        keys,
        keys if attention.joint else values,
        keys=side_k,
        values=side_v,
        scale=attention.scaling,
        length=shared(("length",), lambda: each_row(length)),
        first=shared(("first", attention.layer_type), first),
        position=shared(("position",), position) if rotates else None,
        rotary=_rotary(attention, q.device) if rotates else None,
        near=window,
        mask=None if mask is None else mask[:, :, -1],
        softcap=attention.softcap,
        backend="triton",
    )
    return out.unsqueeze(2)


def _sides(attention: EigenAttention, decodes_keys: bool) -> tuple[Side, Side]:
    """How the kernel decodes keys, which it need not where queries meet latents, and values, if not folded."""
    names = [f"{side}_{name}" for side in ("key", "value") for name in ("decoder", "mean", "levels")]

    def side(name: str, decodes: bool) -> Side:
        decoder = attention.by_head(f"{name}_decoder") if decodes else None
        mean = None if decoder is None else attention.by_head(f"{name}_mean")
        mean = None if mean is None else mean.flatten(1)
        if attention.widths_k is None:
            return Side(decoder, mean)
        codebook = attention.codebook(name)
        levels = codebook.levels.repeat_interleave(attention.shared_heads(name), dim=0)  # [G, R, 4]
        return Side(decoder, mean, codebook.widths, levels)

    return kept(
        attention,
        "_kernel_sides",
        [*(getattr(attention, name) for name in names), attention.widths_k, attention.widths_v, decodes_keys],
        lambda: (side("key", decodes_keys), side("value", True)),
    )


def _frequencies(attention: EigenAttention) -> Tensor | None:
    prefix = f"{attention.layer_type}_" if attention.family.rotary_by_layer_type else ""
    return getattr(attention._rotary[0], f"{prefix}inv_freq", None)


def _rotary(attention: EigenAttention, device: torch.device) -> Rotary:
    """The model's own frequencies, as they are in this pass: some kinds of scaling change them with the length."""
    prefix = f"{attention.layer_type}_" if attention.family.rotary_by_layer_type else ""
    scaling = float(getattr(attention._rotary[0], f"{prefix}attention_scaling", 1.0))
    frequencies = _frequencies(attention)
    return kept(
        attention,
        "_kernel_rotary",
        [frequencies, scaling, device],
        lambda: Rotary(frequencies.to(device), scaling, attention.family.interleaved),
    )
