"""Timing things against each other: in turns, in one run, and by medians."""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import EigenAttnError
from ..version import versions


def device_of(name: str | None) -> torch.device:
    """The device of this name; a GPU if there is one, by default.

    Raises:
        EigenAttnError: if there is no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EigenAttnError(f"there is no device {name!r} to measure on: {str(error).splitlines()[0]}") from error
    return device


def device_name(device: torch.device) -> str:
    """What people call it: `NVIDIA H100 80GB HBM3`, or `Intel(R) Xeon(R) Processor, 2 threads`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    about = Path("/proc/cpuinfo")
    if about.exists():
        found = re.search(r"model name\s*:\s*(.+)", about.read_text(encoding="utf-8"))
        name = found.group(1) if found else name
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def machine(device: torch.device) -> dict[str, Any]:
    """What a timing depends on."""
    return {"device": device_name(device), "cores": os.cpu_count(), "versions": versions()}


def file_name(result: dict[str, Any], device: torch.device) -> str:
    """`kernel-nvidia-h100-80gb-hbm3.json`, `decode-nvidia-h100-80gb-hbm3-llama-50-b16-s8192-bfloat16.json`."""
    parts = [device_name(device)]
    if result.get("model"):
        parts.append(Path(result["model"]).name)
    if result["kind"] == "decode":
        parts += [f"b{result['batch']}", f"s{result['length']}"]
    if result["kind"] in ("decode", "prefill"):
        parts.append(result["dtype"])
    return f"{result['kind']}-{re.sub(r'[^a-z0-9]+', '-', ' '.join(parts).lower()).strip('-')[:200]}.json"


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds one call takes, by the device's own clock on a GPU."""
    if device.type == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def in_turns(
    functions: dict[str, Callable[[], Any]], device: torch.device, rounds: int, warm_up: int = 3
) -> dict[str, float]:
    """Median seconds of each function. They take turns, so that whatever else slows the machine slows all alike."""
    for function in functions.values():
        for _ in range(warm_up):  # compiles and tunes too
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds(function, device))
    return {name: statistics.median(found) for name, found in times.items()}


def recorded(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """A function as a CUDA graph, so that launching its kernels from Python is not what is timed; itself elsewhere."""
    if device.type != "cuda":
        return function
    for _ in range(3):  # compiles and tunes
        function()
    graph = torch.cuda.CUDAGraph()
    try:
        torch.cuda.synchronize(device)
        with torch.cuda.graph(graph):
            function()
    except RuntimeError:  # something in it cannot be recorded
        torch.cuda.synchronize(device)
        return function
    return graph.replay


def copy_bandwidth(device: torch.device, rounds: int) -> float:
    """Bytes a second, read and written, of copying a tensor far larger than any cache."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    taken = in_turns({"copy": lambda: target.copy_(source)}, device, rounds)["copy"]
    return 2 * source.numel() / taken


def peak_arithmetic(device: torch.device, dtype: torch.dtype, rounds: int) -> float:
    """Operations a second of a large product of matrices, an addition and a multiplication being two."""
    size = 8192 if device.type == "cuda" else 1024
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / in_turns({"product": lambda: matrix @ matrix}, device, rounds)["product"]
