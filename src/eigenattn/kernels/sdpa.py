"""Attention by PyTorch's fused `scaled_dot_product_attention`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import EigenAttnError
from .selection import HALF


def widen(x: Tensor, size: int) -> Tensor:
    """Pad the last dimension with zeros, which change neither scores nor outputs."""
    return F.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x


def as_taken(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """A mask in a dtype that fused kernels take: fp32 beside half precision, which would round what it adds."""
    if mask is None or mask.dtype in (torch.bool, q.dtype) or (mask.dtype == torch.float32 and q.dtype in HALF):
        return mask
    return mask.to(q.dtype)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    scale: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, None]:
    """As `kernels.reference.attend`, but without the attention weights, soft caps and sinks.

    Raises:
        EigenAttnError: if a soft cap or sinks are asked for.
    """
    if sinks is not None:
        raise EigenAttnError('sdpa has no sinks in the softmax: load the model with attn_implementation="eager".')
    if softcap is not None:
        raise EigenAttnError('sdpa has no soft cap on scores: load the model with attn_implementation="eager".')
    b, h, t, _ = q.shape
    g, s = k.shape[1:3]
    size_v = v.shape[-1]
    causal = mask is None and t > 1
    if causal and s > t:
        # An empty static cache is longer than the prompt, and what lies behind the prompt is masked.
        k, v = k[:, :, :t], v[:, :, :t]
    mask = as_taken(mask, q)
    if g < h:
        if t == 1 and (mask is None or mask.shape[1] == 1):
            q = q.reshape(b, g, h // g, -1)  # one query a head: a group's queries are rows of one KV head
        else:
            k, v = k.repeat_interleave(h // g, dim=1), v.repeat_interleave(h // g, dim=1)
    # The fused kernels take one head size only; unequal ones fall back to slow unfused ones. The smaller is padded.
    size = max(q.shape[-1], size_v)
    q, k, v = widen(q, size), widen(k, size), widen(v, size)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale, is_causal=causal)
    return out.reshape(b, h, t, size)[..., :size_v], None
