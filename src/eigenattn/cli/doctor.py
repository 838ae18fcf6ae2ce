"""`eigenattn doctor`."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from ..report.doctor import examine
from .common import COMMON, Json, command, emit


@command("eigenattn doctor", "eigenattn doctor --json -", panel=COMMON)
def doctor(json_file: Json = None) -> None:
    """Say what this machine has: versions, which decoding step runs and why, memory, GPUs, and what is missing.

    It takes seconds; where there is a compiler and the native decoding step is not built yet, a minute.
    """
    found = examine()
    values: dict[str, Any] = {"findings": [vars(each) for each in found]}
    console = emit(values, json_file)
    table = Table("", "found", "to do")
    for each in found:
        table.add_row(each.subject, each.found, each.advice)
    console.print(table, markup=False)
