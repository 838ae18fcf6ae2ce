"""Putting bases on an attention module, and folding them into its projections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models.attention import EigenAttention
from ..models.maps import MAPS, QUANTISERS
from ..models.placement import execution_device
from ..models.projections import Heads, is_plain, join_heads, split_heads, weight_of, with_weight
from .basis import Basis


def attach(attention: EigenAttention, bases: Sequence[Basis], window: int = 0) -> None:
    """Compress a layer with maps applied at run time; the projections stay as they are.

    Args:
        bases: of keys and of values, or of both; a side that is in none of them stays as the original has it.
        window: exact tokens, W.
    """
    detach(attention)
    output = attention.output_projection
    trains = not is_plain(output) or output.weight.requires_grad
    like = trains, {"device": execution_device(output), "dtype": attention.dtype}
    attention.layout = attention.layout.holding([basis.latent for basis in bases], window)
    for basis in bases:
        maps = basis.encoder.transpose(-1, -2), basis.decoder, basis.mean  # [G, R, D] twice and [G, D]
        by_side = zip(
            *(len(basis.sides) * [None] if x is None else x.chunk(len(basis.sides), dim=-1) for x in maps), strict=True
        )
        for side, (encoder, decoder, mean) in zip(basis.sides, by_side, strict=True):
            _set(attention, f"{side}_encoder", encoder.flatten(0, 1), like)  # [G * R, D]
            _set(attention, f"{side}_decoder", decoder.flatten(0, 1), like)
            if mean is not None:
                _set(attention, f"{side}_mean", mean.flatten(), like)
        if basis.quantiser is not None:
            _set(attention, f"{basis.sides[0]}_levels", basis.quantiser.levels.flatten(0, 1), like)


def detach(attention: EigenAttention) -> None:
    """Undo `attach`: back to full rank."""
    attention.layout = attention.layout.holding([], 0)
    for name in (*MAPS, *QUANTISERS):
        setattr(attention, name, None)


def fold(attention: EigenAttention) -> None:
    """Fold the attached maps into the projections wherever nothing stands between (arXiv 2408.05646, section 4.2).

    With a window, or latents shared by heads, nothing is folded. Arithmetic is in float64; the new projections have the
    old ones' dtype. The result has the shapes that `EigenAttention.allocate` gives.
    """
    if attention.layout.at_run_time:
        return
    free, encoded = attention.folds, attention.key_encoder is not None
    folds = Heads(free.query and encoded, free.key and encoded, free.value and attention.value_encoder is not None)
    nothing: Any = Heads(None, None, None)
    weights, biases, has_bias = _projection_parts(attention) if any(folds) else (nothing, nothing, nothing)
    size_q, size_k, size_v = attention.projected
    if folds.key:
        weights, biases = _encoded(attention, weights, biases, "key")
        has_bias = has_bias._replace(key=has_bias.key or attention.key_mean is not None)
        size_k = attention.layout.of("key").rank
        attention.key_encoder = None
        if folds.query:
            # q' = q @ U.T; the term q . mean is the same for every key, and the softmax drops it.
            decoder = _maps(attention, "key_decoder").repeat_interleave(attention.num_key_value_groups, dim=0)
            weights = weights._replace(query=decoder @ weights.query)
            biases = biases._replace(query=(decoder @ biases.query.unsqueeze(-1)).squeeze(-1))
            size_q = size_k
            attention.key_decoder = attention.key_mean = None
    if folds.value:
        weights, biases = _encoded(attention, weights, biases, "value")
        has_bias = has_bias._replace(value=has_bias.value or attention.value_mean is not None)
        size_v = attention.layout.of("value").rank
        attention.value_encoder = None
    if attention.value_decoder is not None and attention.folds_output:
        _fold_output(attention)
        attention.value_decoder = None
        if folds.value:
            attention.value_mean = None
    attention.projected = size_q, size_k, size_v
    if any(folds):
        _set_projections(attention, weights, biases, has_bias)


def _set(attention: EigenAttention, name: str, value: Tensor, like: tuple[bool, dict[str, Any]]) -> None:
    requires_grad, factory = like
    setattr(attention, name, nn.Parameter(value.to(**factory).contiguous(), requires_grad=requires_grad))


def _maps(attention: EigenAttention, name: str) -> Tensor:
    """A run-time map as [G, R, D] in float64."""
    return getattr(attention, name).detach().double().view(attention.kv_heads, -1, attention.head_dim)


def _encoded(
    attention: EigenAttention, weights: Heads[Tensor], biases: Heads[Tensor], side: str
) -> tuple[Heads[Tensor], Heads[Tensor]]:
    """Weights and biases of keys or values that give latents: `W' = E.T W`, `b' = E.T (b - mean)`."""
    encoder = _maps(attention, f"{side}_encoder")
    bias = getattr(biases, side)
    if getattr(attention, f"{side}_mean") is not None:
        bias = bias - getattr(attention, f"{side}_mean").detach().double().view_as(bias)
    bias = (encoder @ bias.unsqueeze(-1)).squeeze(-1)
    return weights._replace(**{side: encoder @ getattr(weights, side)}), biases._replace(**{side: bias})


def _fold_output(attention: EigenAttention) -> None:
    """Fold the value decoder and mean into the output projection, a query head's columns by its KV head's map."""
    projection = attention.output_projection
    weight = weight_of(projection).detach().double()  # [C, H * D]
    by_head = weight.unflatten(1, (attention.heads, attention.head_dim)).transpose(0, 1)  # [H, C, D]
    groups = attention.num_key_value_groups
    decoder = _maps(attention, "value_decoder").repeat_interleave(groups, dim=0)  # [H, R, D]
    folded = (by_head @ decoder.transpose(-1, -2)).transpose(0, 1).flatten(1)  # [C, H * R]
    bias = None if projection.bias is None else projection.bias.detach().double()
    if attention.value_mean is not None:
        mean = attention.value_mean.detach().double().view(attention.kv_heads, -1).repeat_interleave(groups, dim=0)
        offset = weight @ mean.flatten()
        bias = offset if bias is None else bias + offset
    setattr(attention, attention.family.output, with_weight(projection, folded, bias))


def _projection_parts(attention: EigenAttention) -> tuple[Heads[Tensor], Heads[Tensor], Heads[bool]]:
    """Weights [H or G, D, C] and biases [H or G, D] of queries, keys and values in float64, and who has a bias."""
    family = attention.family
    projections = [getattr(attention, name) for name in family.qkv]
    weights = [weight_of(projection).detach().double() for projection in projections]
    biases = [
        weight.new_zeros(weight.shape[0]) if p.bias is None else p.bias.detach().double()
        for p, weight in zip(projections, weights, strict=True)
    ]
    has_bias = [p.bias is not None for p in projections]
    if attention.fused:
        layout = (attention.projected, attention.heads, attention.kv_heads, attention.fused)
        by_head = split_heads(weights[0].T, *layout)  # [C, heads, D] each
        return Heads(*(w.permute(1, 2, 0) for w in by_head)), split_heads(biases[0], *layout), Heads(*has_bias * 3)
    sizes = attention.projected
    return (
        Heads(*(w.unflatten(0, (-1, size)) for w, size in zip(weights, sizes, strict=True))),
        Heads(*(b.unflatten(0, (-1, size)) for b, size in zip(biases, sizes, strict=True))),
        Heads(*has_bias),
    )


def _set_projections(
    attention: EigenAttention, weights: Heads[Tensor], biases: Heads[Tensor], has_bias: Heads[bool]
) -> None:
    family = attention.family
    if attention.fused:
        joined = join_heads(Heads(*(w.permute(2, 0, 1) for w in weights)), attention.fused).T
        columns = [(family.qkv[0], joined, join_heads(biases, attention.fused), any(has_bias))]
    else:
        flat = (weights.query.flatten(0, 1), weights.key.flatten(0, 1), weights.value.flatten(0, 1))
        columns = list(zip(family.qkv, flat, (b.flatten() for b in biases), has_bias, strict=True))
    for name, weight, bias, has in columns:
        setattr(attention, name, with_weight(getattr(attention, name), weight, bias if has else None))


@torch.no_grad()
def compress_layer(attention: EigenAttention, bases: Sequence[Basis], window: int) -> None:
    """Attach the bases of one layer and fold them."""
    attach(attention, bases, window)
    fold(attention)
