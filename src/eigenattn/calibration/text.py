"""Text sources, and token windows drawn from them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import EigenAttnError
from ..files import holds_rows, is_text, read_rows, read_text

Split = Literal["calibration", "evaluation"]
DEFAULT_SOURCE = "python-docs"
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
        parts["evaluation" if keep_out else "calibration"] += topics[name].strip().split("\n\n")
    # Topics quote each other: what is held out leaves the calibration text wherever it stands.
    held_out_paragraphs = set(parts["evaluation"])
    parts["calibration"] = [p for p in parts["calibration"] if p not in held_out_paragraphs]
    return "\n\n".join(parts[split])


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
        return "\n\n".join(pieces)

    return read


SOURCES: dict[str, Callable[[Split], str]] = {
    "python-docs": python_docs,
    "wikitext2": _hub(
        "Salesforce/wikitext", "wikitext-2-raw-v1", column="text", splits=("train", "test"), name="wikitext2"
    ),
    "c4": _hub("allenai/c4", "en", column="text", splits=("train", "validation"), name="c4"),
    "alpaca": _hub("tatsu-lab/alpaca", column="text", splits=("train", "train"), name="alpaca"),
}


def _file(path: Path) -> str:
    if not holds_rows(path):
        return read_text(path)
    pieces = []
    for place, row in read_rows(path):
        piece = row.get("text") if isinstance(row, dict) else row
        if not is_text(piece):
            raise EigenAttnError(f"{place}: expected a text, or an object with one under `text`.")
        pieces.append(piece)
    return "\n\n".join(pieces)


@dataclass(frozen=True)
class Text:
    """A text and where it came from."""

    source: str
    content: str

    @property
    def sha256(self) -> str:
        """The hash of the content, by which results tell texts apart."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def load_text(source: str, split: Split = "calibration") -> Text:
    """Read a named source (`SOURCES`), or a file: of text, or of JSON rows if its name ends in one of `JSON_ROWS`.

    Args:
        split: which part of a named source; a file is read whole for either.

    Raises:
        EigenAttnError: if there is no such source or file, or it is empty or not text.
    """
    if source in SOURCES:
        return Text(source, SOURCES[source](split))
    path = Path(source)
    if not os.path.exists(source):  # which a name too long does not
        raise EigenAttnError(f"text {source!r} is neither a file nor one of {', '.join(SOURCES)}.")
    content = _file(path)
    if not content.strip():
        raise EigenAttnError(f"text {source} is empty.")
    return Text(path.name, content)


def tokenize(tokenizer: Any, text: Text, most: int | None = None) -> Tensor:
    """The token ids [N] of a text, without special tokens.

    Args:
        most: of a long text (`WHOLE`), pieces from its beginning that hold so many tokens are enough.
    """
    found: list[Tensor] = []
    for piece in _pieces(text.content, PIECE):
        found.append(_token_ids(tokenizer, text.content[piece]))
        if most is not None and sum(map(len, found)) >= most:
            break
    return torch.cat(found)


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

    Of a long text (`WHOLE`) it is a choice of those that tile some pieces of it: as many as there are samples, if that
    is enough, in a seeded order.

    Raises:
        EigenAttnError: if the text has fewer windows than that.
    """
    pieces = _pieces(text.content, PIECE_WINDOWS * length)
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed)).tolist()
    tiles: list[Tensor] = []
    for count, place in enumerate(order, 1):
        tokens = _token_ids(tokenizer, text.content[pieces[place]])
        tiles.append(tokens if len(pieces) == 1 else tokens[: len(tokens) // length * length])
        if count >= samples and sum(map(len, tiles)) >= samples * length:
            break
    return sample_windows(torch.cat(tiles), samples, length, seed)


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
