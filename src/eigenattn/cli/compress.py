"""`eigenattn calibrate` and `eigenattn compress`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..calibration.statistics_file import open_statistics
from ..calibration.text import DEFAULT_SOURCE
from ..compression.pipeline import CompressionReport
from ..config import DEFAULT_CODED_RATIO, EigenAttentionConfig
from ..errors import EigenAttnError
from ..workflows.calibrate import CalibrationText, calibrate_checkpoint, of_one_kind
from ..workflows.compress import BoundedLoss, compress_checkpoint
from .common import COMMON, MORE, Json, Model, at_lengths, command, emit, say, then
from .options import SHARE_DEFAULT, SHARE_HELP, WINDOW_HELP, PlacementOptions


@command(
    "eigenattn calibrate smollm2 prose --text speeches.txt",
    "eigenattn calibrate smollm2 code --text code.jsonl --samples 64 --length 4096",
    "eigenattn compress smollm2 smollm2-4-bits --statistics prose --statistics code",
    panel=MORE,
    window=typer.Option(min=0, help=f"{WINDOW_HELP}; 0 for none."),
    share=f"{SHARE_HELP} {SHARE_DEFAULT}.",
)
def calibrate(
    model: Model,
    statistics: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    *,
    text: CalibrationText,
    window: int = 32,
    share: str | None = None,
    loading: PlacementOptions,
    json_file: Json = None,
) -> None:
    """Collect statistics that `compress --statistics` adds up, for caches of any size; killed, it goes on."""
    found = calibrate_checkpoint(
        model, statistics, text, window=window, share=share, **loading.arguments(), progress=True
    )
    sources = ", ".join(each["source"] for each in found["text"])
    console = emit(found, json_file)
    say(console, f"{statistics}: statistics of {found['tokens']:,} tokens of {sources}.")
    then(console, "compress", model, "OUT", "--statistics", statistics)


def _latents_by_default(context: typer.Context, folders: list[Path]) -> list[Path]:
    """Have the latents that statistics are of stand in for those that are not chosen."""
    for file in open_statistics(folders):
        context.default_map = file.latents
    return folders


@command(
    "eigenattn compress smollm2 smollm2-4-bits",
    "eigenattn compress meta-llama/Llama-3.1-8B llama-2-bits --kv-ratio 0.14 --dtype bfloat16",
    "eigenattn compress smollm2 smollm2-small --max-divergence 0.005 --held-out python-docs --held-out speeches.txt",
    "eigenattn compress smollm2 smollm2-shared --kv-ratio 0.14 --share 3kv",
    "eigenattn compress smollm2 smollm2-3-bits --kv-ratio 0.1875 --statistics prose --statistics code",
    "eigenattn compress smollm2 smollm2-60 --uncoded --kv-ratio 0.6 --text wikitext2",
    "eigenattn compress ./my-model ./my-model-small --text prompts.jsonl --text self --length 4096",
    "eigenattn compress meta-llama/Llama-3.1-70B llama-60 --device-map auto --max-memory 0=70GiB,cpu=100GiB",
    "eigenattn compress smollm2 papers-way --basis eigen --ranks error_budget --window 0",
    panel=COMMON,
    statistics=typer.Option(
        help="In place of texts: a folder that `eigenattn calibrate` wrote. May be repeated; they are added up.",
        metavar="STATISTICS",
        is_eager=True,  # seen before the options whose defaults hang on it
        callback=_latents_by_default,
    ),
    checkpoint="Write the whole model, not only the bases that belong to it. Without a window they are folded into the "
    "weights, and a whole model is written anyway.",
)
def compress(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    *,
    config: EigenAttentionConfig,
    text: CalibrationText,
    statistics: list[Path] = [],  # noqa: B006 (typer copies it)
    loss: BoundedLoss,
    checkpoint: bool = False,
    loading: PlacementOptions,
    json_file: Json = None,
) -> None:
    """Compress a model's KV cache and write its bases; killed, it goes on with the same command.

    It takes the memory of the model and of one layer's activations, and the time of some eight passes over the text:
    minutes for a small model on a CPU, or a large one on a GPU. Unsure? Give MODEL and OUT alone: a quarter of the
    cache, by a text of many kinds that comes along. If you know what you will serve, add it: `--text mixture --text
    mine.jsonl`. Bases are a few megabytes that belong to MODEL, and OUT loads wherever MODEL does.
    """
    if loss.max_divergence is not None and config != dataclasses.replace(config, kv_ratio=DEFAULT_CODED_RATIO):
        raise EigenAttnError("--max-divergence chooses the size, of coded latents: leave out the other target.")
    if statistics and text != CalibrationText():
        raise EigenAttnError("statistics are of texts already: leave out --text, --samples, --length and --seed.")
    sources = [source for file in open_statistics(statistics) for source in file.sources] or text.text
    if config.coded and of_one_kind(sources):
        say(
            Console(stderr=True, highlight=False),
            f"Calibrated on {sources[0]} alone, codes lose more on text of other kinds; `--text {DEFAULT_SOURCE}` "
            "has many.",
        )
    report = compress_checkpoint(
        model,
        out,
        config,
        statistics or text,
        **loading.arguments(),
        loss=loss,
        checkpoint=checkpoint,
        progress=True,
    )
    console = emit(report, json_file)
    say(
        console,
        f"{out}: {report.bytes_per_token:,} cache bytes a token instead of {report.baseline_bytes_per_token:,} "
        f"(KV ratio {report.kv_ratio:.3f}), in {sum(report.seconds.values()):.0f} s.\n{_measured(report)}"
        f"{at_lengths(report)}",
    )
    then(console, "evaluate", out, "--baseline", model, "--text", "YOUR-TEXT")


def _measured(report: CompressionReport) -> str:
    """What was measured where a loss was bounded."""
    found = report.divergences or {}
    return "".join(f"It diverges by {nats:.4f} nats a token on {text}.\n" for text, nats in found.items())
