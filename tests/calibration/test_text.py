import json
import re
from importlib import resources

import pytest
import torch
from tiny import character_tokenizer

from eigenattn import EigenAttnError, files
from eigenattn.calibration import text as text_module
from eigenattn.calibration.text import Kind, Text, draw_windows, laid_out, load_text, sample_windows, tokenize

MIXTURE = resources.files("eigenattn.calibration") / "mixture"


def test_python_docs_splits_are_disjoint():
    calibration, evaluation = load_text("python-docs"), load_text("python-docs", "evaluation")
    assert len(calibration.content) > 100_000
    assert len(evaluation.content) > 50_000
    paragraphs = {p for p in calibration.content.split("\n\n") if p.strip()}
    assert not paragraphs & set(evaluation.content.split("\n\n"))


def test_mixture_holds_a_fifth_of_every_kind_out():
    calibration, evaluation = load_text("mixture"), load_text("mixture", "evaluation")
    assert [kind.name for kind in calibration.kinds] == [kind.name for kind in evaluation.kinds]
    for kept, held_out in zip(calibration.kinds, evaluation.kinds, strict=True):
        assert not set(kept.passages) & set(held_out.passages)
        size, all_of_it = (
            sum(len(str(p)) for p in each) for each in (held_out.passages, kept.passages + held_out.passages)
        )
        assert 0.1 < size / all_of_it < 0.3
    # Paragraphs of some length are in one place only; instructions to assistants are repeated.
    paragraphs = [
        {
            p
            for kind in text.kinds
            for each in kind.passages
            if isinstance(each, str)
            for p in each.split("\n\n")
            if len(p) > 60
        }
        for text in (calibration, evaluation)
    ]
    assert not paragraphs[0] & paragraphs[1]
    assert load_text("mixture").sha256 == calibration.sha256 != evaluation.sha256


def test_mixture_is_small_and_its_origins_are_listed():
    kinds = [kind for kind in MIXTURE.iterdir() if kind.is_dir()]
    assert sum(len(file.read_bytes()) for kind in kinds for file in kind.iterdir()) < 1_400_000
    origins = (MIXTURE / "ORIGINS.md").read_text(encoding="utf-8")
    for kind in kinds:
        listed = re.split(r"^## ", origins, flags=re.MULTILINE)
        (section,) = (each for each in listed if each.startswith(kind.name + "\n"))
        # The section of languages lists literature alone; all have the rest.
        assert kind.name == "languages" or all(file.name in section for file in kind.iterdir())


def test_windows_of_the_mixture_are_shared_out_over_kinds():
    text, tokenizer = load_text("mixture"), character_tokenizer()
    windows = draw_windows(tokenizer, text, 9, 700, seed=0)
    assert windows.shape == (9, 700)
    assert torch.equal(windows, draw_windows(tokenizer, text, 9, 700, seed=0))
    assert not torch.equal(windows, draw_windows(tokenizer, text, 9, 700, seed=1))
    held = [tokenize(tokenizer, Text.of("", (kind,))).tolist() for kind in text.kinds]
    shares, special = [0] * len(held), set(tokenizer.all_special_ids)
    assert special & set(windows.flatten().tolist())  # they stand between passages
    held = [[token for token in tokens if token not in special] for tokens in held]
    for window in windows.tolist():
        plain = [token for token in window if token not in special]
        (kind,) = (i for i, tokens in enumerate(held) if holds(tokens + tokens, plain))
        shares[kind] += 1
    assert sorted(shares) == [1, 1, 1, 1, 1, 2, 2]


def holds(tokens: list[int], window: list[int]) -> bool:
    """Whether one stands in the other, as characters."""
    return "".join(map(chr, window)) in "".join(map(chr, tokens))


def test_the_beginning_of_the_mixture_is_of_all_kinds():
    text = load_text("mixture", "evaluation")
    first = "".join(map(chr, tokenize(character_tokenizer(), text, most=20_000).tolist()))
    assert len(first) < 30_000
    assert all(
        str(kind.passages[0])[2:] in first
        for kind in text.kinds
        if str(kind.passages[0]).isascii() and isinstance(kind.passages[0], str)
    )


def test_mixture_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr(text_module.resources, "files", lambda package: tmp_path)
    with pytest.raises(EigenAttnError, match="install it again"):
        load_text("mixture")


MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


def test_conversations_in_files(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": MESSAGES}) + "\n" + json.dumps({"text": "plain"}))
    text, tokenizer = load_text(str(tmp_path / "a.jsonl")), character_tokenizer()
    assert text.content == "user: Hello\nassistant: Hi\n\nplain"
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert "".join(map(chr, tokenize(tokenizer, text).tolist())) == "<user>Hello<assistant>Hi\n\nplain\n\n"
    assert draw_windows(tokenizer, text, 2, 10, seed=0).shape == (2, 10)
    with pytest.raises(EigenAttnError, match="--samples"):
        draw_windows(tokenizer, text, 4, 10, seed=0)
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    assert laid_out(tokenizer, text.kinds[0].passages[0]) == "user: Hello\nassistant: Hi"


def test_kinds_take_turns():
    text = Text.of("", (Kind("a", ("1", "2", "3")), Kind("b", ("x",))))
    assert text.content == "1\n\nx\n\n2\n\n3"


def test_long_lines_and_paragraphs_are_cut_into_passages():
    lines = [f"{number:06}" for number in range(1000)]
    passages = text_module._joined(["short", "\n".join(lines), "end"], "\n\n")
    assert max(map(len, passages)) <= text_module.PASSAGE
    assert "\n".join(passages).replace("\n\n", "\n").split("\n") == ["short", *lines, "end"]


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
        ("bad.jsonl", b'{"messages": [{"role": "user"}]}\n', "line 1: expected a text"),
        ("bad.jsonl", b'{"messages": []}\n', "line 1: expected a text"),
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
