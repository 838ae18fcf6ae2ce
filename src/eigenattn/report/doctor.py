"""What a machine has of what this package can use: versions, kernels, memory, devices, optional packages."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec

import torch

from ..kernels.native_library import COMPILER, unavailable
from ..kernels.selection import HAS_TRITON, VARIABLE, decoding_step_reason
from ..version import versions

GIB = 2**30
# Below this much free memory a model of some billions of weights does not load.
LITTLE = 4 * GIB
# What each extra brings, by a module of it, and what for.
EXTRAS = {
    "plot": ("matplotlib", "pictures of sweeps, spectra and reports"),
    "eval": ("lm_eval", "zero-shot tasks"),
    "data": ("datasets", "text from the hub: wikitext2, c4, alpaca"),
    "finetune": ("peft", "LoRA, for checkpoints without a window"),
    "rivals": ("hqq", "quantised caches of other packages, to compare with"),
    "demo": ("gguf", ".gguf files"),
    "triton": ("triton", "the fused kernel on GPUs"),
    "vllm": ("vllm", "serving, in an environment of its own"),
}


@dataclass(frozen=True)
class Finding:
    """One fact about a machine, and what to do if something is missing.

    Args:
        subject: what it is about.
        found: what is there.
        advice: what to install or to set; empty if all is well.
    """

    subject: str
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Look at this machine. Compiles the native decoding step if that has not been done."""
    known = versions()
    found = [
        Finding("versions", ", ".join(f"{name} {version}" for name, version in known.items())),
        _loading(),
        _cpu_step(),
        *_gpus(),
        _memory(),
        Finding("threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"),
    ]
    return found + [_extra(name, module, purpose) for name, (module, purpose) in EXTRAS.items()]


def _loading() -> Finding:
    if any(each.name == "eigenattn" for each in entry_points(group="torch.backends")):
        return Finding("loading checkpoints", "transformers loads them by itself")
    return Finding("loading checkpoints", "after `import eigenattn`", "import eigenattn before from_pretrained")


def _cpu_step() -> Finding:
    step = decoding_step_reason()
    advice = ""
    if unavailable() is not None and not step.startswith(("torch,", "triton,")):
        advice = f"install g++, or name a C++ compiler in {COMPILER}: decoding gets faster"
    return Finding("decoding on the CPU", step, advice)


def _gpus() -> list[Finding]:
    if not torch.cuda.is_available():
        return [Finding("GPU", "none that torch can use")]
    step = "triton in half precision, torch in float32" if HAS_TRITON else "torch: there is no Triton"
    advice = "" if HAS_TRITON else "pip install 'eigenattn[triton]'"
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        found.append(Finding(f"GPU {index}", f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"))
    return [*found, Finding("decoding on the GPU", f"{step}; {VARIABLE} chooses", advice)]


def _memory() -> Finding:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = (page * os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # Windows, and macOS for what is free
        return Finding("memory", "not known")
    advice = "" if free > LITTLE else "what does not fit goes on disk: --device-map auto --offload-folder FOLDER"
    return Finding("memory", f"{free / GIB:.1f} of {total / GIB:.1f} GiB unused", advice)


def _extra(name: str, module: str, purpose: str) -> Finding:
    if find_spec(module) is not None:
        return Finding(f"extra {name}", f"there: {purpose}")
    return Finding(f"extra {name}", f"absent: {purpose}", f"pip install 'eigenattn[{name}]'")
