"""`eigenattn finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..calibration.text import DEFAULT_SOURCE
from ..finetuning import FinetuneConfig
from ..finetuning.checkpoint import finetune_checkpoint
from .common import TEXT_HELP, Device, Dtype, Json, app, emit, examples


@app.command(
    epilog=examples(
        "eigenattn finetune llama-50 llama-50-tuned --text wikitext2 --distil meta-llama/Llama-3.1-8B",
        "eigenattn finetune papers-way papers-way-lora --text speeches.txt --lora-rank 64 --lora-alpha 64",
        "eigenattn finetune bases bases-tuned --text prompts.jsonl --distil smollm2 --steps 400 --length 2048",
    )
)
def finetune(
    checkpoint: Annotated[str, typer.Argument(help="What `compress` wrote: a folder, of bases too, or a hub id.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    text: Annotated[
        list[str],
        typer.Option("--text", help=f"{TEXT_HELP}; its end is held out. May be repeated.", metavar="SOURCE"),
    ] = [DEFAULT_SOURCE],  # noqa: B006 (typer copies it)
    distil: Annotated[
        str | None,
        typer.Option(help="The original model, whose predictions to meet, instead of the text's next tokens."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Updates of the parameters.")] = FinetuneConfig.steps,
    batch_size: Annotated[int, typer.Option(help="Windows a step.")] = FinetuneConfig.batch_size,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 1024,
    learning_rate: Annotated[
        float, typer.Option(help="Of LoRA, with --window 0, at its height.")
    ] = FinetuneConfig.learning_rate,
    map_learning_rate: Annotated[
        float, typer.Option(help="Of the bases, in proportion to their size.")
    ] = FinetuneConfig.map_learning_rate,
    lora_rank: Annotated[int, typer.Option(help="Of LoRA, with --window 0.")] = FinetuneConfig.lora_rank,
    lora_alpha: Annotated[int, typer.Option(help="Of LoRA, with --window 0.")] = FinetuneConfig.lora_alpha,
    validate_every: Annotated[int, typer.Option(help="Steps between validations.")] = FinetuneConfig.validate_every,
    validation_windows: Annotated[int, typer.Option(min=1, help="Windows held out at the text's end.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the order of windows.")] = FinetuneConfig.seed,
    dtype: Dtype = None,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Train a compressed checkpoint, to win back what it lost; killed, it goes on with the same command.

    With a window the bases are trained and the original weights stay. With `--window 0` the bases are inside the
    weights, which are trained by LoRA (`pip install 'eigenattn[finetune]'`).
    """
    config = FinetuneConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        map_learning_rate=map_learning_rate,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        validate_every=validate_every,
        seed=seed,
    )
    report = finetune_checkpoint(
        checkpoint,
        out,
        config,
        texts=text,
        length=length,
        validation_windows=validation_windows,
        distil=distil,
        dtype=dtype,
        device=device,
        progress=True,
    )
    console = emit(report.to_dict(), json_file)
    console.print(
        f"{out}: {report.measure} {report.before:.4g} before, {report.after:.4g} after {report.best_step} of "
        f"{report.steps} steps, in {report.seconds:.0f} s ({report.trained_parameters:,} numbers trained).",
        highlight=False,
        soft_wrap=True,
    )
