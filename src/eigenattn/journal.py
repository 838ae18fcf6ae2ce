"""What a long command has finished, kept beside its output: killed at any moment, it goes on from there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import EigenAttnError
from .files import check_name, lock, open_up, synchronise

COMMAND_FILE = "command.json"


class Journal:
    """Finished stages of one command, in `OUT.partial/` until `OUT` is whole.

    A stage is one safetensors file, whose metadata holds its plain values as JSON: it is there whole or not at all. A
    stage is taken up only by the command that wrote it, from the same inputs.

    Args:
        out: what the command writes; it must not exist.
        command: everything that the result depends on, as JSON values: options, versions, identities of the inputs.

    Raises:
        EigenAttnError: if `out` exists or cannot be written by that name, its journal is of another command or in use,
            or the disk cannot be written to.
    """

    def __init__(self, out: Path, command: Mapping[str, Any]) -> None:
        check_name(out, ".partial")
        self.out = out
        self.folder = out.with_name(f"{out.name}.partial")
        # As JSON gives it back: tuples are lists, keys are strings.
        self.command: dict[str, Any] = json.loads(json.dumps(command))
        if out.exists() and self._is_spent():
            self.discard()  # killed after the result was whole, before the journal was gone
        check_new(out)
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.folder, out)
        try:
            self._take_up()
        except BaseException:
            os.close(self._lock)
            raise

    def _take_up(self) -> None:
        """See whose the folder is."""
        stored = self._stored_command()
        if stored is None:
            self._replace(COMMAND_FILE, lambda path: path.write_text(json.dumps(self.command, indent=2) + "\n"))
        elif stored != self.command:
            names = sorted(n for n in {*stored, *self.command} if stored.get(n) != self.command.get(n))
            raise EigenAttnError(
                f"{self.folder} was left by a command that differs in {', '.join(names)}: repeat that command to go on "
                "with it, remove the folder, or choose another output."
            )

    def _is_spent(self) -> bool:
        """Whether what is left is of this command, or of one that was killed when all but the folder was gone."""
        stored = self._stored_command()
        return stored == self.command if stored else self.folder.is_dir() and not any(self.folder.iterdir())

    def _stored_command(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.folder / COMMAND_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise EigenAttnError(f"{self.folder / COMMAND_FILE} could not be read: remove {self.folder}.") from error

    def read(self, stage: str) -> tuple[dict[str, Tensor], Any] | None:
        """Tensors and values of a finished stage, or None.

        Raises:
            EigenAttnError: if its file is damaged.
        """
        path = self.folder / f"{stage}.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                values = json.loads(file.metadata()["values"])
                return {name: file.get_tensor(name) for name in file.keys()}, values  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
            raise EigenAttnError(f"{path} could not be read: remove {self.folder} to start anew.") from error

    def write(self, stage: str, tensors: Mapping[str, Tensor], values: Any = None) -> None:
        """Keep a stage, in place of what it held before.

        Raises:
            EigenAttnError: if the disk is full or cannot be written to; earlier stages stay.
        """
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"values": json.dumps(values)}
        self._replace(f"{stage}.safetensors", lambda path: save_file(stored, path, metadata=metadata))

    def _replace(self, name: str, write: Any) -> None:
        beside = self.folder / f"{name}.new"
        with self._writing():
            try:
                write(beside)
                synchronise(beside)
                beside.replace(self.folder / name)
                synchronise(self.folder)
            finally:
                beside.unlink(missing_ok=True)

    @contextmanager
    def output(self) -> Iterator[Path]:
        """A folder to write the result to. It becomes `out` when everything in it is written, and the journal goes.

        Raises:
            EigenAttnError: if it cannot be written; the finished stages stay then.
        """
        result = self.folder / "result"
        shutil.rmtree(result, ignore_errors=True)
        try:
            with self._writing():
                result.mkdir()
                yield result
                open_up(result)
                for path in result.rglob("*"):
                    synchronise(path)
                result.rename(self.out)
                synchronise(self.out.parent)
        finally:
            shutil.rmtree(result, ignore_errors=True)
        self.discard()

    def discard(self) -> None:
        """Forget all stages. The command goes last, so that the rest is known as its own when this is killed."""
        with suppress(OSError):
            for path in self.folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name != COMMAND_FILE:
                    path.unlink()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the lock. A journal without stages is removed."""
        if not any(self.folder.glob("*.safetensors")):
            self.discard()
        os.close(self._lock)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
            kept = f" What was finished is kept in {self.folder}." if any(self.folder.glob("*.safetensors")) else ""
            raise EigenAttnError(f"{self.out} could not be written: {reason}.{kept}") from error


def check_new(path: Path) -> None:
    """Raise an `EigenAttnError` if the path exists."""
    if path.exists():
        raise EigenAttnError(f"{path} exists already: choose another output, or remove it.")


def identity(folder: str, file: str | None = None) -> list[Any] | str:
    """What tells one state of a model on disk from another: names, sizes and times of its files.

    Args:
        folder: a folder, or a hub id, which stands for itself.
        file: one file in the folder, where the model is a single file.
    """
    path = Path(folder)
    if not path.is_dir():
        return folder
    paths = (
        [path / file] if file else sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".json", ".bin"))
    )
    return [[each.name, each.stat().st_size, each.stat().st_mtime_ns] for each in paths]
