"""What has to hold before and after compression, so that nothing wrong reaches a checkpoint unseen."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..config import Sharing
from ..errors import EigenAttnError
from ..models.attention import EigenAttention
from ..models.placement import loaded, offloaded
from ..models.projections import holds_codes
from .basis import Basis


def check_weights(model: PreTrainedModel) -> None:
    """Raise an `EigenAttnError` that names the first weight with a NaN or an infinity."""
    for where, module in model.named_modules():
        with loaded(module) if offloaded(module) else nullcontext():  # one at a time
            for name, parameter in module.named_parameters(where, recurse=False):
                if parameter.is_meta or holds_codes(parameter) or not parameter.numel():
                    continue
                # The extremes of a NaN are NaN, and need no tensor of the weight's size.
                if not all(extreme.isfinite() for extreme in parameter.detach().aminmax()):
                    raise EigenAttnError(
                        f"{name} of this model holds NaN or infinite numbers: its file may be damaged."
                    )


def check_sharing(kv_heads: int, sharing: Sharing) -> None:
    """Raise an `EigenAttnError` if KV heads cannot be dealt out to latents evenly."""
    for count in (sharing.keys, sharing.values):
        if kv_heads % count:
            divisors = [str(n) for n in range(1, kv_heads + 1) if kv_heads % n == 0]
            raise EigenAttnError(
                f"{count} KV heads cannot share a latent where there are {kv_heads}: choose {', '.join(divisors)}."
            )


def check_range(attention: EigenAttention, bases: Iterable[Basis]) -> None:
    """Raise an `EigenAttnError` if a layer's bases do not fit its dtype."""
    dtype = attention.dtype
    for basis in bases:
        for name, tensor in (("encoder", basis.encoder), ("decoder", basis.decoder), ("mean", basis.mean)):
            if tensor is not None and not _fits(tensor, dtype):
                kind = str(dtype).removeprefix("torch.")
                raise EigenAttnError(
                    f"layer {attention.layer_idx}'s {basis.sides[0]}_{name} does not fit {kind}: compress in bfloat16 "
                    "or float32."
                )


def _fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    return bool((tensor.abs() <= torch.finfo(dtype).max).all())  # a NaN is not


def check_layer(attention: EigenAttention) -> None:
    """Raise an `EigenAttnError` that names the first weight of a compressed layer with a NaN or an infinity."""
    for name, parameter in attention.named_parameters():
        if not holds_codes(parameter) and not parameter.isfinite().all():
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise EigenAttnError(
                f"layer {attention.layer_idx}'s {name} overflows {dtype} when maps are folded into it: compress in "
                "bfloat16 or float32."
            )
