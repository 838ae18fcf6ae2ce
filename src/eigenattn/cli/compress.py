"""`eigenattn compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..calibration.text import DEFAULT_SOURCE
from ..config import EigenAttentionConfig
from ..workflows.compress import CalibrationText, compress_checkpoint
from .common import Json, Model, at_lengths, command, emit, memory_limits, say
from .options import LoadingOptions


@command(
    "eigenattn compress smollm2 smollm2-4-bits",
    "eigenattn compress meta-llama/Llama-3.1-8B llama-2-bits --kv-ratio 0.14 --dtype bfloat16",
    "eigenattn compress smollm2 smollm2-shared --kv-ratio 0.14 --share 3kv",
    "eigenattn compress smollm2 smollm2-60 --uncoded --kv-ratio 0.6 --text wikitext2",
    "eigenattn compress ./my-model ./my-model-small --text prompts.jsonl --text self --length 4096",
    "eigenattn compress meta-llama/Llama-3.1-70B llama-60 --device-map auto --max-memory 0=70GiB,cpu=100GiB",
    "eigenattn compress smollm2 papers-way --basis eigen --ranks error_budget --window 0",
    bases_only="Write the bases alone, to be attached to the original model. Needs a window: without one they are "
    "folded into the weights.",
    max_memory="With --device-map auto, balanced or sequential: the most memory to use of each GPU, by its number, "
    "and of the CPU, such as 0=70GiB,cpu=100GiB.",
    offload_folder="The folder for weights that are put on disk. By default they go into OUT.partial.",
)
def compress(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    *,
    config: EigenAttentionConfig,
    text: CalibrationText,
    bases_only: bool = False,
    loading: LoadingOptions,
    max_memory: str | None = None,
    offload_folder: Path | None = None,
    json_file: Json = None,
) -> None:
    """Compress a model's KV cache and write the checkpoint; killed, it goes on with the same command."""
    if config.coded and text.one_kind:
        say(
            Console(stderr=True, highlight=False),
            f"Calibrated on {text.text[0]} alone, codes lose more on text of other kinds; `--text {DEFAULT_SOURCE}` "
            "has many.",
        )
    report = compress_checkpoint(
        model,
        out,
        config,
        text,
        **vars(loading),
        max_memory=memory_limits(max_memory),
        offload_folder=offload_folder,
        bases_only=bases_only,
        progress=True,
    )
    say(
        emit(report, json_file),
        f"{out}: {report.bytes_per_token:,} cache bytes a token instead of {report.baseline_bytes_per_token:,} "
        f"(KV ratio {report.kv_ratio:.3f}), in {sum(report.seconds.values()):.0f} s.\n{at_lengths(report)}",
    )
