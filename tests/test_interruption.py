"""Commands killed at random moments, and started again, write what they would have written."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import save_tiny

from eigenattn import EigenAttentionConfig
from eigenattn.compression import resuming
from eigenattn.compression.checkpoint import compress_checkpoint
from eigenattn.finetuning import FinetuneConfig, training
from eigenattn.finetuning.checkpoint import finetune_checkpoint

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
    return folder


def compress(workshop: Path, out: Path) -> None:
    compress_checkpoint(
        str(workshop / "base"),
        out,
        EigenAttentionConfig(kv_ratio=0.5, rank_multiple=2, window=8),
        texts=[str(workshop / "fox.txt"), "self"],
        samples=8,
        length=48,
        seed=0,
    )


def finetune(workshop: Path, out: Path) -> None:
    compressed = workshop / "compressed"
    if not compressed.exists():
        compress(workshop, compressed)
    config = FinetuneConfig(steps=12, batch_size=2, validate_every=4)
    finetune_checkpoint(
        str(compressed), out, config, texts=[str(workshop / "fox.txt")], length=48, validation_windows=2
    )


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def in_child(work, *arguments) -> int:
    """Run in a fork, which has everything imported already; gives its process id."""
    child = os.fork()
    if child:
        return child
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        work(*arguments)
        os._exit(0)
    except BaseException:
        os._exit(1)


@pytest.mark.parametrize("work", [compress, finetune], ids=["compress", "finetune"])
def test_killed_at_random_moments(work, workshop, tmp_path, monkeypatch):
    monkeypatch.setattr(resuming, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    work(workshop, tmp_path / "warm")  # so that the time of the next is not that of loading code
    start = time.monotonic()
    work(workshop, tmp_path / "whole")
    duration = time.monotonic() - start
    inputs = hashes(workshop / "base")
    chance, killed = random.Random(0), 0
    for attempt in range(20 * KILLS):
        if killed == KILLS:
            break
        out = tmp_path / f"killed-{attempt}"
        child = in_child(work, workshop, out)
        time.sleep(chance.uniform(0, duration))
        os.kill(child, chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        _, status = os.waitpid(child, 0)
        if status != 0:
            killed += 1
            assert not out.exists() or hashes(out) == hashes(tmp_path / "whole")
        if not out.exists():
            work(workshop, out)
        assert hashes(out) == hashes(tmp_path / "whole")
        assert not out.with_name(f"{out.name}.partial").exists() or status != 0
    assert killed == KILLS
    assert hashes(workshop / "base") == inputs


def test_killed_again_and_again(workshop, tmp_path, monkeypatch):
    """Each attempt gets a little further, and none starts anew."""
    monkeypatch.setattr(resuming, "SAVE_SECONDS", 0.0)
    compress(workshop, tmp_path / "whole")
    chance, out = random.Random(1), tmp_path / "killed"
    for attempt in range(40):
        child = in_child(compress, workshop, out)
        time.sleep(chance.uniform(0, 0.1 * (attempt + 1)))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if out.exists():
            break
    assert hashes(out) == hashes(tmp_path / "whole")


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
sys.argv = ["eigenattn", "compress", {base!r}, {out!r}, "--text", {text!r}, "--samples", "4", "--length", "48",
            "--rank-multiple", "2", "--window", "8"]
from eigenattn.cli import main
main()
"""


@pytest.mark.parametrize("size", [30_000, 200_000])
def test_a_full_disk_is_one_line(workshop, tmp_path, size):
    """Files that may not grow past a size stop at the moments, or at the weights."""
    inputs = hashes(workshop / "base")
    arguments = {"base": str(workshop / "base"), "out": str(tmp_path / "out"), "text": str(workshop / "fox.txt")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FULL.format(size=size, **arguments)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("eigenattn: ")
    assert done.stderr.count("\n") == 1
    assert "could not be written: " in done.stderr
    assert "File too large" in done.stderr
    assert not (tmp_path / "out").exists()
    assert ("is kept in" in done.stderr) == (tmp_path / "out.partial").exists() == (size > 100_000)
    assert hashes(workshop / "base") == inputs
