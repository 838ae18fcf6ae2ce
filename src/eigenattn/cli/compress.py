"""`eigenattn calibrate` and `eigenattn compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..calibration.statistics_file import open_statistics
from ..calibration.text import DEFAULT_SOURCE
from ..errors import EigenAttnError
from ..workflows.calibrate import calibrate_checkpoint, of_one_kind
from ..workflows.compress import compress_checkpoint
from .common import Json, Model, app, at_lengths, emit, examples, memory_limits
from .options import (
    SHARE_HELP,
    WINDOW_HELP,
    CalibrationOptions,
    CompressionOptions,
    LoadingOptions,
    MemoryOptions,
    grouped,
)


@app.command(
    epilog=examples(
        "eigenattn calibrate smollm2 prose --text speeches.txt",
        "eigenattn calibrate smollm2 code --text code.jsonl --samples 64 --length 4096",
        "eigenattn compress smollm2 smollm2-4-bits --statistics prose --statistics code",
    )
)
@grouped
def calibrate(
    model: Model,
    statistics: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    *,
    calibration: CalibrationOptions,
    window: Annotated[int, typer.Option(min=0, help=f"{WINDOW_HELP}; 0 for none.")] = 32,
    share: Annotated[str, typer.Option(help=SHARE_HELP)] = "1",
    loading: LoadingOptions,
    memory: MemoryOptions,
    json_file: Json = None,
) -> None:
    """Collect statistics that `compress --statistics` adds up, for caches of any size; killed, it goes on."""
    found = calibrate_checkpoint(
        model,
        statistics,
        calibration.windows(),
        window=window,
        share=share,
        dtype=loading.dtype,
        device=loading.device,
        max_memory=memory_limits(memory.max_memory),
        offload_folder=memory.offload_folder,
        progress=True,
    )
    sources = ", ".join(each["source"] for each in found["text"])
    emit(found, json_file).print(
        f"{statistics}: statistics of {found['tokens']:,} tokens of {sources}.", highlight=False, soft_wrap=True
    )


@app.command(
    epilog=examples(
        "eigenattn compress smollm2 smollm2-4-bits",
        "eigenattn compress meta-llama/Llama-3.1-8B llama-2-bits --kv-ratio 0.14 --dtype bfloat16",
        "eigenattn compress smollm2 smollm2-shared --kv-ratio 0.14 --share 3kv",
        "eigenattn compress smollm2 smollm2-3-bits --kv-ratio 0.1875 --statistics prose --statistics code",
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
    statistics: Annotated[
        list[Path],
        typer.Option(
            help="In place of texts: a folder that `eigenattn calibrate` wrote. May be repeated; they are added up.",
            metavar="STATISTICS",
        ),
    ] = [],  # noqa: B006 (typer copies it)
    checkpoint: Annotated[
        bool,
        typer.Option(
            "--checkpoint",
            help="Write the whole model, not only the bases that belong to it. Without a window they are folded into "
            "the weights, and a whole model is written anyway.",
        ),
    ] = False,
    loading: LoadingOptions,
    memory: MemoryOptions,
    json_file: Json = None,
) -> None:
    """Compress a model's KV cache and write its bases; killed, it goes on with the same command."""
    if statistics and calibration != CalibrationOptions():
        raise EigenAttnError("statistics are of texts already: leave out --text, --samples, --length and --seed.")
    files = open_statistics(statistics)
    config = compression.config(files)
    sources = [source for file in files for source in file.sources] or calibration.text
    if config.coded and of_one_kind(sources):
        Console(stderr=True).print(
            f"Calibrated on {sources[0]} alone, codes lose more on text of other kinds; `--text {DEFAULT_SOURCE}` "
            "has many.",
            highlight=False,
            soft_wrap=True,
        )
    report = compress_checkpoint(
        model,
        out,
        config,
        statistics or calibration.windows(),
        dtype=loading.dtype,
        device=loading.device,
        max_memory=memory_limits(memory.max_memory),
        offload_folder=memory.offload_folder,
        checkpoint=checkpoint,
        progress=True,
    )
    console = emit(report.to_dict(), json_file)
    console.print(
        f"{out}: {report.bytes_per_token:,} cache bytes a token instead of {report.baseline_bytes_per_token:,} "
        f"(KV ratio {report.kv_ratio:.3f}), in {sum(report.seconds.values()):.0f} s.\n{at_lengths(report)}",
        highlight=False,
        soft_wrap=True,
    )
