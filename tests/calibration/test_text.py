import json

import pytest
import torch
from tiny import character_tokenizer

from eigenattn import EigenAttnError, files
from eigenattn.calibration import text as text_module
from eigenattn.calibration.text import Text, draw_windows, load_text, sample_windows, tokenize


def test_python_docs_splits_are_disjoint():
    calibration, evaluation = load_text("python-docs"), load_text("python-docs", "evaluation")
    assert len(calibration.content) > 100_000
    assert len(evaluation.content) > 50_000
    paragraphs = {p for p in calibration.content.split("\n\n") if p.strip()}
    assert not paragraphs & set(evaluation.content.split("\n\n"))


def test_jsonl_and_txt(tmp_path):
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert load_text(str(tmp_path / "a.txt")).content == "plain"
    assert load_text(str(tmp_path / "a.jsonl")).content == "one\n\ntwo"
    assert load_text(str(tmp_path / "a.txt")).source == "a.txt"


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson", "a.json", "a.Json"])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_by_other_names_and_as_an_array(tmp_path, name, indent):
    rows = [{"text": "one"}, "two", {"text": "three", "id": 3}]
    lines, array = "\n".join(json.dumps(row) for row in rows), json.dumps(rows, indent=indent)
    for content in (lines, array):
        (tmp_path / name).write_text(content)
        assert load_text(str(tmp_path / name)).content == "one\n\ntwo\n\nthree"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.txt", b"  \n", "empty"),
        ("binary.txt", b"\xff\xfe\x00", "UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\nnot json\n', "line 2"),
        ("bad.jsonl", b'{"body": "a"}\n', "line 1"),
        ("bad.jsonl", b'{"text": "a"}\n\n{"text": null}\n', "line 3: expected a text"),
        ("bad.jsonl", b'{"text": "a\\ud800"}\n', "line 1: expected a text"),
        ("bad.jsonl", b"[" * 100_000, "line 1: expected JSON"),
        ("bad.jsonl", b'"\xff"', "UTF-8"),
        ("bad.json", b'[{"text": "a"},\n{"body": "b"}]', "line 1, item 2: expected a text"),
    ],
)
def test_unreadable_text(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EigenAttnError, match=says):
        load_text(str(tmp_path / name))


def test_breaks_inside_lines_and_a_byte_order_mark(tmp_path):
    """JSON Lines end with a line feed alone, and editors on Windows put a mark before a text."""
    texts = ["one\u2028two", "three\x85four", "five\x0bsix"]
    lines = "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts[:2])
    (tmp_path / "a.jsonl").write_bytes(("\ufeff" + lines).encode())
    (tmp_path / "a.txt").write_bytes(("\ufeff" + texts[2]).encode())
    assert load_text(str(tmp_path / "a.jsonl")).content == "\n\n".join(texts[:2])
    assert load_text(str(tmp_path / "a.txt")).content == texts[2]


def test_missing_text_names_the_sources():
    with pytest.raises(EigenAttnError, match="python-docs"):
        load_text("/nowhere/text.txt")


def test_tokenize_adds_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    ids = tokenize(character_tokenizer(), load_text(str(tmp_path / "a.txt")))
    assert ids.tolist() == [97, 98, 99]


def test_windows_are_seeded_and_never_repeat():
    tokens = torch.arange(1000)
    windows = sample_windows(tokens, 10, 50, seed=3)
    assert windows.shape == (10, 50)
    assert torch.equal(windows, sample_windows(tokens, 10, 50, seed=3))
    assert not torch.equal(windows, sample_windows(tokens, 10, 50, seed=4))
    assert len(windows.unique()) == 500
    assert torch.equal(windows[:, 1:] - windows[:, :-1], torch.ones(10, 49, dtype=torch.int64))


@pytest.fixture
def short_pieces(monkeypatch):
    """Texts are long from 4,000 characters on."""
    monkeypatch.setattr(text_module, "WHOLE", 4000)
    monkeypatch.setattr(text_module, "PIECE", 1000)


class Counting:
    """A tokenizer that remembers how much it was given."""

    def __init__(self):
        self.inner, self.given = character_tokenizer(), []

    def __call__(self, content, **options):
        self.given.append(content)
        return self.inner(content, **options)


def words(characters: int) -> Text:
    return Text("words", " ".join(f"{number:06}" for number in range(characters // 7)))


def test_short_texts_are_drawn_from_as_a_whole(short_pieces):
    tokenizer, text = Counting(), words(3990)
    windows = draw_windows(tokenizer, text, 5, 50, seed=3)
    assert torch.equal(windows, sample_windows(tokenize(tokenizer, text), 5, 50, seed=3))
    assert tokenizer.given == [text.content] * 2


@pytest.mark.parametrize("samples", [3, 40, 150])
def test_long_texts_are_drawn_from_in_pieces(short_pieces, samples):
    tokenizer, text = Counting(), words(20_000)
    windows = draw_windows(tokenizer, text, samples, 50, seed=3)
    assert windows.shape == (samples, 50)
    found = ["".join(map(chr, window)) for window in windows.tolist()]
    starts = [text.content.index(each) for each in found]
    assert all(abs(one - other) >= 50 for i, one in enumerate(starts) for other in starts[:i])
    assert max(starts) - min(starts) > (15_000 if samples > 3 else 0)  # from all over it
    assert max(map(len, tokenizer.given)) <= 800
    assert all(piece[:7].strip().isdigit() for piece in tokenizer.given)  # no number is cut
    assert sum(map(len, tokenizer.given)) <= max(800 * samples, 60 * samples)
    assert torch.equal(windows, draw_windows(tokenizer, text, samples, 50, seed=3))
    assert not torch.equal(windows, draw_windows(tokenizer, text, samples, 50, seed=4))


def test_long_texts_without_blanks_and_with_too_little(short_pieces):
    tokenizer = Counting()
    assert draw_windows(tokenizer, Text("a", "a" * 5000), 6, 700, seed=0).shape == (6, 700)
    with pytest.raises(EigenAttnError, match="--samples"):
        draw_windows(tokenizer, words(5000), 30, 200, seed=0)


def test_long_texts_are_tokenized_in_pieces(short_pieces):
    tokenizer, text = Counting(), words(20_000)
    assert "".join(map(chr, tokenize(tokenizer, text).tolist())) == text.content
    assert max(map(len, tokenizer.given)) <= 1000
    tokenizer.given.clear()
    assert len(tokenize(tokenizer, text, most=1500)) >= 1500
    assert len(tokenizer.given) == 2


def test_texts_that_memory_does_not_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_BYTES", 100)
    (tmp_path / "a.txt").write_text("a" * 101)
    with pytest.raises(EigenAttnError, match="101 bytes, and texts are read up to 100"):
        load_text(str(tmp_path / "a.txt"))


def test_too_short():
    with pytest.raises(EigenAttnError, match="--samples"):
        sample_windows(torch.arange(100), 3, 50, seed=0)
