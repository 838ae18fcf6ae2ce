"""Tensor parallelism in transformers: heads, and with them latents and their maps, split over processes.

Each process holds a share of neighbouring KV heads and the query heads that belong to them, caches their latents, and
adds its part of the output projection to the others'.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import EigenAttnError
from .attention import EigenAttention
from .maps import MAPS, QUANTISERS

BY_ROWS, BY_COLUMNS, GATHERED = "colwise", "rowwise", "colwise_gather_output"  # transformers names them by W.T


def parallel_size(model: PreTrainedModel) -> int:
    """Processes that share the heads of a model that is being loaded, or is loaded; 1 without tensor parallelism."""
    distributed = getattr(model.config, "distributed_config", None)
    size = getattr(distributed, "tp_size", None) or getattr(model, "_tp_size", None)
    return size or 1


def check_whole(model: PreTrainedModel) -> None:
    """Raise an `EigenAttnError` if the heads of a model are split over processes."""
    size = parallel_size(model)
    if size > 1:
        raise EigenAttnError(
            f"this model is split over {size} processes, and bases need all heads: compress it in one, with "
            'device_map="auto" if it is large, and load the result with tensor parallelism.'
        )


def plan(model: PreTrainedModel, layers: list[EigenAttention]) -> None:
    """Say how the weights of a converted model are split, before they are loaded. Nothing happens with one process.

    transformers' own plan is kept but for attention, where it may gather heads, and knows nothing of maps.

    Raises:
        EigenAttnError: if the heads cannot be shared out evenly, or the family has no plan.
    """
    size = parallel_size(model)
    if size == 1:
        return
    for attention in layers:
        attention.layout.split(size)  # raises if heads that share a latent would part
    family = layers[0].family
    rules = dict(model._tp_plan or {})
    for name, module in model.named_modules():
        if not isinstance(module, EigenAttention):
            continue
        where = re.sub(r"\d+", "*", name)
        if f"{where}.{family.output}" not in rules:
            rules |= _feed_forward(module, where.rpartition(".")[0])
        rules |= {f"{where}.{each}": style for each, style in _attention(module).items()}
    model._tp_plan = rules


def _attention(attention: EigenAttention) -> dict[str, str]:
    family = attention.family
    rules = dict.fromkeys(family.qkv, BY_ROWS)
    if attention.fused == "blocks":
        rules = dict.fromkeys(family.qkv, GATHERED)  # a slice of the rows would not be whole heads
    elif attention.normalises and any(
        _is_of_all_heads(getattr(attention, norm), attention) for norm in family.norms or ()
    ):
        rules |= dict.fromkeys(family.qkv[:2], GATHERED)
    rules[family.output] = BY_COLUMNS
    return rules | {name: BY_ROWS for name in (*MAPS, *QUANTISERS) if getattr(attention, name) is not None}


def _is_of_all_heads(norm: nn.Module, attention: EigenAttention) -> bool:
    """Whether a norm has more than one head's weights."""
    weights = [weight for name, weight in norm.named_parameters() if name.endswith("weight")]
    return sum(weight.numel() for weight in weights) > attention.head_dim


def _feed_forward(attention: EigenAttention, layer: str) -> dict[str, str]:
    if attention.family.feed_forward is None:
        raise EigenAttnError(
            f"there is no tensor-parallel plan for {attention.family.title}: load it on one device, or spread it with "
            'device_map="auto".'
        )
    up, down = attention.family.feed_forward
    return {**{f"{layer}.{name}": BY_ROWS for name in up}, f"{layer}.{down}": BY_COLUMNS}


def take_part(model: PreTrainedModel, layers: list[EigenAttention]) -> None:
    """Have the layers compute with the heads of this process, after its weights are loaded."""
    size = parallel_size(model)
    if size > 1:
        mesh: Any = model._device_mesh
        rank = mesh.get_local_rank("tp") if mesh.ndim > 1 else mesh.get_local_rank()
        for attention in layers:
            attention.take_part(rank, size)
