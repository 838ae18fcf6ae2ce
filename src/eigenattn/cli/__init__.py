"""The command line: parses, calls, prints. One module for each group of commands."""

from __future__ import annotations

import sys
from functools import partialmethod

from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from ..errors import EigenAttnError
from . import (  # noqa: F401 (each adds its commands to the application)
    benchmark,
    chat,
    compress,
    doctor,
    evaluate,
    finetune,
    look,
    plan,
    report,
    spectrum,
    sweep,
)
from .common import COMMON, LOOK, MORE, app

__all__ = ["app", "main"]


# Headings stand in the order in which commands come.
app.registered_commands.sort(key=lambda each: (COMMON, LOOK, MORE).index(str(each.rich_help_panel)))


def main() -> None:
    """Entry point.

    Exit status 0: done. 1: an `EigenAttnError`, which is one line on the error stream. 2: the command line is none.
    130: interrupted.
    """
    if not sys.stderr.isatty():  # bars of others would fill a log
        disable_progress_bar()
        setattr(tqdm, "__init__", partialmethod(tqdm.__init__, disable=True))  # noqa: B010 (no class is known to have one)
    try:
        app()
    except EigenAttnError as error:
        sys.exit(f"eigenattn: {error}")
