"""What this process takes of its machine."""

from __future__ import annotations

import sys

import torch


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: by the device's allocator on a GPU, by the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024
