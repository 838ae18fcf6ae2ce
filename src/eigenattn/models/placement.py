"""Where a model's weights are: on one device, spread over several, or offloaded to CPU memory and disk by accelerate.

accelerate loads what is offloaded when a module runs and drops it afterwards; between, its parameters lie on the meta
device. What reads or replaces weights outside of a forward pass does it inside `loaded`.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import EigenAttnError

# Of the files that weights on disk are gathered into, for one is in memory at a time (chosen: about a large weight).
SHARD = "2GB"


def hook_of(module: nn.Module) -> AlignDevicesHook | None:
    """accelerate's hook that places a module, if it has one."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    return next((each for each in hooks if isinstance(each, AlignDevicesHook)), None)


def offloaded(module: nn.Module) -> AlignDevicesHook | None:
    """The hook that loads and drops a module's own weights; None where they stay."""
    hook = hook_of(module)
    return hook if hook is not None and hook.offload else None


def execution_device(module: nn.Module) -> torch.device:
    """The device that a module computes on."""
    hook = offloaded(module)
    if hook is not None and hook.execution_device is not None:
        return torch.device(hook.execution_device)
    return next(chain(module.parameters(), module.buffers())).device  # codes may be either


def input_device(model: PreTrainedModel) -> torch.device:
    """The device that a model's token ids belong on."""
    return execution_device(model.get_input_embeddings())


def is_spread(model: nn.Module) -> bool:
    """Whether some weights of a model are offloaded."""
    return any(offloaded(module) for module in model.modules())


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """Have all weights of a module on its device, submodules included, however often it runs meanwhile.

    What has replaced an offloaded submodule by the end is offloaded in its place.
    """
    before = [(name, each, hook) for name, each in module.named_modules() if (hook := offloaded(each))]
    with ExitStack() as stack:
        for name, each, hook in before:
            hook.pre_forward(each)
            hook.offload = False  # or the next forward pass would drop them
            stack.callback(_put_back, module, name, each, hook)
        yield


def _put_back(module: nn.Module, name: str, old: nn.Module, hook: AlignDevicesHook) -> None:
    hook.offload = True
    hook.post_forward(old, None)
    new = module.get_submodule(name)
    if new is not old:
        for tensor_name, tensor in new.named_parameters(recurse=False):
            _store(hook.weights_map, tensor_name, tensor.detach())
        add_hook_to_module(
            new,
            AlignDevicesHook(
                execution_device=hook.execution_device,
                offload=True,
                io_same_device=hook.io_same_device,
                weights_map=hook.weights_map,
                offload_buffers=hook.offload_buffers,
                skip_keys=hook.skip_keys,
            ),
        )


def stored(module: nn.Module, name: str) -> Tensor | None:
    """A module's own parameter, from where it is offloaded to; None if it is not there."""
    hook = offloaded(module)
    if hook is None or hook.weights_map is None:
        return getattr(module, name)
    try:
        return hook.weights_map[name]
    except KeyError:
        return None


def place_like(new: nn.Module, old: nn.Module) -> nn.Module:
    """Have a module that takes another's place run on its device; its own weights stay there."""
    hook = hook_of(old)
    if hook is None:
        return new
    arguments = {"execution_device": hook.execution_device, "skip_keys": hook.skip_keys}
    return add_hook_to_module(new, AlignDevicesHook(**arguments, io_same_device=hook.io_same_device))


def _store(weights: Any, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of an offloaded one: in memory if that was there, on disk if it was there."""
    if isinstance(weights, PrefixedDataset):
        _store(weights.dataset, f"{weights.prefix}{name}", tensor)
    elif isinstance(weights, OffloadedWeightsLoader):
        # A bias that was not there before goes where the weight is.
        beside = f"{name.rpartition('.')[0]}.weight"
        in_memory = cast(dict[str, Tensor], weights.state_dict)
        if name in in_memory or beside in in_memory:
            in_memory[name] = tensor.cpu()
        else:
            path = _folder_of(weights) / f"{name}.safetensors"
            # Beside and renamed: the file that is replaced may be mapped into memory.
            new = path.with_suffix(".new")
            save_file({name: tensor.contiguous()}, new)
            new.replace(path)
            dtype = str(tensor.dtype).removeprefix("torch.")
            cast(Any, weights.index)[name] = {"safetensors_file": str(path), "weight_name": name, "dtype": dtype}
        if name not in weights.all_keys:
            weights.all_keys.append(name)
    elif isinstance(weights, MutableMapping):
        weights[name] = tensor.cpu()
    else:
        raise EigenAttnError(f"{name} is offloaded in a way that cannot be written to ({type(weights).__name__}).")


def _folder_of(weights: OffloadedWeightsLoader) -> Path:
    """The folder that offloaded weights are written to: the user's, or one that goes when the model goes.

    transformers needs none where a model is read from safetensors, which are themselves what is loaded from.
    """
    if weights.save_folder is None:
        weights.save_folder = tempfile.mkdtemp(prefix="eigenattn-offload-")
        weakref.finalize(weights, shutil.rmtree, weights.save_folder, True)
    return Path(weights.save_folder)


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """`save_pretrained`, which reads what is offloaded again, a file's worth at a time."""
    if not is_spread(model):
        model.save_pretrained(folder)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules", UserWarning)
        model.save_pretrained(folder, max_shard_size=SHARD)
