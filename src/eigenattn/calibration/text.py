"""Text sources, and token windows drawn from them."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import EigenAttnError
from ..files import holds_rows, is_text, read_rows, read_text

Split = Literal["calibration", "evaluation"]
DEFAULT_SOURCE = "mixture"
# Bytes that a passage of the mixture holds at most, where its paragraphs or lines allow (chosen: some 600 tokens in any
# script, so that a window of 1,024 tokens holds passages of two files or more).
PASSAGE = 2400
# One passage in so many of each file is held out for evaluation.
HELD_OUT = 5
# What stands between passages, and between paragraphs.
BREAK = "\n\n"
# What is said, as pairs of role and content.
Conversation = tuple[tuple[str, str], ...]
# Enough for a million tokens; c4 streams for ever.
MOST_CHARACTERS = 4_000_000
# Characters that are tokenised at once (chosen: all that named sources give). Longer texts are taken in pieces, for a
# tokenizer needs some 150 bytes a character.
WHOLE, PIECE = 5_000_000, 1_000_000
# Characters of a piece that windows are drawn from, for each token of a window (chosen: some four windows).
PIECE_WINDOWS = 16


def python_docs(split: Split) -> str:
    """The language reference that ships inside CPython (`pydoc_data.topics`); a fifth of it is for evaluation."""
    from pydoc_data.topics import topics

    parts: dict[Split, list[str]] = {"calibration": [], "evaluation": []}  # by paragraph
    seen = held_out = 0
    for name in sorted(topics):
        # Topics differ much in length: each is held out if the held-out part stays within a fifth of what was seen.
        seen += len(topics[name])
        keep_out = held_out + len(topics[name]) <= seen / 5
        held_out += len(topics[name]) if keep_out else 0
        parts["evaluation" if keep_out else "calibration"] += topics[name].strip().split(BREAK)
    # Topics quote each other: what is held out leaves the calibration text wherever it stands.
    held_out_paragraphs = set(parts["evaluation"])
    parts["calibration"] = [p for p in parts["calibration"] if p not in held_out_paragraphs]
    return BREAK.join(parts[split])


@dataclass(frozen=True)
class Kind:
    """Text of one kind, in passages: what a tokenizer may read in any order."""

    name: str
    passages: tuple[str | Conversation, ...]


def mixture(split: Split) -> tuple[Kind, ...]:
    """Text of many kinds that ships inside this package; a fifth of each file is for evaluation.

    Each folder of `mixture` is a kind. Its files take turns, each as often as its share of the kind is large.

    Raises:
        EigenAttnError: if the package was installed without it.
    """
    folder = resources.files("eigenattn.calibration") / "mixture"
    if not folder.is_dir():
        raise EigenAttnError("the text `mixture` is missing from this installation of eigenattn: install it again.")
    kinds = []
    for kind in sorted(each.name for each in folder.iterdir() if each.is_dir()):
        ordered: list[tuple[float, str | Conversation]] = []
        for file in sorted((folder / kind).iterdir(), key=lambda each: each.name):
            passages = list(_passages_of(file.name, file.read_text(encoding="utf-8")))
            # Seeded by the file, so that one that is added or changed leaves the others as they are held out.
            draw = random.Random(file.name)
            draw.shuffle(passages)
            held_out = round(len(passages) / HELD_OUT)
            passages = passages[:held_out] if split == "evaluation" else passages[held_out:]
            first = draw.random()
            ordered += [((place + first) / len(passages), passage) for place, passage in enumerate(passages)]
        kinds.append(Kind(kind, tuple(passage for _, passage in sorted(ordered, key=lambda each: each[0]))))
    return tuple(kinds)


def _passages_of(name: str, content: str) -> Iterable[str | Conversation]:
    if name.endswith(".jsonl"):
        return [_conversation(json.loads(line)["messages"]) for line in content.split("\n") if line]
    return _joined(content.split(BREAK), BREAK)


def _joined(parts: Iterable[str], separator: str) -> list[str]:
    """Neighbouring parts joined to passages of up to `PASSAGE` bytes; what is longer is cut between lines."""
    passages, held = [], ""
    for part in parts:
        longer = f"{held}{separator}{part}" if held else part
        if len(longer.encode()) <= PASSAGE:
            held = longer
            continue
        passages += [held] if held else []
        held = part
        if len(part.encode()) > PASSAGE and separator != "\n":
            *whole, held = _joined(part.split("\n"), "\n")
            passages += whole
    return [*passages, held] if held.strip() else passages


def _conversation(messages: Sequence[Any]) -> Conversation:
    return tuple((message["role"], message["content"]) for message in messages)


def _hub(*dataset: str, column: str, splits: tuple[str, str], name: str) -> Callable[[Split], str]:
    def read(split: Split) -> str:
        try:
            import datasets
        except ImportError:
            raise EigenAttnError(f"text source {name!r} needs datasets: pip install 'eigenattn[data]'.") from None
        hub_split = splits[split == "evaluation"]
        try:
            rows = datasets.load_dataset(*dataset, split=hub_split, streaming=True)
            pieces, size = [], 0
            for row in rows:
                pieces.append(row[column])
                size += len(row[column])
                if size > MOST_CHARACTERS:
                    break
        except Exception as error:  # datasets raises its own, fsspec's and the network's errors
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise EigenAttnError(
                f"text source {name!r} could not be read from the hub ({first}). Offline, use --text with a file."
            ) from error
        return BREAK.join(pieces)

    return read


SOURCES: dict[str, Callable[[Split], str | tuple[Kind, ...]]] = {
    "mixture": mixture,
    "python-docs": python_docs,
    "wikitext2": _hub(
        "Salesforce/wikitext", "wikitext-2-raw-v1", column="text", splits=("train", "test"), name="wikitext2"
    ),
    "c4": _hub("allenai/c4", "en", column="text", splits=("train", "validation"), name="c4"),
    "alpaca": _hub("tatsu-lab/alpaca", column="text", splits=("train", "train"), name="alpaca"),
}


def _file(path: Path) -> str | tuple[Kind, ...]:
    if not holds_rows(path):
        return read_text(path)
    passages = [_row(place, row) for place, row in read_rows(path)]
    texts = [each for each in passages if isinstance(each, str)]
    return BREAK.join(texts) if len(texts) == len(passages) else (Kind(path.name, tuple(passages)),)


def _row(place: str, row: Any) -> str | Conversation:
    messages = row.get("messages") if isinstance(row, dict) else None
    if messages and isinstance(messages, list) and all(map(_is_message, messages)):
        return _conversation(messages)
    text: Any = row.get("text") if isinstance(row, dict) else row
    if not is_text(text):
        raise EigenAttnError(
            f"{place}: expected a text, or an object with one under `text`, or `messages` with `role` and `content`."
        )
    return text


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and is_text(value.get("role")) and is_text(value.get("content"))


@dataclass(frozen=True)
class Text:
    """A text and where it came from.

    Args:
        content: all of it, in plain characters; none of one that is made when windows are drawn.
        kinds: what it is of, if it is of several kinds or holds conversations; `content` is their passages.
    """

    source: str
    content: str
    kinds: tuple[Kind, ...] = ()

    @classmethod
    def of(cls, source: str, kinds: tuple[Kind, ...]) -> Text:
        """A text of some kinds, which take turns in it."""
        return cls(source, BREAK.join(map(_plain, _in_turn(kinds))), kinds)

    @property
    def sha256(self) -> str | None:
        """The hash of the content, by which results tell texts apart; None without one."""
        return hashlib.sha256(self.content.encode()).hexdigest() if self.content else None


def _plain(passage: str | Conversation) -> str:
    return passage if isinstance(passage, str) else "\n".join(f"{role}: {content}" for role, content in passage)


def _in_turn(kinds: Sequence[Kind]) -> Iterable[str | Conversation]:
    """The passages of all kinds, a passage of each at a time, for as long as each lasts."""
    turns = itertools.zip_longest(*(kind.passages for kind in kinds))
    return (passage for turn in turns for passage in turn if passage is not None)


def laid_out(tokenizer: Any, passage: str | Conversation) -> str:
    """A passage as the model would read it: a conversation by the tokenizer's own chat template, if it has one.

    A template may refuse a conversation, by any error of its own: many know no system message. It is read plainly then.
    """
    if isinstance(passage, str) or not getattr(tokenizer, "chat_template", None):
        return _plain(passage)
    messages = [{"role": role, "content": content} for role, content in passage]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:
        return _plain(passage)


def load_text(source: str, split: Split = "calibration") -> Text:
    """Read a named source (`SOURCES`), or a file: of text, or of JSON rows if its name ends in one of `JSON_ROWS`.

    Args:
        split: which part of a named source; a file is read whole for either.

    Raises:
        EigenAttnError: if there is no such source or file, or it is empty or not text.
    """
    if source in SOURCES:
        return _text(source, SOURCES[source](split))
    path = Path(source)
    if not os.path.exists(source):  # which a name too long does not
        raise EigenAttnError(f"text {source!r} is neither a file nor one of {', '.join(SOURCES)}.")
    text = _text(path.name, _file(path))
    if not text.content.strip():
        raise EigenAttnError(f"text {source} is empty.")
    return text


def _text(source: str, found: str | tuple[Kind, ...]) -> Text:
    return Text(source, found) if isinstance(found, str) else Text.of(source, found)


def tokenize(tokenizer: Any, text: Text, most: int | None = None) -> Tensor:
    """The token ids [N] of a text, without special tokens.

    Args:
        most: of a long text (`WHOLE`) or one of several kinds, a beginning that holds so many tokens is enough.
    """
    found: list[Tensor] = []
    for piece in _readable(tokenizer, text):
        found.append(_token_ids(tokenizer, piece))
        if most is not None and sum(map(len, found)) >= most:
            break
    return torch.cat(found)


def _readable(tokenizer: Any, text: Text) -> Iterable[str]:
    """A text piece by piece: of several kinds passage by passage."""
    if text.kinds:
        return (laid_out(tokenizer, passage) + BREAK for passage in _in_turn(text.kinds))
    return (text.content[piece] for piece in _pieces(text.content, PIECE))


def _token_ids(tokenizer: Any, content: str) -> Tensor:
    return torch.tensor(tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)


def _pieces(content: str, size: int) -> list[slice]:
    """A text in one piece, or a long one (`WHOLE`) in pieces of up to `size` characters that begin at blanks."""
    if len(content) <= WHOLE:
        return [slice(0, len(content))]
    pieces, start = [], 0
    while start < len(content):
        stop = start + size
        if stop < len(content):
            middle = start + size // 2
            blank = max(content.rfind("\n", middle, stop), content.rfind(" ", middle, stop))
            stop = blank if blank > start else stop
        pieces.append(slice(start, stop))
        start = stop
    return pieces


def draw_windows(tokenizer: Any, text: Text, samples: int, length: int, seed: int) -> Tensor:
    """Draw token windows [samples, length]: a seeded choice, without repetition, of those that tile the text.

    Of a text of several kinds each gives as many, or one more. Of a long one (`WHOLE`) it is a choice of those that
    tile some pieces of it: as many as there are samples, if that is enough, in a seeded order.

    Raises:
        EigenAttnError: if the text has fewer windows than that.
    """
    if text.kinds:
        shares = evenly(samples, len(text.kinds), first=seed)
        return torch.cat(
            [_kind_windows(tokenizer, *each, length, seed) for each in zip(text.kinds, shares, strict=True)]
        )
    pieces = _pieces(text.content, PIECE_WINDOWS * length)
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed)).tolist()
    tiles: list[Tensor] = []
    for count, place in enumerate(order, 1):
        tokens = _token_ids(tokenizer, text.content[pieces[place]])
        tiles.append(tokens if len(pieces) == 1 else tokens[: len(tokens) // length * length])
        if count >= samples and sum(map(len, tiles)) >= samples * length:
            break
    return sample_windows(torch.cat(tiles), samples, length, seed)


def _kind_windows(tokenizer: Any, kind: Kind, samples: int, length: int, seed: int) -> Tensor:
    """Windows [samples, length] that tile as many neighbouring passages as it takes, from a seeded place on.

    Neighbours are of different files, so that few windows hold much of what a kind is. The tokenizer's special tokens
    stand between them in turn: attention likes to rest on such a token, and no text holds it.
    """
    draw = torch.Generator().manual_seed(seed)
    first = int(torch.randint(len(kind.passages), (), generator=draw))
    specials = getattr(tokenizer, "all_special_ids", None) or []
    between = itertools.cycle([torch.tensor([each]) for each in specials] or [torch.empty(0, dtype=torch.long)])
    tokens = torch.empty(0, dtype=torch.long)
    for passage in (*kind.passages[first:], *kind.passages[:first]):
        if len(tokens) >= samples * length:
            break
        own = _token_ids(tokenizer, laid_out(tokenizer, passage) + BREAK)
        tokens = torch.cat([tokens, own, next(between)])
    return sample_windows(tokens[: samples * length], samples, length, seed)


def evenly(total: int, parts: int, first: int = 0) -> list[int]:
    """Shares of a number that differ by one at most; the larger ones begin with part `first` and go round."""
    return [total // parts + ((part - first) % parts < total % parts) for part in range(parts)]


def sample_windows(tokens: Tensor, samples: int, length: int, seed: int) -> Tensor:
    """Draw token windows [samples, length]: a seeded choice, without repetition, of those that tile tokens [N].

    Raises:
        EigenAttnError: if there are fewer than that.
    """
    available = len(tokens) // length
    if available < samples:
        raise EigenAttnError(
            f"the text has {len(tokens)} tokens, and {samples} samples of {length} need {samples * length}: "
            "give a longer text, or lower --samples or --length."
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:samples]
    return tokens[: available * length].view(available, length)[order]
