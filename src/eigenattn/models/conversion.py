"""Putting `EigenAttention` in the place of a model's own attention modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..cache.layout import Layout
from ..errors import EigenAttnError
from .attention import EigenAttention, eigen_class
from .families import FAMILIES, family_of
from .family import Family
from .forward_pass import note_rows
from .placement import execution_device, is_spread, place_like
from .projections import holds_codes

METHOD = "eigenattn"
# Quantisers that may leave plain weights: those of a GGUF file are unpacked on loading where no kernel reads them.
PLAIN = (None, METHOD, "gguf")
# Of a model type that has no row of its own: tokens that it is held to the original on, and the mean error relative to
# predictions that is rounding (chosen: random layers in half precision are within a tenth of it).
CHECKED_TOKENS = 8
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


def eigen_layers(model: nn.Module) -> list[EigenAttention]:
    """The `EigenAttention` modules of a model, by layer."""
    return sorted((m for m in model.modules() if isinstance(m, EigenAttention)), key=lambda m: m.layer_idx)


def layouts_of(model: nn.Module) -> list[Layout]:
    """What the cache of each layer consists of; nothing for a model that is not converted."""
    return [attention.layout for attention in eigen_layers(model)]


def originals_of(layers: Sequence[EigenAttention]) -> list[Layout]:
    """What the cache of each layer consists of in the original."""
    return [each.layout.original for each in layers]


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
    expected = None if family in FAMILIES.values() else _predictions(model)
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
    rotates = family.positions_of(config) == "rotary"
    sources: dict[str | None, EigenAttention] = {}
    for name, original in originals.items():
        rotary = _rotary_of(model, name, family) if rotates and _switched_on(original, family) else None
        reads = family.reads is not None and getattr(original, family.reads)
        replacement = eigen_class(type(original), reads)(original, family, getattr(original, "config", config), rotary)
        if replacement.rotates and (family.notes_positions or replacement.takes_rows):
            note_rows(replacement.rotary_module)
        if isinstance(replacement, EigenAttention):
            replacement.layout = dataclasses.replace(replacement.layout, beside=quantised)
            sources[replacement.layer_type] = replacement
        else:
            sources[replacement.layer_type].is_read = True
        model.set_submodule(name, place_like(replacement, original))
    if expected is not None:
        found = _predictions(model)
        if found is not None and not _alike(found, expected):
            restore_attention(model, originals)
            raise EigenAttnError(
                f"model type {config.model_type!r} is not supported: its attention runs the code of a known family, "
                "and computes something else."
            )
    return originals


def _switched_on(original: nn.Module, family: Family) -> bool:
    """Whether a layer of a model with rotary positions rotates."""
    switch = family.rotary_switch
    if switch is None:
        return True
    return bool(switch(original) if callable(switch) else getattr(original, switch))


def _rotary_of(model: nn.Module, name: str, family: Family) -> nn.Module:
    """The model's own rotary module, for the attention module of this name: the nearest one above it, or in it.

    Raises:
        EigenAttnError: if there is none.
    """
    original, path = model.get_submodule(name), name.split(".")
    for above in (model.get_submodule(".".join(path[:end])) for end in range(len(path), -1, -1)):
        found = family.rotary(above, original) if callable(family.rotary) else getattr(above, family.rotary, None)
        if isinstance(found, nn.Module):
            return found
    raise EigenAttnError(f"found no rotary module for {name}: is it an ordinary transformers model?")


@torch.no_grad()
def _predictions(model: PreTrainedModel) -> Tensor | None:
    """What a model makes of a few tokens; None without weights."""
    embeddings: Any = model.get_input_embeddings()
    if embeddings.weight.device.type == "meta" and not is_spread(model):
        return None
    ids = torch.arange(CHECKED_TOKENS, device=execution_device(embeddings))[None] % embeddings.weight.shape[0]
    training = model.training
    try:
        return model.eval()(ids, use_cache=False)[0]
    finally:
        model.train(training)


def _alike(found: Tensor, expected: Tensor) -> bool:
    """Whether predictions are the same but for rounding; what is no number is for others to find."""
    error = (found.double() - expected.double()).abs().nan_to_num().mean()
    return bool(error <= TOLERANCE[found.dtype] * expected.double().abs().nan_to_num().mean())


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
    for name in (*family.projections, family.output):
        projection = getattr(original, name, None)
        if projection is None and name != family.output:
            continue  # it reads what another layer caches, makes values by the keys' projection, or queries in one step
        if not quantised and not isinstance(projection, (nn.Linear, Conv1D)):
            raise EigenAttnError(
                f"{where}.{name} is a {type(projection).__name__}, not a linear layer of transformers: compress the "
                "model as it was before that was put there."
            )


def restore_attention(model: nn.Module, originals: dict[str, nn.Module]) -> None:
    """Undo `convert_attention`; projections that were folded meanwhile are not brought back by it."""
    for name, original in originals.items():
        model.set_submodule(name, original)
