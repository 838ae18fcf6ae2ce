"""Progress bars on long work, and how long its stages take."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers.utils import logging

# A bar's one task.
TASK = TaskID(0)
# A log, which is no terminal, gets a line after so many seconds, and no more than so many lines of one piece of work.
PATIENCE, LINES = 30.0, 10


class HasTokens(Protocol):
    """What counts in tokens."""

    @property
    def tokens(self) -> int:
        """How many."""
        ...


AnyBatch = TypeVar("AnyBatch", bound=HasTokens)


class LoggedProgress(Progress):
    """A bar for where there is no terminal: a line now and then, of what is done and what is left."""

    def __init__(self, console: Console) -> None:
        super().__init__(console=console, disable=True)
        self._told, self._shares = time.monotonic(), 0

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Count steps."""
        super().advance(task_id, advance)
        self._tell()

    def update(self, task_id: TaskID, **fields: Any) -> None:
        """Count steps, or change what is said of them."""
        super().update(task_id, **fields)
        self._tell()

    def _tell(self) -> None:
        task, now = self.tasks[TASK], time.monotonic()
        if not task.total or now - self._told < PATIENCE or int(LINES * task.completed / task.total) <= self._shares:
            return
        self._told, self._shares = now, int(LINES * task.completed / task.total)
        left = (task.elapsed or 0.0) * (task.total / task.completed - 1)
        self.console.print(
            f"{task.description}: {task.completed:,.0f} of {task.total:,.0f}, some {left:,.0f} s left",
            soft_wrap=True,
            markup=False,
            highlight=False,
        )


class TokenProgress:
    """Counts work on the error stream, if `show` is set: by a bar on a terminal, else by a line now and then."""

    def __init__(self, show: bool) -> None:
        self.console = Console(stderr=True)
        self.show = show

    @contextmanager
    def bar(self, title: str, total: int | None) -> Iterator[Progress]:
        """A bar of `total` steps; its task is `TASK`."""
        if self.show and not self.console.is_terminal:
            progress = LoggedProgress(self.console)
        else:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            progress = Progress(*columns, console=self.console, disable=not self.show)
        with _others_silent(self.show), progress:
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


@contextmanager
def _others_silent(silent: bool) -> Iterator[None]:
    """Keep transformers' own bars from being drawn into ours."""
    drawn = silent and logging.is_progress_bar_enabled()
    if drawn:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()


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
