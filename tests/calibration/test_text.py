import json

import pytest
import torch
from tiny import character_tokenizer

from eigenattn import EigenAttnError
from eigenattn.calibration.text import load_text, sample_windows, tokenize


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


def test_too_short():
    with pytest.raises(EigenAttnError, match="--samples"):
        sample_windows(torch.arange(100), 3, 50, seed=0)
