"""`eigenattn generate`, `inspect` and `demo`: looking at one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..evaluation.generation import continue_prompt
from ..models.loading import Source, load_model, load_tokenizer
from ..report.inspection import inspect_checkpoint
from ..report.tables import layout_table
from ..workflows.demo import RIVAL, run_demo
from .common import SEEDS, Json, Model, app, at_lengths, emit, examples, rich_table
from .options import EvictionOptions, LoadingOptions, grouped


@app.command(
    epilog=examples(
        'eigenattn generate smollm2-60 "Fellow citizens,"',
        "eigenattn generate smollm2 Hello --seed 1",
        'eigenattn generate smollm2-60 "$(cat report.txt)" --evict snapkv --budget 1024',
    )
)
@grouped
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    *,
    eviction: EvictionOptions,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens to generate at most.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0, help="The temperature of the sampling; at 0 the likeliest token is taken.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(**SEEDS, help="The seed of the sampling.")] = 0,
    loading: LoadingOptions,
    json_file: Json = None,
) -> None:
    """Continue a prompt."""
    source = Source.of(model)
    tokenizer = load_tokenizer(source)
    result = continue_prompt(
        load_model(source, **vars(loading)),
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        **eviction.arguments(),
    )
    console = emit(result.to_dict(), json_file)
    console.print(prompt + result.text, highlight=False, soft_wrap=True, markup=False)


@app.command(epilog=examples("eigenattn inspect smollm2-60", "eigenattn inspect smollm2-60 --json -"))
def inspect(model: Model, json_file: Json = None) -> None:
    """Show ranks, bits and cache bytes a token by layer, and provenance, without loading weights."""
    found = inspect_checkpoint(model)
    console = emit(found.to_dict(), json_file)
    title = f"{model} ({found.model_type})"
    console.print(rich_table(layout_table(found.layers, found.element_size), title))
    if not found.compressed:
        console.print("This model is not compressed.")
    console.print(
        f"{found.bytes_per_token:,} cache bytes a token of {found.baseline_bytes_per_token:,} "
        f"(KV ratio {found.kv_ratio:.3f})\n{at_lengths(found)}",
        highlight=False,
        soft_wrap=True,
    )
    for name, value in found.provenance.items():
        console.print(f"{name}: {value}", highlight=False, soft_wrap=True, markup=False)


@app.command(epilog=examples("eigenattn demo", "eigenattn demo --out smollm2-4-bits"))
def demo(
    out: Annotated[Path | None, typer.Option(help="Keep the compressed checkpoint here.")] = None,
    json_file: Json = None,
) -> None:
    """Compress SmolLM2-135M to a quarter of its cache, save it, reload it and compare it, also with a rival."""
    result = run_demo(out)
    console = emit(result.to_dict(), json_file)
    table = Table("", "original", RIVAL, "compressed", title="SmolLM2-135M-Instruct, text that nobody calibrated on")
    columns = (result.original, result.rival, result.compressed)
    table.add_row("bits an element", *(f"{column.bits:.2f}" for column in columns))
    table.add_row("perplexity", *(f"{column.perplexity:.2f}" for column in columns))
    table.add_row("divergence, thousandths of a nat", *(f"{1000 * column.divergence:.2f}" for column in columns))
    table.add_row(
        "cache bytes of 1,024 tokens (fp32)",
        *(f"{column.cache_bytes:,}" if column.cache_bytes is not None else "" for column in columns),
    )
    table.add_row(
        "tokens a second",
        *(f"{column.continuation.tokens_per_second:.1f}" if column.continuation else "" for column in columns),
    )
    console.print(table)
    console.print(
        f"KV ratio {result.kv_ratio:.3f}. The same prompt, continued by both:\n", highlight=False, soft_wrap=True
    )
    for title, column in (("original", result.original), ("compressed", result.compressed)):
        if column.continuation is not None:
            console.print(f"[bold]{title}[/bold]")
            words = column.continuation.prompt + column.continuation.text
            console.print(words + "\n", highlight=False, soft_wrap=True, markup=False)
    console.print(f"{result.seconds:.0f} s in all.", highlight=False, soft_wrap=True)
