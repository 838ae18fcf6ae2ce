import pytest
import torch
from tiny import VOCABULARY, character_tokenizer, tiny, tokens

from eigenattn import EigenAttnError
from eigenattn.calibration.windows import complete, described, load_texts, random_tokens, text_windows, written_by


def test_written_text_is_seeded_and_never_ends():
    model, beginnings = tiny("llama"), tokens(5, 1)
    first, again = (written_by(model, beginnings, 20, seed=3) for _ in range(2))
    assert first.shape == (5, 20)
    assert torch.equal(first, again)
    assert not torch.equal(first, written_by(model, beginnings, 20, seed=4))
    assert torch.equal(first[:, :1], beginnings)
    assert not (first[:, 1:] == 2).any()


def test_parts_are_mixed():
    written = torch.tensor([[1], [1], [1]])
    windows = complete([tokens(4, 10), written, tokens(2, 10, seed=5)], tiny("llama"), 10, seed=0)
    assert windows.shape == (9, 10)
    assert (windows[:, 0] == 1).sum() >= 3
    assert not (windows[4:7, 0] == 1).all()


def test_samples_are_shared_out(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghij" * 20)
    texts = load_texts([str(tmp_path / "a.txt"), "self", "none", str(tmp_path / "a.txt")])
    parts = text_windows(texts, character_tokenizer(), 13, 10, seed=0)
    assert [tuple(part.shape) for part in parts] == [(4, 10), (3, 1), (1, 10), (2, 1), (3, 10)]
    assert [described(text)["source"] for text in texts] == ["a.txt", "self", "none", "a.txt"]
    assert [described(text)["sha256"] is None for text in texts] == [False, True, True, False]


def test_random_tokens_are_ordinary():
    drawn = random_tokens(character_tokenizer(), 20, 500, seed=0)
    assert drawn.shape == (20, 500)
    assert set(drawn.unique().tolist()) == set(range(3, VOCABULARY))
    assert torch.equal(drawn, random_tokens(character_tokenizer(), 20, 500, seed=0))


def test_sequences_begin_anywhere():
    (part,) = text_windows(load_texts(["self"]), character_tokenizer(), 32, 10, seed=0)
    assert len(part.unique()) > 20


def test_nothing_to_read():
    with pytest.raises(EigenAttnError, match="no calibration text"):
        load_texts([])
