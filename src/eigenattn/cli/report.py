"""`eigenattn report`."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..errors import EigenAttnError
from ..files import check_name, whole
from ..report.page import PROMPTS, build, gather
from .common import Model, app, examples
from .options import LoadingOptions, grouped


@app.command(
    epilog=examples(
        "eigenattn report smollm2-60 --open",
        "eigenattn report smollm2-60 --sweep smollm2-sweep --spectrum smollm2-spectrum --baseline smollm2",
    )
)
@grouped
def report(
    model: Model,
    *,
    out: Annotated[
        Path | None, typer.Option(help="The page to write; report.html in the checkpoint's folder by default.")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="A file of `eigenattn evaluate --json`; by default what --save kept.")
    ] = None,
    sweep: Annotated[Path | None, typer.Option(help="A folder of `eigenattn sweep`.")] = None,
    spectrum: Annotated[Path | None, typer.Option(help="A folder of `eigenattn spectrum`.")] = None,
    baseline: Annotated[str | None, typer.Option(help="The original, to set continuations side by side.")] = None,
    prompt: Annotated[
        list[str], typer.Option(help=f"What both continue; may be repeated. {len(PROMPTS)} are built in.")
    ] = [],  # noqa: B006 (typer copies it)
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    loading: LoadingOptions,
) -> None:
    """Write one HTML page on a checkpoint: ranks, bytes, quality, spectra, where it comes from. It loads nothing."""
    check_name(Path(model))
    if out is None and not Path(model).is_dir():
        raise EigenAttnError(f"{model} is no folder: say with --out where the page is to be written.")
    target = out or Path(model) / "report.html"
    material = gather(
        model,
        evaluation=evaluation,
        sweep=sweep,
        spectra=spectrum,
        baseline=baseline,
        prompts=prompt,
        **vars(loading),
    )
    content = build(material)
    with whole(target) as beside:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(content, encoding="utf-8")
    Console().print(f"{target}: {len(content):,} bytes", highlight=False, soft_wrap=True)
    if open_page:
        webbrowser.open(target.resolve().as_uri())
