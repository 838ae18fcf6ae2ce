"""Putting `EigenAttention` in the place of a model's own attention modules."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..cache.layout import Layout
from ..errors import EigenAttnError
from .attention import EigenAttention, eigen_class
from .families import Family, family_of
from .placement import place_like
from .projections import holds_codes

METHOD = "eigenattn"
# Quantisers that may leave plain weights: those of a GGUF file are unpacked on loading where no kernel reads them.
PLAIN = (None, METHOD, "gguf")


def eigen_layers(model: nn.Module) -> list[EigenAttention]:
    """The `EigenAttention` modules of a model, by layer."""
    return sorted((m for m in model.modules() if isinstance(m, EigenAttention)), key=lambda m: m.layer_idx)


def layouts_of(model: nn.Module) -> list[Layout]:
    """What the cache of each layer consists of; nothing for a model that is not converted."""
    return [attention.layout for attention in eigen_layers(model)]


def convert_attention(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Replace every attention module by an `EigenAttention` at full rank, which computes the same.

    Where weights are quantised, maps are to stay beside the projections.

    Args:
        model: a transformers model, on any device, the meta device included.

    Returns:
        The original modules by name, for `restore_attention`.

    Raises:
        EigenAttnError: if the model type is unknown, or the model is compressed already or wrapped.
    """
    if eigen_layers(model):
        raise EigenAttnError("this model is compressed already: start from the original model.")
    family = family_of(model.config)
    # Adapters may be anywhere, and some wrap the whole model: prompts, prefixes.
    adapter = next((m for m in model.modules() if type(m).__module__.partition(".")[0] == "peft"), None)
    if adapter is not None:
        raise EigenAttnError(
            f"this model carries an adapter ({type(adapter).__name__}): merge it first (merge_and_unload), or add it "
            "after compression."
        )
    quantised = quantiser_of(model) is not None
    config = model.config.get_text_config(decoder=True)
    # By class, not by path: `AutoModel` has no `model.` prefix.
    originals: dict[str, nn.Module] = {
        name: m for name, m in model.named_modules() if type(m).__name__ == family.attention
    }
    if not originals:
        raise EigenAttnError(
            f"found no {family.attention} in this {type(model).__name__}: is it an ordinary transformers model?"
        )
    if any(getattr(original, "is_cross_attention", False) for original in originals.values()):
        raise EigenAttnError("this model has cross-attention: only decoders of one text are supported.")
    for name, original in originals.items():
        _check_projections(name, original, family, quantised)
    shared = [m for _, m in model.named_modules(remove_duplicate=False) if type(m).__name__ == family.attention]
    if len(shared) > len(originals):
        raise EigenAttnError("layers of this model share one attention module: each needs bases of its own.")
    rotary = None
    if family.positions_of(config) == "rotary":
        rotary = next(m for name, m in model.named_modules() if name.split(".")[-1] == "rotary_emb")
    for name, original in originals.items():
        replacement = eigen_class(type(original))(original, family, getattr(original, "config", config), rotary)
        replacement.layout = dataclasses.replace(replacement.layout, beside=quantised)
        model.set_submodule(name, place_like(replacement, original))
    return originals


def quantiser_of(model: PreTrainedModel) -> str | None:
    """What holds weights of a model as codes, or would when it is saved; None where all of them are numbers."""
    holders = [getattr(model, "hf_quantizer", None), model.config, model.config.get_text_config(decoder=True)]
    # What one of them dequantised on loading, `save_pretrained` quantises again.
    conversions = getattr(model, "_weight_conversions", None) or ()
    operations = [operation for each in conversions for operation in getattr(each, "operations", ())]
    holders += [getattr(operation, "hf_quantizer", None) for operation in operations]
    methods = [_method(getattr(each, "quantization_config", None)) for each in holders]
    found = next((method for method in methods if method not in PLAIN), None)
    if found is None and any(holds_codes(weight) for weight in model.state_dict().values()):
        found = "another quantiser"
    return found


def _method(config: Any) -> str | None:
    """The name of what quantises, by a `quantization_config`; None without one."""
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return str(getattr(method, "value", method or "another quantiser"))


def _check_projections(where: str, original: nn.Module, family: Family, quantised: bool) -> None:
    for name in (*family.qkv, family.output):
        projection = getattr(original, name)
        if not quantised and not isinstance(projection, (nn.Linear, Conv1D)):
            raise EigenAttnError(
                f"{where}.{name} is a {type(projection).__name__}, not a linear layer of transformers: compress the "
                "model as it was before that was put there."
            )


def restore_attention(model: nn.Module, originals: dict[str, nn.Module]) -> None:
    """Undo `convert_attention`; projections that were folded meanwhile are not brought back by it."""
    for name, original in originals.items():
        model.set_submodule(name, original)
