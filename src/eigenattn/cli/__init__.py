"""The command line: parses, calls, prints. One module for each group of commands."""

from __future__ import annotations

import sys

from transformers.utils.logging import disable_progress_bar

from ..errors import EigenAttnError
from . import (  # noqa: F401 (each adds its commands to the application)
    benchmark,
    compress,
    evaluate,
    finetune,
    look,
    plan,
    report,
    spectrum,
    sweep,
)
from .common import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point: an `EigenAttnError` is one line on the error stream and exit status 1."""
    if not sys.stderr.isatty():
        disable_progress_bar()  # transformers' own, which would fill a log
    try:
        app()
    except EigenAttnError as error:
        sys.exit(f"eigenattn: {error}")
