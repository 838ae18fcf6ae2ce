"""Reading a prompt: seconds, and the bytes it takes beside the model."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..cache.size import allocated_bytes
from ..models.cache_names import CACHE
from ..models.placement import input_device
from .shapes import Contest
from .timing import in_turns, machine


@torch.no_grad()
def read(model: PreTrainedModel, ids: Tensor, chunk: int) -> DynamicCache:
    """Read a prompt [B, T], `chunk` tokens a pass, into a dynamic cache."""
    cache = DynamicCache(config=model.config)
    for piece in ids.split(chunk, dim=1):
        model(piece, use_cache=True, logits_to_keep=1, **{CACHE: cache})
    return cache


def _peak(model: PreTrainedModel, ids: Tensor, chunk: int) -> int | None:
    """Bytes that reading allocates at most beyond the cache it leaves, on a GPU."""
    if not ids.is_cuda:
        return None
    torch.cuda.synchronize(ids.device)
    torch.cuda.reset_peak_memory_stats(ids.device)
    before = torch.cuda.memory_allocated(ids.device)
    cache = read(model, ids, chunk)
    return torch.cuda.max_memory_allocated(ids.device) - before - allocated_bytes(cache)


def benchmark_prefill(
    contest: Contest,
    *,
    batch: int,
    lengths: tuple[int, ...],
    chunk: int | None = None,
    rounds: int,
) -> dict[str, Any]:
    """Read random prompts with a model and a baseline in turns.

    Args:
        contest: what is compared.
        lengths: of the prompts.
        chunk: tokens a pass; by default the whole prompt.
        rounds: timings of each, of which the median counts.

    Returns:
        The machine, and for each length the tokens a second of both, their ratio, and on a GPU the bytes at the peak
        beyond the cache.

    Raises:
        EigenAttnError: on a model that cannot be loaded.
    """
    name, against = contest.name, contest.baseline
    models = contest.models(max(lengths))
    where = input_device(models[name])
    size = min(model.config.get_text_config().vocab_size for model in models.values())
    generator, rows = torch.Generator().manual_seed(0), []
    for length in lengths:
        ids = torch.randint(3, size, (batch, length), generator=generator).to(where)
        step = chunk or length
        try:
            taken = in_turns(
                {each: partial(read, model, ids, step) for each, model in models.items()},
                where,
                rounds,
                warm_up=1,
            )
            peaks = {each: _peak(model, ids, step) for each, model in models.items()}
        except torch.OutOfMemoryError:
            break  # longer ones will not fit either
        rows.append(
            {
                "length": length,
                **contest.speeds(batch * length, taken),
                "peak_bytes": peaks[name],
                "baseline_peak_bytes": peaks[against],
            }
        )
    return {
        "kind": "prefill",
        **machine(where),
        **contest.facts(models[name]),
        "batch": batch,
        "lengths": list(lengths),
        "chunk": chunk,
        "rounds": rounds,
        "rows": rows,
    }
