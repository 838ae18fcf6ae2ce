"""`eigenattn finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..calibration.text import DEFAULT_SOURCE
from ..finetuning import FinetuneConfig
from ..workflows.finetune import finetune_checkpoint
from .common import WORDS, Json, command, emit, say
from .options import TEXT_HELP, LoadingOptions, seed_of, sources

WORDS[FinetuneConfig] = {
    "steps": "How often the parameters are updated.",
    "batch_size": "How many windows a step reads.",
    "learning_rate": "The learning rate of LoRA at its height; for checkpoints without a window.",
    "map_learning_rate": "The learning rate of the bases at its height, in proportion to their size.",
    "lora_rank": "The rank of LoRA; for checkpoints without a window.",
    "lora_alpha": "The alpha of LoRA; for checkpoints without a window.",
    "validate_every": "How many steps lie between validations.",
    "seed": seed_of("the order of windows"),
}


@command(
    "eigenattn finetune llama-50 llama-50-tuned --text wikitext2 --distil meta-llama/Llama-3.1-8B",
    "eigenattn finetune papers-way papers-way-lora --text speeches.txt --lora-rank 64 --lora-alpha 64",
    "eigenattn finetune bases bases-tuned --text prompts.jsonl --distil smollm2 --steps 400 --length 2048",
    text=sources(f"What to train on: {TEXT_HELP}. Its end is held out. May be repeated."),
    distil="The original model, whose predictions to learn, instead of the text's next tokens.",
    length=typer.Option(min=2, help="How many tokens a window has."),
    validation_windows=typer.Option(min=1, help="How many windows to hold out at the text's end."),
)
def finetune(
    checkpoint: Annotated[str, typer.Argument(help="What `compress` wrote: a folder, of bases too, or a hub id.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    *,
    config: FinetuneConfig,
    text: list[str] = [DEFAULT_SOURCE],  # noqa: B006 (typer copies it)
    distil: str | None = None,
    length: int = 1024,
    validation_windows: int = 8,
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
        config,
        texts=text,
        length=length,
        validation_windows=validation_windows,
        distil=distil,
        **vars(loading),
        progress=True,
    )
    say(
        emit(report, json_file),
        f"{out}: {report.measure} {report.before:.4g} before, {report.after:.4g} after {report.best_step} of "
        f"{report.steps} steps, in {report.seconds:.0f} s ({report.trained_parameters:,} numbers trained).",
    )
