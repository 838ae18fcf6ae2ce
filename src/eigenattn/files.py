"""Files that are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import EigenAttnError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside to write to. It becomes `path` when everything is written and on the disk; else nothing is left.

    Raises:
        EigenAttnError: if it cannot be written. What `path` held before is as it was.
    """
    beside = path.with_name(f".{path.name}.partial")
    try:
        yield beside
        synchronise(beside)
        beside.replace(path)
    except OSError as error:
        raise EigenAttnError(f"{path} could not be written: {error.strerror or error}.") from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def lock(folder: Path, output: Path) -> int:
    """Keep other processes out of a folder, until the descriptor given is closed or this process ends.

    Args:
        output: what is being written there, to be named.

    Raises:
        EigenAttnError: if another process has it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise EigenAttnError(f"another process is writing {output}: wait for it, or choose another output.") from error
    return descriptor


def synchronise(path: Path) -> None:
    """Wait until a file or folder is on the disk, so that a power failure leaves it whole."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
