"""`eigenattn benchmark kernel`, `decode`, `prefill`, `memory` and `calibration`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from .common import JSON, MODEL_HELP, MORE, WORDS, app, command, emit, say
from .options import WINDOW_HELP, LoadingOptions

group = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(
    group,
    name="benchmark",
    help="Measure speed and memory against the best at full rank.",
    rich_help_panel=MORE,
)

MODEL = typer.Argument(help=MODEL_HELP, show_default=False)
SHAPE_HELP = f"Measure a model with random weights instead: {', '.join(SHAPES)}."
BATCH = typer.Option(min=1, help="How many rows to compute at a time.")
ROUNDS = typer.Option(min=1, help="How often each is timed; medians count.")
WORDS[Contest] = {
    "model": MODEL,
    "against": "The baseline, as a rule the uncompressed model.",
    "shape": SHAPE_HELP,
    "kv_ratio": typer.Option(min=0.05, max=1, help="The KV ratio that a model of --shape is compressed to."),
    "window": typer.Option(min=0, help=f"{WINDOW_HELP}; 0 for none. Only with --shape."),
    **WORDS[LoadingOptions],
}
WORDS[StepShape] = {
    "batch": typer.Option(min=1, help="How many rows decode at a time."),
    "heads": typer.Option(min=1, help="How many query heads there are."),
    "kv_heads": typer.Option(min=1, help="How many KV heads there are."),
    "head_dim": typer.Option(min=2, help="The dimension of a head."),
    "length": typer.Option(min=1, help="How many tokens are cached."),
    "window": typer.Option(min=0, help="How many of them are exact."),
}


@dataclass(frozen=True)
class OutputOptions:
    """Where results go."""

    results: Path | None = None
    json_file: str | None = None


WORDS[OutputOptions] = {
    "results": "A folder to write the JSON to as well, into a file with the name of the device.",
    "json_file": JSON,
}


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
        emit(result, str(folder / file_name(result, device_of(device))))
    console = emit(result, output.json_file)
    console.print(table)
    say(console, f"Measured on {result['device']}.")


@command(
    "eigenattn benchmark kernel --ranks 80,80 --ranks 64,64 --bits 2.5",
    "eigenattn benchmark kernel --shape mpt-7b --batch 1 --length 131072 --ranks 80,80",
    "eigenattn benchmark kernel --batch 1 --heads 9 --kv-heads 3 --head-dim 64 --length 1024 --ranks 40,40",
    group=group,
    shape=f"Take the heads of one of {', '.join(SHAPES)}.",
    ranks="Ranks of keys and of values to measure, such as 80,80. May be repeated.",
    bits="Measure coded latents as well, of so many bits for an original element.",
    share="Measure shared latents of the same bytes as well: 1-4 for values of four KV heads in one, 1kv for "
    "keys and values of a head. May be repeated.",
    rounds=ROUNDS,
)
def kernel(
    *,
    shape: str | None = None,
    step: StepShape,
    ranks: list[str] = ["80,80", "64,64"],  # noqa: B006 (typer copies it)
    bits: float | None = None,
    share: list[str] = [],  # noqa: B006
    rounds: int = 50,
    output: OutputOptions,
    loading: LoadingOptions,
) -> None:
    """One step of attention over latents, against full-rank attention by every kernel of PyTorch that runs here."""
    found = benchmark_kernel(
        step if shape is None else dataclasses.replace(step, **head_shape(shape)),
        ranks=_pairs(ranks),
        bits=bits,
        share=share,
        rounds=rounds,
        label=None
        if shape is None
        else "-".join(filter(None, [shape, f"b{step.batch}", f"s{step.length}", loading.dtype])),
        **vars(loading),
    )
    table = Table("kernel, positions, ranks", "ms", "of copy bandwidth", "of peak arithmetic", "speed against the best")
    for row in found["rows"]:
        shares = f"{row['bandwidth_share']:.0%}", f"{row['arithmetic_share']:.0%}"
        table.add_row(row["name"], f"{row['seconds'] * 1e3:.3f}", *shares, f"{row['speed_against_best']:.2f}")
    _show(found, output, loading.device, table)


@command(
    "eigenattn benchmark decode smollm2-60 --against smollm2 --length 960",
    "eigenattn benchmark decode llama-50 --against meta-llama/Llama-3.1-8B --batch 16 --cache static",
    "eigenattn benchmark decode --shape llama-3-8b --kv-ratio 0.6 --batch 16 --length 8192",
    group=group,
    batch=BATCH,
    length=typer.Option(min=1, help="How many tokens the prompt has."),
    new_tokens=typer.Option(min=2, help="How many tokens to decode in a round."),
    rounds=typer.Option(min=1, help="How many rounds to decode; the median step counts."),
    cache=f"Which caches to decode with: {', '.join(CACHES)}. Without a GPU only the first two by default. May be "
    "repeated.",
)
def decode(
    contest: Contest,
    *,
    batch: int = 1,
    length: int = 960,
    new_tokens: int = 16,
    rounds: int = 5,
    cache: list[str] | None = None,
    output: OutputOptions,
) -> None:
    """Tokens a second in transformers' generate, in turns with a baseline; reading the prompt is not counted."""
    caches = tuple(dict.fromkeys(cache)) if cache else None
    unknown = [name for name in caches or () if name not in CACHES]
    if unknown:
        raise EigenAttnError(f"unknown cache {unknown[0]!r}: choose one of {', '.join(CACHES)}.")
    found = benchmark_decode(contest, batch=batch, length=length, new_tokens=new_tokens, rounds=rounds, caches=caches)
    table = Table(
        "cache", "tokens a second", "baseline", "ratio", title=f"{found['model']}, KV ratio {found['kv_ratio']:.3f}"
    )
    for row in found["rows"]:
        speeds = f"{row['tokens_per_second']:.1f}", f"{row['baseline_tokens_per_second']:.1f}"
        table.add_row(row["cache"], *speeds, f"{row['ratio']:.2f}")
    for failure in found["failed"]:
        table.add_row(failure["cache"], "failed", failure["reason"], "")
    _show(found, output, contest.device, table)


@command(
    "eigenattn benchmark prefill smollm2-60 --against smollm2 --length 1024 --length 4096",
    "eigenattn benchmark prefill --shape llama-3-8b --length 131072 --chunk 4096",
    group=group,
    batch=BATCH,
    length=typer.Option(min=1, help="How many tokens the prompt has; may be repeated."),
    chunk=typer.Option(min=1, help="How many tokens to read in a pass; by default the whole prompt."),
    rounds=ROUNDS,
)
def prefill(
    contest: Contest,
    *,
    batch: int = 1,
    length: list[int] = [1024, 4096],  # noqa: B006 (typer copies it)
    chunk: int | None = None,
    rounds: int = 3,
    output: OutputOptions,
) -> None:
    """Tokens a second in reading a prompt, in turns with a baseline, and what it takes beyond the cache on a GPU."""
    found = benchmark_prefill(contest, batch=batch, lengths=tuple(length), chunk=chunk, rounds=rounds)
    title = f"{found['model']}, KV ratio {found['kv_ratio']:.3f}"
    table = Table("tokens", "tokens a second", "baseline", "ratio", "MiB beyond the cache", "baseline", title=title)
    for row in found["rows"]:
        speeds = f"{row['tokens_per_second']:.0f}", f"{row['baseline_tokens_per_second']:.0f}", f"{row['ratio']:.2f}"
        peaks = (row["peak_bytes"], row["baseline_peak_bytes"])
        table.add_row(f"{row['length']:,}", *speeds, *("" if x is None else f"{x / 2**20:,.0f}" for x in peaks))
    _show(found, output, contest.device, table)


@command(
    "eigenattn benchmark calibration smollm2 --samples 8",
    "eigenattn benchmark calibration --shape llama-2-7b --samples 32 --length 2048",
    group=group,
    model=MODEL,
    shape=SHAPE_HELP,
    samples=typer.Option(min=1, help="How many windows of random tokens to read."),
    length=typer.Option(min=64, help="How many tokens a window has."),
    rounds=ROUNDS,
)
def calibration(
    model: str | None = None,
    *,
    shape: str | None = None,
    samples: int = 16,
    length: int = 1024,
    rounds: int = 3,
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


@command(
    "eigenattn benchmark memory llama-50 --against meta-llama/Llama-3.1-8B --length 8192",
    "eigenattn benchmark memory --shape opt-6.7b --length 2048 --longest 131072",
    group=group,
    length=typer.Option(min=1, help="The context at which the largest batch is searched for."),
    longest=typer.Option(min=1, help="The longest context that is tried."),
)
def memory(
    contest: Contest,
    *,
    length: int = 4096,
    longest: int = 131072,
    output: OutputOptions,
) -> None:
    """The largest batch and the longest context before a GPU runs out of memory."""
    found = benchmark_memory(contest, length=length, longest=longest)
    table = Table("model", f"rows of {length:,} tokens", "tokens of one row")
    for row in found["rows"]:
        table.add_row(row["model"], f"{row['batch']:,}", f"{row['context']:,}")
    _show(found, output, contest.device, table)
