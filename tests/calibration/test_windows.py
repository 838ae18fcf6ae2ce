import pytest
import torch
from tiny import tiny, tokens

from eigenattn import EigenAttnError
from eigenattn.calibration.windows import complete, load_texts, text_windows, written_by


def test_written_text_is_seeded_and_never_ends():
    model = tiny("llama")
    first, again = (written_by(model, 5, 20, seed=3) for _ in range(2))
    assert first.shape == (5, 20)
    assert torch.equal(first, again)
    assert not torch.equal(first, written_by(model, 5, 20, seed=4))
    assert (first[:, 0] == 1).all()
    assert not (first == 2).any()


def test_parts_are_mixed():
    windows = complete([tokens(4, 10), 3, tokens(2, 10, seed=5)], tiny("llama"), 10, seed=0)
    assert windows.shape == (9, 10)
    assert (windows[:, 0] == 1).sum() == 3
    assert not (windows[4:7, 0] == 1).all()


def test_samples_are_shared_out(tmp_path):
    from tiny import character_tokenizer

    (tmp_path / "a.txt").write_text("abcdefghij" * 20)
    texts = load_texts([str(tmp_path / "a.txt"), "self", str(tmp_path / "a.txt")])
    parts = text_windows(texts, character_tokenizer(), 8, 10, seed=0)
    assert [part if isinstance(part, int) else len(part) for part in parts] == [3, 3, 2]


def test_nothing_to_read():
    with pytest.raises(EigenAttnError, match="no calibration text"):
        load_texts([])
