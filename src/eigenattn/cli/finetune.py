"""`eigenattn finetune`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..calibration.text import DEFAULT_SOURCE
from ..finetuning import FinetuneConfig
from ..workflows.finetune import finetune_checkpoint
from .common import SEEDS, Json, app, emit, examples
from .options import TEXT_HELP, LoadingOptions, grouped


@dataclass(frozen=True)
class TrainingOptions:
    """How a checkpoint is trained."""

    steps: Annotated[int, typer.Option(help="How often the parameters are updated.")] = FinetuneConfig.steps
    batch_size: Annotated[int, typer.Option(help="How many windows a step reads.")] = FinetuneConfig.batch_size
    learning_rate: Annotated[
        float, typer.Option(help="The learning rate of LoRA at its height; for checkpoints without a window.")
    ] = FinetuneConfig.learning_rate
    map_learning_rate: Annotated[
        float, typer.Option(help="The learning rate of the bases at its height, in proportion to their size.")
    ] = FinetuneConfig.map_learning_rate
    lora_rank: Annotated[int, typer.Option(help="The rank of LoRA; for checkpoints without a window.")] = (
        FinetuneConfig.lora_rank
    )
    lora_alpha: Annotated[int, typer.Option(help="The alpha of LoRA; for checkpoints without a window.")] = (
        FinetuneConfig.lora_alpha
    )
    validate_every: Annotated[int, typer.Option(help="How many steps lie between validations.")] = (
        FinetuneConfig.validate_every
    )
    seed: Annotated[int, typer.Option(**SEEDS, help="The seed of the order of windows.")] = FinetuneConfig.seed


@app.command(
    epilog=examples(
        "eigenattn finetune llama-50 llama-50-tuned --text wikitext2 --distil meta-llama/Llama-3.1-8B",
        "eigenattn finetune papers-way papers-way-lora --text speeches.txt --lora-rank 64 --lora-alpha 64",
        "eigenattn finetune bases bases-tuned --text prompts.jsonl --distil smollm2 --steps 400 --length 2048",
    )
)
@grouped
def finetune(
    checkpoint: Annotated[str, typer.Argument(help="What `compress` wrote: a folder, of bases too, or a hub id.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    *,
    training: TrainingOptions,
    text: Annotated[
        list[str],
        typer.Option(
            "--text",
            help=f"What to train on: {TEXT_HELP}. Its end is held out. May be repeated.",
            metavar="SOURCE",
        ),
    ] = [DEFAULT_SOURCE],  # noqa: B006 (typer copies it)
    distil: Annotated[
        str | None,
        typer.Option(help="The original model, whose predictions to learn, instead of the text's next tokens."),
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="How many tokens a window has.")] = 1024,
    validation_windows: Annotated[int, typer.Option(min=1, help="How many windows to hold out at the text's end.")] = 8,
    loading: LoadingOptions,
    json_file: Json = None,
) -> None:
    """Train a compressed checkpoint, to win back what it lost; killed, it goes on with the same command.

    With a window the bases are trained and the original weights stay. With `--window 0` the bases are inside the
    weights, which are trained by LoRA (`pip install 'eigenattn[finetune]'`).
    """
    report = finetune_checkpoint(
        checkpoint,
        out,
        FinetuneConfig(**vars(training)),
        texts=text,
        length=length,
        validation_windows=validation_windows,
        distil=distil,
        **vars(loading),
        progress=True,
    )
    console = emit(report.to_dict(), json_file)
    console.print(
        f"{out}: {report.measure} {report.before:.4g} before, {report.after:.4g} after {report.best_step} of "
        f"{report.steps} steps, in {report.seconds:.0f} s ({report.trained_parameters:,} numbers trained).",
        highlight=False,
        soft_wrap=True,
    )
