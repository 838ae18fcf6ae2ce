"""`eigenattn report`."""

from __future__ import annotations

import webbrowser
from pathlib import Path

import typer
from rich.console import Console

from ..errors import EigenAttnError
from ..files import check_name, whole
from ..report.page import PROMPTS, build, gather
from .common import Model, command, say
from .options import LoadingOptions


@command(
    "eigenattn report smollm2-60 --open",
    "eigenattn report smollm2-60 --sweep smollm2-sweep --spectrum smollm2-spectrum --baseline smollm2",
    out="The page to write; report.html in the checkpoint's folder by default.",
    evaluation="A file of `eigenattn evaluate --json`; by default what --save kept.",
    sweep="A folder of `eigenattn sweep`.",
    spectrum="A folder of `eigenattn spectrum`.",
    baseline="The original, to set continuations side by side.",
    prompt=f"What both continue; may be repeated. {len(PROMPTS)} are built in.",
    open_page=typer.Option("--open", help="Open the page in a browser."),
)
def report(
    model: Model,
    *,
    out: Path | None = None,
    evaluation: Path | None = None,
    sweep: Path | None = None,
    spectrum: Path | None = None,
    baseline: str | None = None,
    prompt: list[str] = [],  # noqa: B006 (typer copies it)
    open_page: bool = False,
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
    say(Console(highlight=False), f"{target}: {len(content):,} bytes")
    if open_page:
        webbrowser.open(target.resolve().as_uri())
