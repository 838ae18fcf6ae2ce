"""Commands killed at random moments, and started again, write what they would have written."""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from unittest import mock

import pytest
from tiny import save_tiny

from eigenattn import EigenAttentionConfig, EigenAttnError
from eigenattn.cli import main
from eigenattn.compression import resuming
from eigenattn.finetuning import FinetuneConfig, training
from eigenattn.workflows.calibrate import CalibrationText, calibrate_checkpoint
from eigenattn.workflows.compress import compress_checkpoint
from eigenattn.workflows.finetune import finetune_checkpoint

# `make kills` raises it.
KILLS = int(os.environ.get("EIGENATTN_KILLS", "2"))

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:.*multi-threaded, use of fork:DeprecationWarning",
)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("workshop")
    save_tiny(folder / "base")
    (folder / "fox.txt").write_text("The quick brown fox jumps over the lazy dog; it was not amused. " * 60)
    compress(folder, folder / "compressed")
    return folder


def compress(workshop: Path, out: Path) -> None:
    compress_checkpoint(
        str(workshop / "base"),
        out,
        EigenAttentionConfig(kv_ratio=0.5, rank_multiple=2, window=8, refit=True, coded=False),
        CalibrationText([str(workshop / "fox.txt"), "self"], samples=8, length=48),
    )


def calibrate(workshop: Path, out: Path) -> None:
    texts = CalibrationText([str(workshop / "fox.txt"), "self"], samples=8, length=48)
    calibrate_checkpoint(str(workshop / "base"), out, texts, window=8)


def finetune(workshop: Path, out: Path) -> None:
    config = FinetuneConfig(steps=12, batch_size=2, validate_every=4)
    finetune_checkpoint(
        str(workshop / "compressed"), out, config, texts=[str(workshop / "fox.txt")], length=48, validation_windows=2
    )


SWEEP = "--rank-multiple 2 --window 8 --ranks sensitivity,uniform --samples 4 --length 48 --tokens 192 --copies 1"


def sweep(workshop: Path, out: Path, ratios: str = "0.75,0.5") -> None:
    text = ["--text", str(workshop / "fox.txt")]
    command("sweep", str(workshop / "base"), str(out), "--kv-ratio", ratios, *text, *SWEEP.split())


def command(*arguments: str) -> None:
    with mock.patch.object(sys, "argv", ["eigenattn", *arguments]):
        try:
            main()
        except SystemExit as ended:
            if ended.code:
                raise


def hashes(folder: Path) -> dict[str, str]:
    """Of all files, but for how long each stage of a sweep took."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "seconds.json")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def in_child(work, *arguments, errors: str = os.devnull, largest_file: int | None = None) -> int:
    """Run in a fork, which has everything imported already; gives its process id.

    Args:
        errors: where its error stream goes.
        largest_file: bytes that no file may grow past, as on a disk that is full.
    """
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        warnings.simplefilter("ignore")
        sys.stdout, sys.stderr = open(os.devnull, "w"), open(errors, "w")  # noqa: SIM115 (the process ends soon)
        os.dup2(sys.stderr.fileno(), 2)
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        work(*arguments)
        status = 0
    except SystemExit as ended:  # as the interpreter does
        status = ended.code if isinstance(ended.code, int) else 1
        print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


@pytest.fixture
def often(monkeypatch) -> None:
    """Save unfinished stages at every chance."""
    monkeypatch.setattr(resuming, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("work", [calibrate, compress, finetune, sweep])
def test_killed_at_random_moments(work, workshop, tmp_path):
    work(workshop, tmp_path / "warm")  # so that the time of the next is not that of loading code
    start = time.monotonic()
    work(workshop, tmp_path / "whole")
    duration = time.monotonic() - start
    inputs, whole = hashes(workshop / "base"), hashes(tmp_path / "whole")
    chance, killed = random.Random(0), 0
    for attempt in range(20 * KILLS):
        if killed == KILLS:
            break
        out = tmp_path / f"killed-{attempt}" / "out"
        out.parent.mkdir()
        child = in_child(work, workshop, out)
        time.sleep(chance.uniform(0, duration))
        os.kill(child, chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        _, status = os.waitpid(child, 0)
        killed += status != 0
        assert out.with_name("out.partial").exists() <= (status != 0)
        if work is sweep:
            assert finished(out).items() <= finished(tmp_path / "whole").items()
            work(workshop, out)
        elif out.exists():
            assert hashes(out) == whole
        else:
            work(workshop, out)
        assert hashes(out) == whole
        if out.with_name("out.partial").exists():  # killed between the last two steps
            with pytest.raises(EigenAttnError, match="exists already"):
                work(workshop, out)
        assert list(out.parent.iterdir()) == [out]
    assert killed == KILLS
    assert hashes(workshop / "base") == inputs


def finished(folder: Path) -> dict[str, str]:
    """A sweep's cells, which are whole whenever it is killed."""
    file = folder / "sweep.json"
    cells = json.loads(file.read_text())["cells"] if file.exists() else {}
    return {key: json.dumps(cell) for key, cell in cells.items()}


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize(("work", "longer"), [(compress, 0.1), (sweep, 0.4)])
def test_killed_again_and_again(work, longer, workshop, tmp_path):
    """Each attempt gets a little further, and none starts anew."""
    work(workshop, tmp_path / "whole")
    chance, out = random.Random(1), tmp_path / "killed"
    for attempt in range(40):
        child = in_child(work, workshop, out)
        time.sleep(chance.uniform(0, longer * (attempt + 1)))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if status == 0:
            break
    assert hashes(out) == hashes(tmp_path / "whole")


def test_two_sweeps_do_not_write_at_once(workshop, tmp_path):
    out = tmp_path / "sweep"
    child = in_child(sweep, workshop, out)
    try:
        while not out.exists() or not any(out.iterdir()):  # its first file comes long after the lock
            time.sleep(0.01)
        os.kill(child, signal.SIGSTOP)
        with pytest.raises(SystemExit, match="another process is writing"):
            sweep(workshop, out)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# What writes, with inputs in `{}`, and the largest size of a file that its disk can still take.
FULL = [
    (30_000, "compress {}/base {}/out --text {}/fox.txt --samples 4 --length 48 --rank-multiple 2 --window 8"),
    (10_000, "calibrate {}/base {}/out --text {}/fox.txt --samples 4 --length 48 --window 8"),
    (200_000, "compress {}/base {}/out --text {}/fox.txt --samples 4 --length 48 --rank-multiple 2 --window 8"),
    (10_000, "finetune {}/compressed {}/out --text {}/fox.txt --steps 2 --length 48 --validation-windows 2"),
    (15_000, "finetune {}/compressed {}/out --text {}/fox.txt --steps 2 --length 48 --validation-windows 2"),
    (1_000, f"sweep {{}}/base {{}}/out --kv-ratio 0.5 --text {{}}/fox.txt {SWEEP}"),
    (10_000, f"sweep {{}}/base {{}}/swept --kv-ratio 0.7,0.6,0.5,0.4 --text {{}}/fox.txt {SWEEP}"),
    (10_000, "spectrum {}/base {}/out --text {}/fox.txt --samples 4 --length 48"),
    (1_000, "report {}/compressed"),
    (1_000, "evaluate {}/compressed --text {}/fox.txt --tokens 96 --length 48 --save"),
    (500, "evaluate {}/compressed --text {}/fox.txt --tokens 96 --length 48 --json {}/out.json"),
]


@pytest.mark.parametrize(("size", "line"), FULL, ids=[f"{line.split()[0]}-{size}" for size, line in FULL])
def test_a_full_disk_is_one_line(workshop, tmp_path, size, line):
    """Inputs and earlier results stay, and what was finished is kept."""
    disk = tmp_path / "disk"
    shutil.copytree(workshop, disk)
    if "swept" in line:
        sweep(disk, disk / "swept", ratios="0.8")
    before, cells = hashes(disk), finished(disk / "swept")
    errors = tmp_path / "errors"
    child = in_child(command, *line.replace("{}", str(disk)).split(), errors=str(errors), largest_file=size)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    said = "".join(line for line in errors.read_text().splitlines(True) if "alone, codes lose more" not in line)
    assert said.startswith("eigenattn: ")
    assert said.count("\n") == 1
    assert "could not be written: " in said
    assert "File too large" in said
    kept = disk / "out.partial"
    assert ("is kept in" in said) == kept.exists()
    shutil.rmtree(kept, ignore_errors=True)
    found = hashes(disk)
    if cells:  # of the new ones some may be done
        assert cells.items() <= finished(disk / "swept").items()
        assert found.keys() == before.keys()
        before, found = ({k: v for k, v in each.items() if "sweep." not in k} for each in (before, found))
    assert found == before
    assert not (disk / "out").exists()
