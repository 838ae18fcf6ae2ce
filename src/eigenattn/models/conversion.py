"""Putting `EigenAttention` in the place of a model's own attention modules."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..cache.layout import Layout
from ..errors import EigenAttnError
from .attention import EigenAttention, eigen_class
from .families import Family, family_of
from .placement import place_like


def eigen_layers(model: nn.Module) -> list[EigenAttention]:
    """The `EigenAttention` modules of a model, by layer."""
    return sorted((m for m in model.modules() if isinstance(m, EigenAttention)), key=lambda m: m.layer_idx)


def layouts_of(model: nn.Module) -> list[Layout]:
    """What the cache of each layer consists of; nothing for a model that is not converted."""
    return [attention.layout for attention in eigen_layers(model)]


def convert_attention(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Replace every attention module by an `EigenAttention` at full rank, which computes the same.

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
        _check_plain(name, original, family)
    shared = [m for _, m in model.named_modules(remove_duplicate=False) if type(m).__name__ == family.attention]
    if len(shared) > len(originals):
        raise EigenAttnError("layers of this model share one attention module: each needs bases of its own.")
    rotary = None
    if family.positions_of(config) == "rotary":
        rotary = next(m for name, m in model.named_modules() if name.split(".")[-1] == "rotary_emb")
    for name, original in originals.items():
        replacement = eigen_class(type(original))(original, family, getattr(original, "config", config), rotary)
        model.set_submodule(name, place_like(replacement, original))
    return originals


def _check_plain(where: str, original: nn.Module, family: Family) -> None:
    for name in (*family.qkv, family.output):
        projection = getattr(original, name)
        if hasattr(projection, "base_layer"):
            raise EigenAttnError(
                f"{where}.{name} carries an adapter: merge it first (merge_and_unload), or add it after compression."
            )
        if not isinstance(projection, (nn.Linear, Conv1D)) or not projection.weight.is_floating_point():
            raise EigenAttnError(
                f"{where}.{name} is a {type(projection).__name__} of {projection.weight.dtype}: compress the model "
                "before its weights are quantised."
            )


def restore_attention(model: nn.Module, originals: dict[str, nn.Module]) -> None:
    """Undo `convert_attention`; projections that were folded meanwhile are not brought back by it."""
    for name, original in originals.items():
        model.set_submodule(name, original)
