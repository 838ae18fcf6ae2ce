import errno
import fcntl
import os
import stat
import subprocess
import sys
import types

import pytest
import torch
from safetensors.torch import save_file
from tiny import save_tiny, tiny, tokens

from eigenattn import EigenAttentionConfig, EigenAttnError, compress
from eigenattn.files import lock, synchronise, whole
from eigenattn.journal import Journal
from eigenattn.resources import peak_memory


def test_a_file_appears_when_it_is_written(tmp_path):
    target = tmp_path / "report.html"
    target.write_text("before")
    with whole(target) as beside:
        beside.write_text("after")
        assert target.read_text() == "before"
    assert target.read_text() == "after"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_fails_leaves_what_was_there(tmp_path, error):
    target = tmp_path / "report.html"
    target.write_text("before")
    with pytest.raises(error), whole(target) as beside:
        beside.write_text("half")
        raise error
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


def test_what_cannot_be_written_is_one_line(tmp_path):
    with (
        pytest.raises(EigenAttnError, match="report could not be written: No space") as caught,
        whole(tmp_path / "report"),
    ):
        raise OSError(28, "No space left on device")
    assert "\n" not in str(caught.value)
    (tmp_path / "file").touch()
    with pytest.raises(EigenAttnError, match="Not a directory"), whole(tmp_path / "file" / "report") as beside:
        beside.write_text("nowhere")


def answers(code: int):
    """A call to the system that fails so."""

    def call(*arguments):
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EBADF, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch, code):
    monkeypatch.setattr(fcntl, "flock", answers(code))
    with pytest.warns(UserWarning, match=r"out\.partial cannot be locked .*let no other process write .*out\."):
        kept = Journal(tmp_path / "out", {})
    with kept, kept.output() as folder:
        (folder / "model").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "model"]


@pytest.mark.parametrize("code", [errno.EWOULDBLOCK, errno.EACCES], ids=errno.errorcode.get)
def test_a_lock_that_another_has_is_refused(tmp_path, monkeypatch, code):
    monkeypatch.setattr(fcntl, "flock", answers(code))
    with pytest.raises(EigenAttnError, match=r"another process is writing .*/out:"):
        lock(tmp_path, tmp_path.with_name("out"))


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_file_system_that_cannot_synchronise_is_written_to(tmp_path, monkeypatch, code):
    monkeypatch.setattr(os, "fsync", answers(code))
    with whole(tmp_path / "report") as beside:
        beside.write_text("whole")
    with Journal(tmp_path / "out", {}) as kept, kept.output() as folder:
        (folder / "model").touch()
    assert {path.name for path in tmp_path.rglob("*")} == {"report", "out", "model"}


def test_a_disk_that_fails_while_it_synchronises_is_not_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", answers(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        synchronise(tmp_path)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_weights_are_read_by_whom_the_umask_lets(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with Journal(tmp_path / "out", {}) as kept, kept.output() as folder:
            (folder / "part").mkdir()
            for path in (folder / "model.safetensors", folder / "part" / "model.safetensors"):
                save_file({"weight": torch.zeros(1)}, path)
    finally:
        os.umask(before)
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert [stat.S_IMODE(path.stat().st_mode) for path in written] == [mode, mode]


def test_locks_of_windows(tmp_path, monkeypatch):
    """Windows opens no folders, locks bytes of files, and answers EACCES where another process has them."""
    held = []

    def locking(descriptor, mode, count):
        key = os.fstat(descriptor).st_ino
        if key in held:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        held.append(key)

    def open_file(path, flags, *arguments):
        assert not os.path.isdir(path)
        return opening(path, flags, *arguments)

    opening = os.open
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    (tmp_path / "out").mkdir()
    (tmp_path / "other").mkdir()
    descriptors = [lock(tmp_path / "out", tmp_path / "out"), lock(tmp_path / "other", tmp_path / "other")]
    with pytest.raises(EigenAttnError, match="another process is writing"):
        lock(tmp_path / "temporary" / ".." / "out", tmp_path / "out")
    synchronise(tmp_path)
    for descriptor in descriptors:
        os.close(descriptor)
    assert not any((tmp_path / "out").iterdir())


# As on Windows, which has neither module; psutil knows the platform, and takes what it finds there.
ELSEWHERE = """
import psutil, sys
sys.modules["fcntl"] = sys.modules["resource"] = None
import eigenattn, pathlib, torch, transformers, warnings
from eigenattn.workflows.calibrate import CalibrationText
from eigenattn.workflows.compress import compress_checkpoint
model = transformers.AutoModelForCausalLM.from_pretrained("compressed")
torch.save(model(torch.load("ids")).logits, "logits")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    config = eigenattn.EigenAttentionConfig(kv_ratio=0.5, rank_multiple=2, window=8, ranks="uniform")
    report = compress_checkpoint("base", pathlib.Path("out"), config, CalibrationText(["fox.txt"], 2, 48, 0))
assert any("out.partial cannot be locked" in str(each.message) for each in caught)
assert report.peak_memory_bytes > 2**20
"""


def test_a_platform_without_fcntl_and_resource(tmp_path, monkeypatch):
    save_tiny(tmp_path / "base")
    (tmp_path / "fox.txt").write_text("The quick brown fox jumps over the lazy dog; it was not amused. " * 20)
    model, ids = tiny("llama"), tokens(2, 40)
    compress(model, [ids], EigenAttentionConfig(kv_ratio=0.5, rank_multiple=2, window=8, ranks="uniform"))
    model.save_pretrained(tmp_path / "compressed")
    torch.save(ids, tmp_path / "ids")
    subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=tmp_path, check=True)
    assert torch.equal(torch.load(tmp_path / "logits"), model(ids).logits)
    assert (tmp_path / "out" / "config.json").exists()


def test_memory_of_this_process_where_only_what_is_held_is_told(monkeypatch):
    told = peak_memory(torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "resource", None)
    assert 2**20 < peak_memory(torch.device("cpu")) <= 1.1 * told
