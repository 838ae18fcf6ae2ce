"""What has to hold before and after compression, so that nothing wrong reaches a checkpoint unseen."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ..errors import EigenAttnError
from ..models.attention import EigenAttention
from ..models.placement import loaded, put_off
from .bases import Basis


def check_weights(model: nn.Module) -> None:
    """Raise an `EigenAttnError` that names the first weight with a NaN or an infinity."""
    for where, module in model.named_modules():
        with loaded(module) if put_off(module) else nullcontext():  # one at a time
            for name, parameter in module.named_parameters(where, recurse=False):
                if parameter.is_meta or not parameter.is_floating_point() or not parameter.numel():
                    continue
                # The extremes of a NaN are NaN, and need no tensor of the weight's size.
                if not all(extreme.isfinite() for extreme in parameter.detach().aminmax()):
                    raise EigenAttnError(
                        f"{name} of this model holds NaN or infinite numbers: its file may be damaged."
                    )


def check_vocabulary(input_ids: Tensor, model: nn.Module) -> None:
    """Raise an `EigenAttnError` if there are token ids [B, T] that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    least, most = (int(extreme) for extreme in input_ids.aminmax())
    if least < 0 or most >= rows:
        wrong = least if least < 0 else most
        raise EigenAttnError(
            f"the text has token {wrong}, and the model knows tokens 0 to {rows - 1}: is the tokenizer another model's?"
        )


def check_range(attention: EigenAttention, bases: Sequence[Basis | None]) -> None:
    """Raise an `EigenAttnError` if bases of keys and values do not fit the layer's dtype."""
    dtype = attention.output_projection.weight.dtype
    for side, basis in zip(("key", "value"), bases, strict=True):
        if basis is None:
            continue
        for name, tensor in (("encoder", basis.encoder), ("decoder", basis.decoder), ("mean", basis.mean)):
            if tensor is not None and not _fits(tensor, dtype):
                raise EigenAttnError(
                    f"layer {attention.layer_idx}'s {side}_{name} does not fit {str(dtype).removeprefix('torch.')}: "
                    "compress in bfloat16 or float32."
                )


def _fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    return bool((tensor.abs() <= torch.finfo(dtype).max).all())  # a NaN is not


def check_layer(attention: EigenAttention) -> None:
    """Raise an `EigenAttnError` that names the first weight of a compressed layer with a NaN or an infinity."""
    for name, parameter in attention.named_parameters():
        if not parameter.isfinite().all():
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise EigenAttnError(
                f"layer {attention.layer_idx}'s {name} overflows {dtype} when maps are folded into it: compress in "
                "bfloat16 or float32."
            )
