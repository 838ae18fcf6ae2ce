"""Bases without the model: where maps stay beside the projections, they are all there is to keep."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..cache.layout import Layout
from ..errors import EigenAttnError
from .attention import EigenAttention
from .checked_files import read_into, read_object
from .checkpoint_format import EigenAttnCheckpointConfig, allocate, checkpoint_of, mark_compressed
from .conversion import METHOD, convert_attention, eigen_layers, layouts_of, originals_of, restore_attention
from .fingerprint import alike, fingerprint_of, is_quantised
from .maps import MAPS, QUANTISERS
from .parallel import check_whole

CONFIG_FILE = "config.json"
# Of versions before 0.2.0, without the model's own configuration.
OLD_CONFIG_FILE = "eigenattn_config.json"
BASES_FILE = "eigenattn.safetensors"
# What a hub's ids look like.
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
UNREACHABLE = (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError)


def save_bases(model: PreTrainedModel, folder: str | Path) -> None:
    """Write the bases of a compressed model, and what they belong to, as a folder that `from_pretrained` takes.

    Raises:
        EigenAttnError: if the model is not compressed, or maps are folded into its weights.
    """
    config, layers = checkpoint_of(model), eigen_layers(model)
    if config is None:
        raise EigenAttnError("this model is not compressed, and has no bases.")
    if not are_beside(layouts_of(model)):
        raise EigenAttnError("without a window the bases are folded into the weights: save the whole model.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: each.detach().cpu().contiguous() for name, each in _named(layers).items()}
    save_file(tensors, folder / BASES_FILE, metadata={"format": "pt"})
    config, told = copy.deepcopy(config), copy.deepcopy(model.config)
    if "base_model" not in config.provenance and model.name_or_path:
        path = Path(model.name_or_path)
        config.provenance["base_model"] = str(path.resolve()) if path.exists() else model.name_or_path
    config.base = {"weights": fingerprint_of(layers), "quantised": any(map(is_quantised, layers))}
    quantiser = getattr(model, "hf_quantizer", None)
    if quantiser is not None and not quantiser.pre_quantized:
        # On loading, of which the base model's files say nothing.
        config.base["quantization_config"] = quantiser.quantization_config.to_dict()
        config.base["weight_bytes"] = int(model.get_memory_footprint())
    told.quantization_config = config
    told.architectures = [type(model).__name__]
    told.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def are_beside(layouts: Sequence[Layout]) -> bool:
    """Whether all maps are beside projections that are as they were."""
    return all(layout.at_run_time or layout.uncompressed for layout in layouts)


def read_bases_config(folder: str) -> EigenAttnCheckpointConfig | None:
    """What a folder of bases says of itself, or bases on a hub; None if it is something else."""
    for name in (CONFIG_FILE, OLD_CONFIG_FILE):
        path = Path(folder) / name
        if path.is_file():
            config = _read_config(path)
            if config is not None:
                return config
    if not Path(folder).exists() and REPOSITORY.fullmatch(folder):
        try:
            return _read_config(Path(hf_hub_download(folder, CONFIG_FILE)))
        except UNREACHABLE:
            return None
    return None


def attach(model: PreTrainedModel, bases: str | Path, **hub: Any) -> PreTrainedModel:
    """Put bases on the model they were made for, in place; it then caches latents.

    Some of its weights are compared with what the bases say of them; it may have another dtype, and be quantised. Bases
    that say nothing, as older versions wrote them, are taken with a warning.

    Args:
        model: the base model, as `AutoModelForCausalLM.from_pretrained` gives it.
        bases: a folder that `eigenattn compress` wrote, or a hub id.
        hub: where and how a hub is asked: `revision`, `token`, and so on.

    Returns:
        The model.

    Raises:
        EigenAttnError: if there are no bases, or they do not fit. The model is then as it was.
    """
    config = read_config(bases, **hub)
    check_whole(model)
    originals = convert_attention(model)
    try:
        layers = eigen_layers(model)
        if not are_beside(config.layouts(layers[0].config, originals_of(layers))):
            raise EigenAttnError(f"{bases} is of a model without a window, whose bases are folded into its weights.")
        allocate(layers, config)
        check_base(bases, config, fingerprint_of(layers), any(map(is_quantised, layers)))
        read_tensors(bases, _named(layers), **hub)
    except BaseException:
        restore_attention(model, originals)
        raise
    config.base = None  # what is saved as a whole belongs to nothing
    mark_compressed(model, config)
    return model


def read_config(bases: str | Path, **hub: Any) -> EigenAttnCheckpointConfig:
    """What bases say of themselves.

    Raises:
        EigenAttnError: if there are none, or they are malformed.
    """
    config = _read_config(_file(bases, CONFIG_FILE, OLD_CONFIG_FILE, **hub))
    if config is None:
        raise EigenAttnError(f"{bases} holds no bases: give a folder that `eigenattn compress` wrote.")
    return config


def read_tensors(bases: str | Path, wanted: Mapping[str, Tensor], **hub: Any) -> None:
    """Read bases into tensors by their names, `layers.INDEX.MAP`; see `read_into`."""
    read_into(wanted, _file(bases, BASES_FILE, **hub), "bases")


def check_base(bases: str | Path, config: EigenAttnCheckpointConfig, own: str, quantised: bool) -> None:
    """Refuse bases that were made for another model; where they do not say for which, there is a warning.

    Args:
        own: the fingerprint of the model that they are to be put on.
        quantised: whether its weights are.

    Raises:
        EigenAttnError: if they were.
    """
    told = config.base or {}
    if told.get("weights") is None:
        warnings.warn(f"{bases} does not tell its base model from others: see that it is this one.", stacklevel=3)
        return
    if not alike(told["weights"], own, quantised or bool(told.get("quantised"))):
        base, revision = (config.provenance.get(f"base_model{end}") for end in ("", "_revision"))
        at = f" at revision {revision!r:.60}" if revision else ""
        load = f"load {base!r:.200}{at}, or " if base else ""
        raise EigenAttnError(
            f"the bases in {bases} were made for another model, whose weights differ: {load}compress this one."
        )


def _file(bases: str | Path, *names: str, **hub: Any) -> Path:
    """The first of these files that there is."""
    if Path(bases).is_dir():
        found = next((path for name in names if (path := Path(bases) / name).is_file()), None)
        if found is None:
            raise EigenAttnError(f"{bases} has no {names[0]}: give a folder that `eigenattn compress` wrote.")
        return found
    try:
        return Path(hf_hub_download(str(bases), names[0], **hub))
    except UNREACHABLE as error:
        raise EigenAttnError(f"{bases!r} is neither a folder of bases nor a hub id that can be reached.") from error


def _read_config(path: Path) -> EigenAttnCheckpointConfig | None:
    """The configuration of bases in a file; None if it is of something else."""
    values = read_object(path, "configuration of bases")
    if path.name == OLD_CONFIG_FILE:
        values["base"] = {"weights": values.get("base_model_weights")}
        return EigenAttnCheckpointConfig(**values)
    values = values.get("quantization_config")
    if not isinstance(values, dict) or values.get("quant_method") != METHOD or values.get("base") is None:
        return None
    return EigenAttnCheckpointConfig(**values)


def _named(layers: list[EigenAttention]) -> dict[str, nn.Parameter]:
    """Maps and quantisers of all layers, by their names in the file."""
    return {
        f"layers.{attention.layer_idx}.{name}": parameter
        for attention in layers
        for name in (*MAPS, *QUANTISERS)
        if (parameter := getattr(attention, name)) is not None
    }
