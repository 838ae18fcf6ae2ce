"""Bases without the model: with a window the original weights stay, and the bases are all there is to keep."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import EigenAttnError
from .attention import EigenAttention
from .checkpoint_format import METHOD, EigenAttnCheckpointConfig, allocate, mark_compressed
from .conversion import convert_attention, eigen_layers, restore_attention
from .maps import MAPS, QUANTISERS
from .parallel import check_whole
from .placement import stored

CONFIG_FILE = "eigenattn_config.json"
BASES_FILE = "eigenattn.safetensors"
# A thousand layers take some 50 kB.
MOST_CONFIG_BYTES = 4_000_000
FLOATS = ("F64", "F32", "BF16", "F16")
# Of each parameter of each layer's attention (chosen: training changes all of them, and 64 a layer take 256 bytes).
SAMPLES = 16
# How far two roundings of one weight may lie apart, to bfloat16 and to float16, which has small numbers no closer.
APART = {"rtol": 2**-7, "atol": 2**-24}


def save_bases(model: PreTrainedModel, folder: Path) -> None:
    """Write the bases of a model compressed with a window, and what they belong to.

    Raises:
        EigenAttnError: if the bases are folded into the weights (`window=0`).
    """
    config: EigenAttnCheckpointConfig = model.config.quantization_config
    if not config.method["window"]:
        raise EigenAttnError("without a window the bases are folded into the weights: save the whole model.")
    tensors = {name: each.detach().cpu().contiguous() for name, each in _named(eigen_layers(model)).items()}
    save_file(tensors, folder / BASES_FILE, metadata={"format": "pt"})
    content = {**config.to_dict(), "base_model_weights": fingerprint_of(eigen_layers(model))}
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_bases_config(folder: str) -> EigenAttnCheckpointConfig | None:
    """What a folder of bases says of itself; None if the folder is something else."""
    path = Path(folder) / CONFIG_FILE
    return _read_config(path)[0] if path.is_file() else None


def attach(model: PreTrainedModel, bases: str | Path) -> PreTrainedModel:
    """Put bases on the model they were made for, in place; it then caches latents.

    Some of its weights are compared with what the bases say of them; it may have another dtype. Bases that say nothing,
    as older versions wrote them, are taken with a warning.

    Args:
        model: the base model, as `AutoModelForCausalLM.from_pretrained` gives it.
        bases: a folder that `eigenattn compress --bases-only` wrote, or a hub id.

    Returns:
        The model.

    Raises:
        EigenAttnError: if there are no bases, or they do not fit. The model is then as it was.
    """
    config, fingerprint = read_config(bases)
    check_whole(model)
    originals = convert_attention(model)
    try:
        layers = eigen_layers(model)
        allocate(layers, config)
        check_base(bases, config, fingerprint, fingerprint_of(layers))
        read_tensors(bases, _named(layers))
    except BaseException:
        restore_attention(model, originals)
        raise
    mark_compressed(model, config)
    return model


def read_config(bases: str | Path) -> tuple[EigenAttnCheckpointConfig, Any]:
    """What bases say of themselves, and the fingerprint of their base model; None if there is none.

    Raises:
        EigenAttnError: if there are no bases, or they are malformed.
    """
    return _read_config(_file(bases, CONFIG_FILE))


def read_tensors(bases: str | Path, wanted: Mapping[str, Tensor]) -> None:
    """Read bases into tensors by their names, `layers.INDEX.MAP`; see `read_into`."""
    read_into(wanted, _file(bases, BASES_FILE), "bases")


def check_base(bases: str | Path, config: EigenAttnCheckpointConfig, fingerprint: Any, own: str) -> None:
    """Refuse bases that were made for another model.

    Args:
        fingerprint: what bases say of their model's weights; None, as older versions wrote, is taken with a warning.
        own: the fingerprint of the model that they are to be put on.

    Raises:
        EigenAttnError: if they differ.
    """
    if fingerprint is None:
        warnings.warn(f"{bases} does not tell its base model from others: see that it is this one.", stacklevel=3)
    elif not alike(fingerprint, own):
        base, revision = (config.provenance.get(f"base_model{end}") for end in ("", "_revision"))
        at = f" at revision {revision!r:.60}" if revision else ""
        raise EigenAttnError(
            f"the bases in {bases} were made for another model, whose weights differ: load {base!r:.200}{at}, or "
            "compress this one."
        )


def _file(bases: str | Path, name: str) -> Path:
    if Path(bases).is_dir():
        path = Path(bases) / name
        if not path.is_file():
            raise EigenAttnError(f"{bases} has no {name}: give a folder that `compress --bases-only` wrote.")
        return path
    try:
        return Path(hf_hub_download(str(bases), name))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise EigenAttnError(f"{bases!r} is neither a folder of bases nor a hub id that can be reached.") from error


def fingerprint_of(layers: Sequence[EigenAttention]) -> str:
    """Weights of the original's, evenly spaced in each parameter, in bfloat16 as hexadecimal digits."""
    found = []
    for attention in layers:
        for name in original_names(attention):
            module, _, own_name = name.rpartition(".")
            found.append(sampled(cast(Tensor, stored(attention.get_submodule(module), own_name))))
    return fingerprint_from(found)


def original_names(attention: EigenAttention) -> list[str]:
    """The names of a layer's parameters that are the original's, in the order of a fingerprint."""
    return sorted({name for name, _ in attention.named_parameters()} - {*MAPS, *QUANTISERS})


def sampled(weight: Tensor) -> Tensor:
    """What a fingerprint holds of one parameter."""
    weight = weight.detach().flatten()
    places = [n * (len(weight) - 1) // (SAMPLES - 1) for n in range(SAMPLES)]
    return weight[places].to("cpu", torch.bfloat16)


def fingerprint_from(samples: Sequence[Tensor]) -> str:
    """The fingerprint of what was `sampled` of all parameters."""
    return torch.cat(list(samples)).view(torch.uint8).numpy().tobytes().hex()


def alike(recorded: Any, own: str) -> bool:
    """Whether two fingerprints are of one model, be it in different dtypes."""
    try:
        values = [torch.tensor(list(bytes.fromhex(each)), dtype=torch.uint8) for each in (recorded, own)]
    except (TypeError, ValueError):  # it comes from a file
        return False
    if len(values[0]) != len(values[1]):
        return False
    one, other = (each.view(torch.bfloat16).float() for each in values)
    return bool(torch.isclose(one, other, **APART).all())


def _read_config(path: Path) -> tuple[EigenAttnCheckpointConfig, Any]:
    """The configuration of bases, and the fingerprint of their base model; None if there is none."""
    values = read_object(path, "configuration of bases")
    if values.get("quant_method") != METHOD:
        raise EigenAttnError(f"{path} is not a configuration of bases.")
    config = EigenAttnCheckpointConfig(**values)
    if not config.method["window"]:
        raise EigenAttnError(f"{path} is of a model without a window, whose bases are folded into its weights.")
    return config, values.get("base_model_weights")


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a small file.

    Args:
        what: it should be.

    Raises:
        EigenAttnError: if it is something else.
    """
    if path.stat().st_size > MOST_CONFIG_BYTES:
        raise EigenAttnError(f"{path} is larger than any {what}: {path.stat().st_size:,} bytes.")
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or too deep
        raise EigenAttnError(f"{path} is not a {what}.") from error
    if not isinstance(values, dict):
        raise EigenAttnError(f"{path} is not a {what}.")
    return values


def _named(layers: list[EigenAttention]) -> dict[str, nn.Parameter]:
    """Maps and quantisers of all layers, by their names in the file."""
    return {
        f"layers.{attention.layer_idx}.{name}": parameter
        for attention in layers
        for name in (*MAPS, *QUANTISERS)
        if (parameter := getattr(attention, name)) is not None
    }


def read_into(wanted: Mapping[str, Tensor], path: Path, what: str) -> None:
    """Read tensors by their names; shapes are compared before one is read.

    Args:
        what: they are.

    Raises:
        EigenAttnError: if the file is damaged, or holds other names, shapes or kinds of numbers.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            missing, extra = sorted({*wanted} - names), sorted(names - {*wanted})
            if missing:
                raise EigenAttnError(f"{path} lacks {missing[0]}: is it truncated?")
            if extra:
                raise EigenAttnError(f"{path} holds {extra[0]!r}, which is none of these {what}.")
            for where, parameter in wanted.items():
                stored = file.get_slice(where)
                shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
                if shape != tuple(parameter.shape):
                    raise EigenAttnError(
                        f"{where} has shape {shape} in {path}, and this model asks for {tuple(parameter.shape)}: "
                        f"were the {what} made for another model?"
                    )
                if dtype not in FLOATS:
                    raise EigenAttnError(f"{where} is of {dtype} in {path}, not of {', '.join(FLOATS)}.")
                with torch.no_grad():
                    parameter.copy_(file.get_tensor(where))
                if not parameter.isfinite().all():
                    raise EigenAttnError(f"{where} in {path} holds NaN or infinite numbers in {parameter.dtype}.")
    except (SafetensorError, OSError) as error:
        raise EigenAttnError(f"{path} could not be read: {error}") from error
