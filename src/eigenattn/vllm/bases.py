"""The bases that a model is served with: a folder beside a stock checkpoint, or part of a compressed one."""

from __future__ import annotations

import itertools
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import EigenAttnError
from ..models.attention import EigenAttention, ReadingAttention
from ..models.bases_file import check_base, read_config, read_tensors
from ..models.checkpoint_format import EigenAttnCheckpointConfig, allocate
from ..models.conversion import METHOD, convert_attention
from ..models.fingerprint import fingerprint_from, original_names, sampled
from ..models.loading import empty_model
from ..models.maps import MAPS, QUANTISERS

# Names the folder of bases, or their hub id, to `--additional-config`, or from outside.
OPTION = "eigenattn"
VARIABLE = "EIGENATTN_BASES"
# Their angles depend on the length of a text, which differs from row to row of a batch.
VARYING_ROPE = ("dynamic", "longrope")
# The layer, and the name within it, of a tensor in a checkpoint.
PLACE = re.compile(r"(?:^|\.)(\d+)\.(.+)$")


@dataclass(frozen=True)
class Bases:
    """Bases and where they are.

    Args:
        config: what they say of themselves.
        folder: where they lie, or a hub id; None where they are in the checkpoint itself.
    """

    config: EigenAttnCheckpointConfig
    folder: str | None = None

    @classmethod
    def of(cls, model_config: Any, options: Mapping[str, Any]) -> Bases | None:
        """Those that a model is to be served with; None if it is to be served as it is.

        Args:
            model_config: the model's configuration, as transformers has it.
            options: the engine's `--additional-config`.

        Raises:
            EigenAttnError: if they are malformed, or there are two.
        """
        own, folder = own_bases(model_config), _named(options)
        if own and folder:
            raise EigenAttnError(f"this checkpoint is compressed already: leave out the bases in {folder}.")
        if own:
            return cls(own)
        return cls(read_config(folder), folder) if folder else None


def _named(options: Mapping[str, Any]) -> str | None:
    return options.get(OPTION) or os.environ.get(VARIABLE)


def asked_for(model_config: Any, options: Mapping[str, Any]) -> bool:
    """Whether a model is to be served with any, as `Bases.of` has it."""
    return bool(_named(options)) or own_bases(model_config) is not None


def own_bases(model_config: Any) -> EigenAttnCheckpointConfig | None:
    """What a compressed checkpoint says of its bases; None for any other.

    Args:
        model_config: the model's configuration, as transformers has it.
    """
    found: Any = getattr(model_config, "quantization_config", None)
    values: dict[str, Any] = found.to_dict() if hasattr(found, "to_dict") else found or {}
    return EigenAttnCheckpointConfig(**values) if values.get("quant_method") == METHOD else None


@dataclass(frozen=True)
class Blueprint:
    """A model's attention as transformers would have it, without memory.

    Args:
        layers: by name and in order.
        beside: names of modules that stand beside those which hold the layers, as those that see do.
    """

    layers: dict[str, EigenAttention]
    beside: frozenset[str]


def blueprint(config: Any, checkpoint: EigenAttnCheckpointConfig) -> Blueprint:
    """What bases are put on.

    Args:
        config: the model's configuration, as transformers has it.

    Raises:
        EigenAttnError: if bases do not fit the model, or it is not served.
    """
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    for each in (rope, *(found for found in rope.values() if isinstance(found, dict))):  # of each type of layer
        if (kind := each.get("rope_type")) in VARYING_ROPE:
            raise EigenAttnError(f"rotary positions of type {kind} are not served by vLLM once compressed.")
    model = empty_model(config)
    convert_attention(model)
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, EigenAttention)}
    found = dict(sorted(found.items(), key=lambda each: each[1].layer_idx))
    layers = list(found.values())
    if any(isinstance(module, ReadingAttention) for module in model.modules()):
        raise EigenAttnError("layers that attend over what others cache are not served by vLLM once compressed.")
    if any(layer.normalises_rotated for layer in layers):
        raise EigenAttnError("norms behind rotation are not served by vLLM once compressed.")
    if any(layer.layout.tied for layer in layers):
        raise EigenAttnError("multi-head latent attention is not served by vLLM once compressed.")
    allocate(layers, checkpoint)
    on_the_way = list(itertools.takewhile(lambda name: not name.isdecimal(), next(iter(found)).split(".")))
    holders = [model.get_submodule(".".join(on_the_way[:depth])) for depth in range(len(on_the_way))]
    children = {name for holder in holders for name, _ in holder.named_children()}
    return Blueprint(found, frozenset(children.difference(on_the_way)))


class Loading:
    """Loads bases while a checkpoint's tensors go by.

    Args:
        original: the model's attention.
        take: is given a layer's index, the name of a map, and the map of all heads.
    """

    def __init__(self, bases: Bases, original: Blueprint, take: Callable[[int, str, Tensor], None]) -> None:
        self._bases, self._take, self._beside = bases, take, original.beside
        self._layers = {layer.layer_idx: layer for layer in original.layers.values()}
        # Where in a layer its attention is; the same in all of them.
        place = PLACE.search(next(iter(original.layers)))
        self._inside = place[2] if place else ""
        self._samples: dict[tuple[int, str], Tensor] = {}
        self._missing = {(index, name) for index, layer in self._layers.items() for name, _ in layer.named_parameters()}

    def passing(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The tensors that are the model's own."""
        for name, tensor in weights:
            place = None if self._beside.intersection(name.split(".")) else PLACE.search(name)
            inner = place[2].removeprefix(f"{self._inside}.") if place else ""
            if place is None or (key := (int(place[1]), inner)) not in self._missing:
                yield name, tensor
                continue
            self._missing.remove(key)
            if inner in (*MAPS, *QUANTISERS):
                self._take(*key, tensor)
            else:
                if self._bases.folder and tensor.dtype.itemsize > 1:
                    self._samples[key] = sampled(tensor)
                yield name, tensor

    def finish(self) -> None:
        """Read the bases if they lie in a folder.

        Raises:
            EigenAttnError: if they belong to another model, or something is missing.
        """
        folder = self._bases.folder
        maps = {key for key in self._missing if key[1] in (*MAPS, *QUANTISERS)}
        if folder is None:
            if self._missing:
                index, name = min(self._missing)
                raise EigenAttnError(f"the checkpoint lacks {name} of layer {index}: is it truncated?")
            return
        names = [(index, name) for index, layer in self._layers.items() for name in original_names(layer)]
        if self._samples.keys() >= set(names):
            own = fingerprint_from([self._samples[key] for key in names])
            check_base(folder, self._bases.config, own, quantised=False)
        else:
            warnings.warn(f"weights are quantised: see that the bases in {folder} were made for them.", stacklevel=2)
        wanted = {
            f"layers.{index}.{name}": torch.empty(getattr(self._layers[index], name).shape, device="cpu")
            for index, name in maps
        }
        read_tensors(folder, wanted)
        for index, name in maps:
            self._take(index, name, wanted[f"layers.{index}.{name}"])
