"""`eigenattn plan`."""

from __future__ import annotations

import re
from typing import Annotated

import typer
from rich.table import Table

from ..config import EigenAttentionConfig
from ..errors import EigenAttnError
from ..report.planning import GIB, CapacityPlan, plan_capacity
from .common import Dtype, Json, Model, app, emit, examples

UNITS = {"": 1, "k": 2**10, "m": 2**20}


@app.command(
    epilog=examples(
        "eigenattn plan meta-llama/Llama-3.1-8B --gpu-memory 80 --context 128k",
        "eigenattn plan meta-llama/Llama-3.1-70B --gpu-memory 80 --context 32k --tensor-parallel-size 4 --gpus 8",
        "eigenattn plan meta-llama/Llama-3.1-8B --gpu-memory 24 --context 32k --bits-per-element 3",
        "eigenattn plan llama-60 --gpu-memory 80 --context 128k --json plan.json",
    )
)
def plan(
    model: Model,
    gpu_memory: Annotated[float, typer.Option(help="GiB of each GPU.")],
    context: Annotated[str, typer.Option(help="Tokens of a sequence, prompt and answer: 32768, or 32k.")],
    kv_ratio: Annotated[
        float | None, typer.Option(help="Of an original: the KV ratio it would be compressed to. 0.6 by default.")
    ] = None,
    bits_per_element: Annotated[
        float | None, typer.Option(help="Instead of a ratio: bits of quantised latents an element.")
    ] = None,
    window: Annotated[int | None, typer.Option(help="Of an original: tokens kept exactly. 32 by default.")] = None,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="GPUs that share one copy of the model.")] = 1,
    gpus: Annotated[
        int | None, typer.Option(help="All GPUs, on all nodes; groups of them hold a copy each. One copy by default.")
    ] = None,
    gpu_memory_utilization: Annotated[
        float,
        typer.Option(help="Share of a GPU's memory for weights and cache; the rest is for activations and the engine."),
    ] = 0.9,
    dtype: Dtype = None,
    json_file: Json = None,
) -> None:
    """Say how many sequences fit on GPUs, before and after. Only the configuration is read."""
    supposed = None
    if (kv_ratio, bits_per_element, window) != (None, None, None):
        given = {} if window is None else {"window": window}
        supposed = EigenAttentionConfig(kv_ratio=kv_ratio, bits_per_element=bits_per_element, **given)
    found = plan_capacity(
        model,
        gpu_memory=gpu_memory,
        context=tokens(context),
        config=supposed,
        dtype=dtype,
        tensor_parallel_size=tensor_parallel_size,
        gpus=gpus,
        gpu_memory_utilization=gpu_memory_utilization,
    )
    console = emit(found.to_dict(), json_file)
    console.print(_table(found))
    if found.hypothetical:
        console.print("This model is not compressed: its right column supposes the same rank everywhere.")
    if not found.original.cache or not found.compressed.cache:
        console.print("The weights leave no memory for a cache: raise --tensor-parallel-size, or take larger GPUs.")


def tokens(text: str) -> int:
    """A number of tokens as people write it: 4096, 32k (32,768) or 1m.

    Raises:
        EigenAttnError: if it is written otherwise.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([km]?)", text.strip().lower())
    if match is None:
        raise EigenAttnError(f"a context is written 32768 or 32k, not {text!r}.")
    return int(float(match[1]) * UNITS[match[2]])


def _table(found: CapacityPlan) -> Table:
    groups = found.gpus // found.tensor_parallel_size
    table = Table(
        "of one GPU", "original", "compressed", title=f"{found.model}, {found.dtype}, {found.context:,} tokens"
    )
    sides = (found.original, found.compressed)

    def row(name: str, values: list[str]) -> None:
        table.add_row(name, *values)

    share = f"{found.gpu_memory_utilization:g} of {found.gpu_memory:g} GiB"
    row(f"memory to use, {share}", [_gib(found.budget)] * 2)
    split = f", 1/{found.tensor_parallel_size} of the matrices" if found.tensor_parallel_size > 1 else ""
    row(f"- weights{split}", [_gib(side.weights) for side in sides])
    row("= left for the cache", [_gib(side.cache) for side in sides])
    row("bytes a token", [f"{side.bytes_per_token:,}" for side in sides])
    window = f", {found.window} of its tokens exact" if found.window else ""
    row(f"/ one sequence (compressed{window})" if window else "/ one sequence", [_gib(side.sequence) for side in sides])
    copies = f" x {groups} copies" if groups > 1 else ""
    row(f"= sequences{copies}", [f"{side.sequences:,}" for side in sides])
    row("longest single sequence, tokens", [f"{side.longest:,}" for side in sides])
    return table


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
