"""`eigenattn benchmark kernel`, `decode` and `memory`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..benchmark.decode import CACHES, benchmark_decode
from ..benchmark.kernel import benchmark_kernel
from ..benchmark.memory import benchmark_memory
from ..benchmark.timing import device_of, file_name
from ..errors import EigenAttnError
from .common import Device, Dtype, Json, Model, app, emit, examples

group = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(group, name="benchmark", help="Measure speed and memory against the best at full rank.")

Against = Annotated[str, typer.Option(help="The baseline, as a rule the uncompressed model.")]
Results = Annotated[
    Path | None, typer.Option(help="A folder to write the JSON to as well, under the name of the device.")
]


def _pairs(text: list[str]) -> list[tuple[int, int]]:
    """Pairs of ranks as they are written: `80,80`."""
    try:
        return [(int(first), int(second)) for first, second in (pair.split(",") for pair in text)]
    except ValueError as error:
        raise EigenAttnError(f"ranks are written R_k,R_v, such as 80,80, not {' '.join(text)!r}.") from error


def _give(
    result: dict[str, Any], json_file: str | None, results: Path | None, device: str | None, table: Table
) -> None:
    if results is not None:
        try:
            results.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EigenAttnError(f"{results} could not be made: {error.strerror}.") from error
        emit(result, str(results / file_name(result["kind"], device_of(device), result.get("model"))))
    console = emit(result, json_file)
    console.print(table)
    console.print(f"Measured on {result['device']}.", highlight=False, soft_wrap=True)


@group.command(
    epilog=examples(
        "eigenattn benchmark kernel --ranks 80,80 --ranks 64,64",
        "eigenattn benchmark kernel --batch 1 --heads 9 --kv-heads 3 --head-dim 64 --length 1024 --ranks 40,40",
    )
)
def kernel(
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 16,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, help="KV heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=2, help="Head dimension.")] = 128,
    length: Annotated[int, typer.Option(min=1, help="Cached tokens.")] = 8192,
    ranks: Annotated[list[str], typer.Option(help="R_k,R_v. May be repeated.")] = ["80,80", "64,64"],  # noqa: B006
    window: Annotated[int, typer.Option(min=0, help="Exact tokens among them.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Timings of each; medians count.")] = 50,
    results: Results = None,
    dtype: Dtype = None,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """One step of attention over latents, against full-rank attention by every kernel of PyTorch that runs here."""
    found = benchmark_kernel(
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        length=length,
        ranks=_pairs(ranks),
        window=window,
        dtype=dtype,
        device=device,
        rounds=rounds,
    )
    table = Table("kernel, positions, ranks", "ms", "of copy bandwidth", "speed against the best")
    for row in found["rows"]:
        cells = f"{row['seconds'] * 1e3:.3f}", f"{row['bandwidth_share']:.0%}", f"{row['speed_against_best']:.2f}"
        table.add_row(row["name"], *cells)
    _give(found, json_file, results, device, table)


@group.command(
    epilog=examples(
        "eigenattn benchmark decode smollm2-60 --against smollm2 --length 960",
        "eigenattn benchmark decode llama-50 --against meta-llama/Llama-3.1-8B --batch 16 --cache static",
    )
)
def decode(
    model: Model,
    against: Against,
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 960,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens decoded in a round.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the median step counts.")] = 5,
    cache: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(CACHES)}; both by default. May be repeated.")
    ] = None,
    results: Results = None,
    dtype: Dtype = None,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Tokens a second in transformers' generate, in turns with a baseline; reading the prompt is not counted."""
    caches = tuple(dict.fromkeys(cache or CACHES))
    unknown = [name for name in caches if name not in CACHES]
    if unknown:
        raise EigenAttnError(f"unknown cache {unknown[0]!r}: choose one of {', '.join(CACHES)}.")
    found = benchmark_decode(
        model,
        against=against,
        batch=batch,
        length=length,
        new_tokens=new_tokens,
        rounds=rounds,
        caches=caches,
        dtype=dtype,
        device=device,
    )
    table = Table("cache", "tokens a second", "baseline", "ratio", title=f"{model}, KV ratio {found['kv_ratio']:.3f}")
    for row in found["rows"]:
        speeds = f"{row['tokens_per_second']:.1f}", f"{row['baseline_tokens_per_second']:.1f}"
        table.add_row(row["cache"], *speeds, f"{row['ratio']:.2f}")
    _give(found, json_file, results, device, table)


@group.command(epilog=examples("eigenattn benchmark memory llama-50 --against meta-llama/Llama-3.1-8B --length 8192"))
def memory(
    model: Model,
    against: Against,
    length: Annotated[int, typer.Option(min=1, help="Context at which the largest batch is sought.")] = 4096,
    longest: Annotated[int, typer.Option(min=1, help="Contexts beyond it are not tried.")] = 131072,
    results: Results = None,
    dtype: Dtype = None,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """The largest batch and the longest context before a GPU runs out of memory."""
    found = benchmark_memory(model, against=against, length=length, longest=longest, dtype=dtype, device=device)
    table = Table("model", f"rows of {length:,} tokens", "tokens of one row")
    for row in found["rows"]:
        table.add_row(row["model"], f"{row['batch']:,}", f"{row['context']:,}")
    _give(found, json_file, results, device, table)
