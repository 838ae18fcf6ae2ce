"""`eigenattn evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..calibration.text import DEFAULT_SOURCE
from ..evaluation.checkpoint import evaluate_checkpoint
from .common import TEXT_HELP, Device, Dtype, Json, Model, app, emit, examples

TextSource = Annotated[str, typer.Option("--text", help=f"{TEXT_HELP}.", metavar="SOURCE")]


@app.command(
    epilog=examples(
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
    console = emit(result.to_dict(), json_file)
    line = f"perplexity {result.perplexity:.3f} over {result.tokens:,} tokens of {result.text}"
    line += f", KV ratio {result.kv_ratio:.3f}"
    if against is not None:
        line += f"; baseline {result.baseline_perplexity:.3f} ({result.relative_increase:+.2%})"
    console.print(line, highlight=False, soft_wrap=True)
