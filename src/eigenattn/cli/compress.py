"""`eigenattn compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..calibration.text import DEFAULT_SOURCE
from ..workflows.compress import compress_checkpoint
from .common import Json, Model, app, at_lengths, emit, examples, memory_limits
from .options import CalibrationOptions, CompressionOptions, LoadingOptions, MemoryOptions, grouped


@app.command(
    epilog=examples(
        "eigenattn compress smollm2 smollm2-4-bits",
        "eigenattn compress meta-llama/Llama-3.1-8B llama-2-bits --kv-ratio 0.14 --dtype bfloat16",
        "eigenattn compress smollm2 smollm2-shared --kv-ratio 0.14 --share 3kv",
        "eigenattn compress smollm2 smollm2-60 --uncoded --kv-ratio 0.6 --text wikitext2",
        "eigenattn compress ./my-model ./my-model-small --text prompts.jsonl --text self --length 4096",
        "eigenattn compress meta-llama/Llama-3.1-70B llama-60 --device-map auto --max-memory 0=70GiB,cpu=100GiB",
        "eigenattn compress smollm2 papers-way --basis eigen --ranks error_budget --window 0",
    )
)
@grouped
def compress(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    *,
    compression: CompressionOptions,
    calibration: CalibrationOptions,
    bases_only: Annotated[
        bool,
        typer.Option(
            "--bases-only",
            help="Write the bases alone, to be attached to the original model. Needs a window: without one they are "
            "folded into the weights.",
        ),
    ] = False,
    loading: LoadingOptions,
    memory: MemoryOptions,
    json_file: Json = None,
) -> None:
    """Compress a model's KV cache and write the checkpoint; killed, it goes on with the same command."""
    config, text = compression.config(), calibration.windows()
    if config.coded and text.one_kind:
        Console(stderr=True).print(
            f"Calibrated on {text.sources[0]} alone, codes lose more on text of other kinds; `--text {DEFAULT_SOURCE}` "
            "has many.",
            highlight=False,
            soft_wrap=True,
        )
    report = compress_checkpoint(
        model,
        out,
        config,
        text,
        dtype=loading.dtype,
        device=loading.device,
        max_memory=memory_limits(memory.max_memory),
        offload_folder=memory.offload_folder,
        bases_only=bases_only,
        progress=True,
    )
    console = emit(report.to_dict(), json_file)
    console.print(
        f"{out}: {report.bytes_per_token:,} cache bytes a token instead of {report.baseline_bytes_per_token:,} "
        f"(KV ratio {report.kv_ratio:.3f}), in {sum(report.seconds.values()):.0f} s.\n{at_lengths(report)}",
        highlight=False,
        soft_wrap=True,
    )
