"""Files that are there whole or not at all, whatever happens while they are written; and text that is read as it is."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import EigenAttnError

# What file systems answer to a call that they do not have: network ones, and some of containers.
MISSING = frozenset((errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EBADF))
# What JSON has between values; other breaks, such as U+2028, may stand inside its strings.
BLANK = re.compile(r"[ \t\r\n]*")
# Of a text (chosen): it is in memory as a whole.
MOST_BYTES = 2**30
# Bytes of a name on the file systems in use, Linux's, Windows's and Apple's.
LONGEST_NAME = 255
JSON_ROWS = (".jsonl", ".ndjson", ".json")
SURROGATE = re.compile(r"[\ud800-\udfff]")


def read_text(path: Path) -> str:
    """The text in a file, without the byte order mark that some editors put before it.

    Raises:
        EigenAttnError: if it cannot be read, is larger than `MOST_BYTES`, or is not UTF-8 text.
    """
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise EigenAttnError(
                f"{path} has {size:,} bytes, and texts are read up to {MOST_BYTES:,}: give a part of it."
            )
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise EigenAttnError(f"{path} could not be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise EigenAttnError(f"{path} is not UTF-8 text (byte {error.start}).") from error
    if "\0" in content:
        raise EigenAttnError(f"{path} is not text: it holds zero bytes.")
    return content


def holds_rows(path: Path) -> bool:
    """Whether a file's name says that it holds JSON: one value a line, or an array of them."""
    return path.suffix.lower() in JSON_ROWS


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The values in a file of JSON, one at a time, each with the place where it stands.

    They lie one behind the other, as in JSON Lines; of an array each item is one.

    Raises:
        EigenAttnError: from the iterator, if the file cannot be read or is not JSON.
    """
    content, decoder = read_text(path), json.JSONDecoder()
    end, line, counted = 0, 1, 0
    while (blank := BLANK.match(content, end)) and (start := blank.end()) < len(content):  # it matches nothing, too
        line, counted = line + content.count("\n", counted, start), start
        place = f"{path}, line {line}"
        try:
            value, end = decoder.raw_decode(content, start)
        except (ValueError, RecursionError):
            raise EigenAttnError(f"{place}: expected JSON.") from None
        if isinstance(value, list):
            yield from ((f"{place}, item {number}", item) for number, item in enumerate(value, 1))
        else:
            yield place, value


def is_text(value: Any) -> bool:
    """Whether a value is a string of whole characters: JSON and command lines may hold halves, which UTF-8 does not."""
    return isinstance(value, str) and not SURROGATE.search(value)


def check_name(path: Path, suffix: str = "") -> None:
    """Raise an `EigenAttnError` if no file, or none with this suffix behind its name, can be called that.

    Args:
        suffix: what is put behind the name of something to be written; without one the root will do, and `.`.
    """
    if suffix and not path.name:
        raise EigenAttnError(f"{path} is no name of something to be written: choose another output.")
    if not is_text(str(path)):
        raise EigenAttnError(f"the name {str(path)!r} is not UTF-8 text.")
    for part in (*path.parts[:-1], path.name + suffix):
        if len(part.encode()) > LONGEST_NAME:
            raise EigenAttnError(f"the name {part:.40}... is too long for a file: {len(part.encode())} bytes.")


def to_json(value: Any, indent: int | None = None) -> str:
    """A result as text, with null for NaN and infinities: JSON has no such numbers."""
    return json.dumps(_numbers(value), indent=indent, allow_nan=False) + "\n"


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _numbers(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_numbers(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside to write to. It becomes `path` when everything is written and on the disk; else nothing is left.

    Raises:
        EigenAttnError: if it cannot be written. What `path` held before is as it was.
    """
    check_name(path, "..partial")
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


def read_results(file: Path, what: str, version: int) -> dict[str, Any]:
    """What a command has written as JSON.

    Args:
        what: it is called, where there is none.

    Raises:
        EigenAttnError: if it cannot be read, or is of another version.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EigenAttnError(f"{file.parent} holds no {what}: it has no readable {file.name}.") from error
    if not isinstance(values, dict) or values.get("version") != version:
        raise EigenAttnError(f"{file} is of another version: install the eigenattn that wrote it.")
    return values


def lock(folder: Path, output: Path) -> int:
    """Keep other processes out of a folder, until the descriptor given is closed or this process ends.

    Where folders cannot be locked (some network file systems) it warns, and nobody is kept out. On Windows it keeps out
    processes of the same user on the same machine.

    Args:
        output: what is being written there, to be named.

    Raises:
        EigenAttnError: if another process has it.
        OSError: if the folder cannot be opened.
    """
    descriptor = _openable(folder)
    try:
        _seize(descriptor)
    except (BlockingIOError, PermissionError) as error:
        os.close(descriptor)
        raise EigenAttnError(f"another process is writing {output}: wait for it, or choose another output.") from error
    except (OSError, ImportError) as error:
        reason = getattr(error, "strerror", None) or error
        warnings.warn(f"{folder} cannot be locked ({reason}): let no other process write {output}.", stacklevel=2)
    return descriptor


def _openable(folder: Path) -> int:
    """A descriptor of the folder, or, as Windows opens no folders, of a temporary file that stands for it."""
    if sys.platform == "win32":
        name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()
        return os.open(Path(tempfile.gettempdir()) / f"eigenattn-{name}.lock", os.O_RDWR | os.O_CREAT)
    return os.open(folder, os.O_RDONLY)


def _seize(descriptor: int) -> None:
    """Lock it without waiting: `BlockingIOError`, or `PermissionError` on Windows, if another process has."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def synchronise(path: Path) -> None:
    """Wait until a file or folder is on the disk, so that a power failure leaves it whole.

    Where the file system cannot wait for it, nor can we. Windows has no call for folders.
    """
    if sys.platform == "win32":
        if path.is_dir():
            return
        descriptor = os.open(path, os.O_RDWR)  # it synchronises only what could be written to
    else:
        descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in MISSING:
            raise
    finally:
        os.close(descriptor)


def open_up(folder: Path) -> None:
    """Let whoever may read a folder that was made here read the files in it, too.

    safetensors writes files that only their owner may read, whatever the umask.
    """
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(path.stat().st_mode | mode)
