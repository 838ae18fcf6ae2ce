"""`eigenattn plan`."""

from __future__ import annotations

import re
from typing import Any

import typer
from rich.table import Table

from ..config import DEFAULT_CODED_RATIO, DEFAULT_KV_RATIO, EigenAttentionConfig
from ..errors import EigenAttnError
from ..report.planning import GIB, CapacityPlan, plan_capacity
from .common import LOOK, Json, Model, command, emit, then
from .options import SHARE_DEFAULT, SHARE_HELP, WINDOW_HELP, coded_or_not

UNITS = {"": 1, "k": 2**10, "m": 2**20}


@command(
    "eigenattn plan meta-llama/Llama-3.1-8B --gpu-memory 80 --context 128k",
    "eigenattn plan meta-llama/Llama-3.1-70B --gpu-memory 80 --context 32k --tensor-parallel-size 4 --gpus 8",
    "eigenattn plan meta-llama/Llama-3.1-8B --gpu-memory 24 --context 32k --kv-ratio 0.2 --share 4kv",
    "eigenattn plan llama-60 --gpu-memory 80 --context 128k --json plan.json",
    panel=LOOK,
    gpu_memory="How many GiB of memory each GPU has.",
    context="How many tokens a sequence has, prompt and answer: 32768, or 32k.",
    kv_ratio="The share of its cache's bytes that the model would be compressed to. By default "
    f"{DEFAULT_CODED_RATIO}, and {DEFAULT_KV_RATIO} with --uncoded. Only for an original.",
    coded=coded_or_not(" Only for an original."),
    window=f"{WINDOW_HELP}; 32 by default. Only for an original.",
    share=f"{SHARE_HELP} {SHARE_DEFAULT}. Only for an original.",
    tensor_parallel_size=typer.Option(min=1, help="How many GPUs share the heads of one copy of the model."),
    gpus="How many GPUs there are, on all nodes. Each group of --tensor-parallel-size holds a copy; by default "
    "there is one group.",
    gpu_memory_utilization="The share of a GPU's memory for weights and cache. The rest is for activations and the "
    "engine.",
    dtype="Of weights and cache: float32, bfloat16 or float16. By default as the checkpoint has them.",
)
def plan(
    model: Model,
    gpu_memory: float,
    context: str,
    kv_ratio: float | None = None,
    coded: bool | None = None,
    window: int | None = None,
    share: str | None = None,
    tensor_parallel_size: int = 1,
    gpus: int | None = None,
    gpu_memory_utilization: float = 0.9,
    dtype: str | None = None,
    json_file: Json = None,
) -> None:
    """Say how many sequences fit on GPUs, before and after. Only the configuration is read."""
    options = {"kv_ratio": kv_ratio, "coded": coded, "window": window, "share": share}
    chosen: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    found = plan_capacity(
        model,
        gpu_memory=gpu_memory,
        context=tokens(context),
        config=EigenAttentionConfig(**chosen) if chosen else None,
        dtype=dtype,
        tensor_parallel_size=tensor_parallel_size,
        gpus=gpus,
        gpu_memory_utilization=gpu_memory_utilization,
    )
    console = emit(found, json_file)
    console.print(_table(found))
    if found.hypothetical:
        console.print("This model is not compressed: its right column supposes the same rank everywhere.")
        then(console, "compress", model, "OUT")
    if not found.original.cache or not found.compressed.cache:
        console.print("The weights leave no memory for a cache: raise --tensor-parallel-size, or take larger GPUs.")


def tokens(text: str) -> int:
    """A number of tokens as people write it: 4096, 32k (32,768) or 1m.

    Raises:
        EigenAttnError: if it is written otherwise.
    """
    match = re.fullmatch(r"(\d{1,12}(?:\.\d+)?)([km]?)", text.strip().lower())
    if match is None:
        raise EigenAttnError(f"a context is written 32768 or 32k, not {text!r}.")
    return int(float(match[1]) * UNITS[match[2]])


def _table(found: CapacityPlan) -> Table:
    groups = found.gpus // found.tensor_parallel_size
    table = Table(
        "of one GPU", "original", "compressed", title=f"{found.model}, {found.dtype}, {found.context:,} tokens"
    )
    models = (found.original, found.compressed)
    share = f"{found.gpu_memory_utilization:g} of {found.gpu_memory:g} GiB"
    table.add_row(f"memory to use, {share}", *[_gib(found.budget)] * 2)
    split = f", 1/{found.tensor_parallel_size} of the matrices" if found.tensor_parallel_size > 1 else ""
    table.add_row(f"- weights{split}", *(_gib(each.weights) for each in models))
    table.add_row("= left for the cache", *(_gib(each.cache) for each in models))
    table.add_row("bytes a token", *(f"{each.bytes_per_token:,}" for each in models))
    window = f", {found.window} of its tokens exact" if found.window else ""
    name = f"/ one sequence (compressed{window})" if window else "/ one sequence"
    table.add_row(name, *(_gib(each.sequence) for each in models))
    copies = f" x {groups} copies" if groups > 1 else ""
    table.add_row(f"= sequences{copies}", *(f"{each.sequences:,}" for each in models))
    table.add_row("longest single sequence, tokens", *(f"{each.longest:,}" for each in models))
    return table


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
