import errno
import os

import pytest
import torch

from eigenattn import EigenAttnError, journal
from eigenattn.journal import Journal, identity

COMMAND = {"verb": "compress", "options": (1, 2.5, None)}


def test_stages_outlive_the_process(tmp_path):
    exact = {"moments": torch.rand(3, 4, dtype=torch.float64), "counts": torch.arange(4)}
    with Journal(tmp_path / "out", COMMAND) as first:
        assert first.read("statistics") is None
        first.write("statistics", exact, {"tokens": 12})
        first.write("statistics", exact, {"tokens": 13})
    with Journal(tmp_path / "out", COMMAND) as second:
        tensors, values = second.read("statistics")
        assert values == {"tokens": 13}
        assert all(torch.equal(tensors[name], value) for name, value in exact.items())
        with second.output() as folder:
            (folder / "model").write_text("whole")
            assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "model"]


def test_a_journal_without_stages_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), Journal(tmp_path / "out", COMMAND):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_result_that_fails_leaves_the_stages(tmp_path):
    with pytest.raises(KeyboardInterrupt), Journal(tmp_path / "out", COMMAND) as kept:
        kept.write("ranks", {}, [1, 2])
        with kept.output() as folder:
            (folder / "model").write_text("half")
            raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "command.json",
        "out.partial",
        "ranks.safetensors",
    ]
    with Journal(tmp_path / "out", COMMAND) as again:
        assert again.read("ranks") == ({}, [1, 2])


def test_another_command_is_told_what_differs(tmp_path):
    with Journal(tmp_path / "out", COMMAND) as kept:
        kept.write("ranks", {})
    with pytest.raises(EigenAttnError, match=r"differs in options: .*remove the folder"):
        Journal(tmp_path / "out", {**COMMAND, "options": 3})


def test_two_processes_do_not_write_at_once(tmp_path):
    with Journal(tmp_path / "out", COMMAND), pytest.raises(EigenAttnError, match="another process"):
        Journal(tmp_path / "out", COMMAND)


def test_an_output_that_exists(tmp_path):
    with Journal(tmp_path / "out", COMMAND) as kept:
        kept.write("ranks", {})
    (tmp_path / "out").mkdir()
    with pytest.raises(EigenAttnError, match="exists already"):
        Journal(tmp_path / "out", {"another": 1})
    assert (tmp_path / "out.partial").exists()
    with pytest.raises(EigenAttnError, match="exists already"):
        Journal(tmp_path / "out", COMMAND)  # finished, and killed before the journal was gone
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("steps", range(6))
def test_killed_while_the_journal_goes(steps, tmp_path, monkeypatch):
    """After any number of files of a finished command's journal are gone, the next call removes the rest."""
    left = [steps]

    def killed_after(remove):
        def step(*arguments, **options):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            remove(*arguments, **options)

        return step

    with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt), Journal(tmp_path / "out", COMMAND) as kept:
        for stage in ("statistics", "ranks"):
            kept.write(stage, {})
        (kept.folder / "offload").mkdir()
        (kept.folder / "offload" / "weights").touch()
        (tmp_path / "out").mkdir()
        for name in ("unlink", "rmdir"):
            patches.setattr(os, name, killed_after(getattr(os, name)))
        kept.discard()
    assert (tmp_path / "out.partial").exists()
    with pytest.raises(EigenAttnError, match="exists already"):
        Journal(tmp_path / "out", COMMAND)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_another_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes").write_text("mine")
    with pytest.raises(EigenAttnError, match="exists already"):
        Journal(tmp_path / "out", COMMAND)
    assert (tmp_path / "out.partial" / "notes").exists()


@pytest.mark.parametrize("damage", [b"", b"\xff" * 40])
def test_damage_is_named(tmp_path, damage):
    with Journal(tmp_path / "out", COMMAND) as kept:
        kept.write("ranks", {})
        (kept.folder / "ranks.safetensors").write_bytes(damage)
        with pytest.raises(EigenAttnError, match="to start anew"):
            kept.read("ranks")
    (tmp_path / "out.partial" / "command.json").write_bytes(damage)
    with pytest.raises(EigenAttnError, match=r"command\.json could not be read"):
        Journal(tmp_path / "out", COMMAND)


def test_a_full_disk_keeps_what_was_finished(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Journal(tmp_path / "out", COMMAND) as kept:
        kept.write("statistics", {"x": torch.ones(2)}, 1)
        monkeypatch.setattr(journal, "save_file", full)
        with pytest.raises(EigenAttnError, match=r"No space left.*kept in .*out\.partial") as error:
            kept.write("statistics", {"x": torch.zeros(2)}, 2)
        assert "\n" not in str(error.value)
        assert kept.read("statistics")[1] == 1
    with pytest.raises(EigenAttnError, match="could not be written: Not a directory"):
        (tmp_path / "file").touch()
        Journal(tmp_path / "file" / "out", COMMAND)


def test_identity_of_a_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("weights")
    (tmp_path / "README.md").write_text("words")
    before = identity(str(tmp_path))
    assert [name for name, _, _ in before] == ["config.json", "model.safetensors"]
    assert identity(str(tmp_path), "config.json") == before[:1]
    (tmp_path / "model.safetensors").write_text("other weights")
    assert identity(str(tmp_path)) != before
    assert identity("nobody/nothing") == "nobody/nothing"
