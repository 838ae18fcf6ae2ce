"""What fits: the largest batch and the longest context before a GPU runs out of memory."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from ..calibration.checks import check_length, most_positions
from ..errors import EigenAttnError
from ..models.cache_names import CACHE
from ..models.placement import input_device
from .prefill import read
from .shapes import Contest
from .timing import device_of, machine

# Tokens read at a time (chosen): what a pass needs beside the cache stays small.
CHUNK = 512


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` that fits, to within a thirty-second part; 0 if 1 does not."""
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    if high > limit:
        if fits(limit):
            return limit
        high = limit
    while high - low > max(low // 32, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@torch.no_grad()
def fill(model: PreTrainedModel, batch: int, length: int) -> None:
    """Read `length` tokens a row piece by piece, and decode one more, with a dynamic cache."""
    ids = torch.full((batch, length), 3, device=input_device(model))
    cache = read(model, ids, CHUNK)
    model(ids[:, :1], use_cache=True, logits_to_keep=1, **{CACHE: cache})


def _fits(model: PreTrainedModel, batch: int, length: int) -> bool:
    try:
        fill(model, batch, length)
        torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return True


def benchmark_memory(
    contest: Contest,
    *,
    length: int,
    longest: int,
) -> dict[str, Any]:
    """Search for the largest batch at a context, and for the longest context of one row.

    Args:
        contest: what is compared.
        length: the context of the batch.
        longest: contexts beyond it are not tried.

    Raises:
        EigenAttnError: without a GPU, or on a model that cannot be loaded.
    """
    where = device_of(contest.device)
    if where.type != "cuda":
        raise EigenAttnError(
            "memory is measured on a GPU: a CPU does not run out of memory at a line that can be tested. "
            "`eigenattn inspect` plans the bytes of a cache anywhere."
        )
    rows = []
    for each, load in dataclasses.replace(contest, device=str(where)).loaders().items():
        model = load()
        check_length(model.config, length + 1)
        most = min(longest, (most_positions(model.config) or longest + 1) - 1)  # one more is decoded
        rows.append(
            {
                "model": each,
                "batch": largest(lambda batch, model=model: _fits(model, batch, length), 65536),
                "context": largest(lambda tokens, model=model: _fits(model, 1, tokens), most),
            }
        )
        del model
        gc.collect()
        torch.cuda.empty_cache()
    memory = torch.cuda.get_device_properties(where).total_memory
    return {
        "kind": "memory",
        **machine(where),
        "model": contest.name,
        "memory": memory,
        "length": length,
        "longest": longest,
        "rows": rows,
    }
