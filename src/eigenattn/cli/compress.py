"""`eigenattn compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..calibration.text import DEFAULT_SOURCE
from ..compression.bases import BASES
from ..compression.checkpoint import compress_checkpoint
from ..compression.ranks import RANK_RULES
from ..config import EigenAttentionConfig
from .common import TEXT_HELP, Device, Dtype, Json, Model, app, at_lengths, emit, examples, memory_limits


@app.command(
    epilog=examples(
        "eigenattn compress smollm2 smollm2-60 --kv-ratio 0.6",
        "eigenattn compress meta-llama/Llama-3.1-8B llama-50 --kv-ratio 0.5 --text wikitext2 --dtype bfloat16",
        "eigenattn compress smollm2 smollm2-3-bits --bits-per-element 3",
        "eigenattn compress ./my-model ./my-model-small --text prompts.jsonl --text self --length 4096",
        "eigenattn compress meta-llama/Llama-3.1-70B llama-60 --device-map auto --max-memory 0=70GiB,cpu=100GiB",
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
    shared_heads: Annotated[
        int, typer.Option(help="KV heads that share one latent: the same bytes, less lost, more arithmetic.")
    ] = 1,
    shared_values: Annotated[
        int | None,
        typer.Option(help="KV heads that share one latent of their values, by default --shared-heads: less lost."),
    ] = None,
    joint: Annotated[
        bool, typer.Option("--joint", help="Keys and values share latents too: less lost still, more arithmetic.")
    ] = False,
    shrinkage: Annotated[
        float,
        typer.Option(help="Share of statistics taken from the weights, in [0, 1): for texts to come of another kind."),
    ] = 0.0,
    refit: Annotated[
        bool | None,
        typer.Option(
            "--refit/--no-refit",
            help="Fit value decoders anew, layer by layer, once ranks are chosen. By default without a window.",
        ),
    ] = None,
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
    max_memory: Annotated[
        str | None,
        typer.Option(help="With a device map that is made, the most to use of each device, by number, and of cpu."),
    ] = None,
    offload_folder: Annotated[
        Path | None, typer.Option(help="Where weights go that are put on disk; by default into OUT.partial.")
    ] = None,
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
        shared_heads=shared_heads,
        shared_values=shared_values,
        joint=joint,
        shrinkage=shrinkage,
        refit=refit,
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
        max_memory=memory_limits(max_memory),
        offload_folder=offload_folder,
        bases_only=bases_only,
        progress=True,
    )
    console = emit(report.to_dict(), json_file)
    console.print(
        f"{out}: {report.bytes_per_token:,} cache bytes a token instead of {report.baseline_bytes_per_token:,} "
        f"(KV ratio {report.kv_ratio:.3f}), in {sum(report.seconds.values()):.0f} s.\n{at_lengths(report)}",
        highlight=False,
        soft_wrap=True,
    )
