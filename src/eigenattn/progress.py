"""Progress bars on long work, and how long its stages take."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

# A bar's one task.
TASK = TaskID(0)


class HasTokens(Protocol):
    """What counts in tokens."""

    @property
    def tokens(self) -> int:
        """How many."""
        ...


AnyBatch = TypeVar("AnyBatch", bound=HasTokens)


class TokenProgress:
    """Counts work on the error stream; silent unless it is a terminal and `show` is set."""

    def __init__(self, show: bool) -> None:
        self.console = Console(stderr=True)
        self.show = show and self.console.is_terminal

    @contextmanager
    def bar(self, title: str, total: int | None) -> Iterator[Progress]:
        """A bar of `total` steps; its task is `TASK`."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console, disable=not self.show) as progress:
            progress.add_task(title, total=total, rate="")
            yield progress

    def batches(self, title: str, batches: Iterable[AnyBatch], total: int | None) -> Iterator[AnyBatch]:
        """Pass batches on, showing tokens a second."""
        tokens = 0
        with self.bar(title, total) as progress:
            for batch in batches:
                yield batch
                tokens += batch.tokens
                elapsed = progress.tasks[TASK].elapsed or 1e-9
                progress.update(TASK, advance=1, rate=f"{tokens / elapsed:,.0f} tokens/s")


class Clock:
    """Wall-clock seconds by stage, added up.

    Args:
        seconds: where, if some were counted before.
    """

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.seconds = {} if seconds is None else seconds

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent within to a stage's."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
