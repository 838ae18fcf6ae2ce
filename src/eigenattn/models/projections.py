"""Query, key, value and output projections seen head by head, however a family stores them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from ..errors import EigenAttnError

T = TypeVar("T")

Projection = nn.Linear | Conv1D
# Rows of the identity that a quantised projection is asked with at a time (chosen: as many tokens as a short text).
ASKED = 512
# In the place of zeros, where a kernel divides by the largest number of a block: FP8 beside a 1 can tell it, and bf16
# rounds it away from that.
SMALL = 2**-9
# How far what a quantised layer makes of a row may lie from what its matrix says (chosen: activations in four bits are
# within 0.15, and a layer that normalises them is twice as far as it is long).
NOT_LINEAR = 0.3


class Heads(NamedTuple, Generic[T]):
    """Something of queries, of keys and of values."""

    query: T
    key: T
    value: T


def split_heads(x: Tensor, sizes: tuple[int, int, int], heads: int, kv_heads: int, fused: str) -> Heads[Tensor]:
    """Take a fused projection apart.

    Args:
        x: output of the fused projection, [..., H * Q + G * K + G * V].
        sizes: `(Q, K, V)`, the numbers of dimensions a head of queries, keys and values.
        heads: query heads, H.
        kv_heads: KV heads, G.
        fused: `blocks` or `grouped` (see `Family.fused`).

    Returns:
        [..., H, Q], [..., G, K] and [..., G, V].
    """
    q, k, v = sizes
    lead = x.shape[:-1]
    if fused == "blocks":
        query, key, value = x.split([heads * q, kv_heads * k, kv_heads * v], dim=-1)
    else:
        x = x.view(*lead, kv_heads, (heads // kv_heads) * q + k + v)
        query, key, value = x.split([(heads // kv_heads) * q, k, v], dim=-1)
    return Heads(query.reshape(*lead, heads, q), key.reshape(*lead, kv_heads, k), value.reshape(*lead, kv_heads, v))


def join_heads(parts: Heads[Tensor], fused: str) -> Tensor:
    """The inverse of `split_heads`: [..., H, Q], [..., G, K], [..., G, V] to one last dimension."""
    kv_heads = parts.key.shape[-2]
    lead = parts.key.shape[:-2]
    if fused == "blocks":
        return torch.cat([part.reshape(*lead, -1) for part in parts], dim=-1)
    grouped = [part.reshape(*lead, kv_heads, -1) for part in parts]
    return torch.cat(grouped, dim=-1).reshape(*lead, -1)


def weight_of(projection: Projection) -> Tensor:
    """The weight as [out, in]; GPT-2's Conv1D stores it the other way."""
    return projection.weight.T if isinstance(projection, Conv1D) else projection.weight


def holds_codes(tensor: Tensor) -> bool:
    """Whether a tensor is a quantised weight, or a part of one, and no plain numbers."""
    return (
        type(tensor) not in (Tensor, nn.Parameter, DTensor)
        or not tensor.is_floating_point()
        or tensor.dtype.itemsize == 1
    )


def is_plain(projection: Callable[[Tensor], Tensor]) -> TypeGuard[Projection]:
    """Whether a projection is its weight and its bias, as transformers has them, and not quantised.

    A kind of its own may round its weight only when it runs.
    """
    forward = getattr(type(projection), "forward", None)
    known = isinstance(projection, (nn.Linear, Conv1D)) and forward in (nn.Linear.forward, Conv1D.forward)
    return known and not holds_codes(projection.weight)


@torch.no_grad()
def answered(projection: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """What a linear module makes of rows [n, in], less its bias: [n, out]."""
    base = torch.zeros_like(rows[None, :1])
    found = (projection(rows[None]) - projection(base))[0]
    if bool(found.isfinite().all()):
        return found
    base = base + SMALL
    return (projection(rows[None] + base) - projection(base))[0]


def probes(count: int, size: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The same normal rows [count, size] every time."""
    return torch.randn(count, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)


@torch.no_grad()
def matrix_of(
    projection: Callable[[Tensor], Tensor], in_features: int, *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The matrix [out, in] of a projection, however it is stored: a quantised one is asked by the identity.

    Args:
        device, dtype: of what a quantised one is given.

    Raises:
        EigenAttnError: if a quantised one is not linear.
    """
    if is_plain(projection):
        return weight_of(projection).detach()
    columns = []
    for start in range(0, in_features, ASKED):
        rows = torch.zeros(min(ASKED, in_features - start), in_features, device=device, dtype=dtype)
        rows.diagonal(start).fill_(1)
        columns.append(answered(projection, rows))
    matrix = torch.cat(columns).T
    row = probes(1, in_features, device=device, dtype=dtype)
    expected, found = answered(projection, row).float(), row.float() @ matrix.T.float()
    if not (found - expected).norm() <= NOT_LINEAR * expected.norm():
        kind = type(getattr(projection, "__self__", projection)).__name__
        raise EigenAttnError(
            f"a {kind} with quantised weights does not multiply by a matrix, as it does if it normalises or cuts off "
            "what it is given: load the model with its weights dequantised."
        )
    return matrix


def like(
    projection: Projection, out_features: int, in_features: int, bias: bool, *, device: torch.device, dtype: torch.dtype
) -> Projection:
    """An empty projection of another size and of the same kind (`nn.Linear`, or GPT-2's `Conv1D`)."""
    if isinstance(projection, Conv1D):
        # Conv1D always has a bias and knows no factory arguments.
        with device:
            return Conv1D(out_features, in_features).to(dtype)
    return nn.Linear(in_features, out_features, bias, device="meta", dtype=dtype).to_empty(device=device)


def with_weight(projection: Projection, weight: Tensor, bias: Tensor | None) -> Projection:
    """A new projection of the same kind holding `weight` [out, in] and `bias` [out], in the old one's dtype."""
    old = projection.weight
    new = like(projection, *weight.shape, bias=bias is not None, device=old.device, dtype=old.dtype)
    with torch.no_grad():
        weight_of(new).copy_(weight)
        if new.bias is not None:
            new.bias.zero_() if bias is None else new.bias.copy_(bias)
    new.weight.requires_grad_(old.requires_grad)
    return new.train(projection.training)
