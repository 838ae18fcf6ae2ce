"""Statistics in files: sums of different texts, runs and machines, which add up."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file

from ..config import EigenAttentionConfig, Sharing
from ..errors import EigenAttnError
from ..files import is_text
from ..models.attention import EigenAttention
from ..models.checked_files import read_into, read_object
from ..models.fingerprint import alike, fingerprint_of
from .fisher_moments import FisherMoments
from .statistics import named_tensors

VERSION = 1
FACTS_FILE = "eigenattn_statistics.json"
TENSORS_FILE = "eigenattn_statistics.safetensors"
# The least that numbers may be which a folder has to state.
NUMBERS = {"window": 0, "tokens": 1, "samples": 1, "length": 2, "seed": 0}
# What a checkpoint keeps of the statistics that it is made of.
DRAWN = ("text", "samples", "length", "seed", "tokens")


class Statistics(NamedTuple):
    """Moments of all layers of a model, and the fingerprint by which it is known again."""

    moments: list[FisherMoments]
    fingerprint: str

    @classmethod
    def of(cls, layers: Sequence[EigenAttention], moments: list[FisherMoments]) -> Statistics:
        """The moments of a model's layers, which are at full rank."""
        return cls(moments, fingerprint_of(layers))

    def save(self, folder: Path, provenance: Mapping[str, Any]) -> dict[str, Any]:
        """Write them to a folder that exists.

        Args:
            provenance: facts to keep beside them: `text`, as `eigenattn.calibration.windows.described` gives each, and
                `samples`, `length` and `seed` of the draw, by which a text that comes twice is known. The rest is free.

        Returns:
            What the folder says of them.
        """
        tensors = {name: each.detach().cpu().contiguous() for name, each in named_tensors(self.moments).items()}
        save_file(tensors, folder / TENSORS_FILE)
        first = self.moments[0]
        facts = {
            **provenance,
            "version": VERSION,
            "window": first.window,
            "share": str(first.sharing),
            "tokens": first.tokens,
            "base_model_weights": self.fingerprint,
            "sha256": _sha256(folder / TENSORS_FILE),
        }
        (folder / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        return facts


@dataclass(frozen=True)
class StatisticsFile:
    """A folder that `Statistics.save` wrote. Sums are read only once it is known what model they are for."""

    folder: Path
    facts: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> StatisticsFile:
        """Read what it says of itself.

        Raises:
            EigenAttnError: if it holds no statistics, or they are damaged or of another version.
        """
        folder = Path(folder)
        for name in (FACTS_FILE, TENSORS_FILE):
            if not (folder / name).is_file():
                raise EigenAttnError(f"{folder} has no {name}: give a folder that `eigenattn calibrate` wrote.")
        facts = read_object(folder / FACTS_FILE, "description of statistics")
        if facts.get("version") != VERSION:
            raise EigenAttnError(f"{folder} holds statistics of another version: install the eigenattn that wrote it.")
        wrong = [name for name, least in NUMBERS.items() if not _whole(facts.get(name), least)]
        wrong += [] if _are_texts(facts.get("text")) else ["text"]
        if wrong:
            raise EigenAttnError(f"{folder / FACTS_FILE} is damaged: it does not state its {wrong[0]}.")
        Sharing.of(facts.get("share", ""))  # raises if it is not in the notation
        return cls(folder, facts)

    @property
    def latents(self) -> dict[str, Any]:
        """What a configuration has to agree with."""
        return {"window": self.facts["window"], "share": self.facts["share"]}

    @property
    def sources(self) -> list[str]:
        """Where the texts read came from."""
        return [each["source"] for each in self.facts["text"]]

    @property
    def draws(self) -> set[tuple[str, int]]:
        """The texts read, each with the seed of its draw."""
        return {(each["sha256"] or each["source"], self.facts["seed"]) for each in self.facts["text"]}

    def provenance(self) -> dict[str, Any]:
        """What a checkpoint says of them."""
        return {name: self.facts[name] for name in DRAWN}

    def moments(self, layers: Sequence[EigenAttention]) -> list[FisherMoments]:
        """The sums of each of a model's layers, which are at full rank.

        Raises:
            EigenAttnError: if they are of another model, or damaged.
        """
        if not alike(self.facts.get("base_model_weights"), fingerprint_of(layers)):
            raise EigenAttnError(
                f"the statistics in {self.folder} are of another model, whose weights differ: calibrate this one."
            )
        if _sha256(self.folder / TENSORS_FILE) != self.facts.get("sha256"):
            raise EigenAttnError(f"{self.folder / TENSORS_FILE} is damaged: its SHA-256 is not the one it was given.")
        sharing = Sharing.of(self.facts["share"])
        moments = [FisherMoments.of(attention, self.facts["window"], sharing) for attention in layers]
        read_into(named_tensors(moments), self.folder / TENSORS_FILE, "statistics")
        for each in moments:
            each.tokens = self.facts["tokens"]
        return moments


def open_statistics(folders: Iterable[str | Path]) -> list[StatisticsFile]:
    """Folders of statistics that go together.

    Raises:
        EigenAttnError: if one cannot be read, they differ in what they are of, or a text is in two of them.
    """
    files = [StatisticsFile.open(folder) for folder in folders]
    for place, file in enumerate(files):
        for other in files[:place]:
            for name, value in file.latents.items():
                if value != other.latents[name]:
                    raise EigenAttnError(
                        f"{other.folder} and {file.folder} do not add up: they are of {name} {other.latents[name]} and "
                        f"{value}."
                    )
            if both := sorted(file.draws & other.draws):
                text, seed = both[0]
                raise EigenAttnError(
                    f"{other.folder} and {file.folder} are both of the text {text:.12}, drawn with seed {seed}: leave "
                    "out one, or calibrate with another --seed."
                )
    return files


def check_fit(files: Sequence[StatisticsFile], config: EigenAttentionConfig) -> None:
    """Raise an `EigenAttnError` if a configuration asks for what statistics do not hold; None asks for nothing."""
    if config.basis != "fisher" or not config.coded or config.refit:
        raise EigenAttnError(
            "statistics are for coded latents (a KV ratio of at most 0.5) of the fisher basis, without refit: leave "
            "out what asks for others, or give a text."
        )
    for file in files:
        for name, value in file.latents.items():
            if getattr(config, name) not in (value, None):
                raise EigenAttnError(
                    f"the statistics in {file.folder} are of {name} {value}, not {getattr(config, name)}: leave that "
                    "out, or calibrate again."
                )


def merged(files: Sequence[StatisticsFile], layers: Sequence[EigenAttention]) -> list[FisherMoments]:
    """The sums of some files, one or more, together.

    Raises:
        EigenAttnError: if some are of another model, or damaged.
    """
    found = files[0].moments(layers)
    for file in files[1:]:
        for own, others in zip(found, file.moments(layers), strict=True):
            own.merge(others)
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _whole(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _are_texts(value: Any) -> bool:
    """Whether a value is what `eigenattn.calibration.windows.described` gives, for some texts."""
    return isinstance(value, list) and all(
        isinstance(each, dict)
        and is_text(each.get("source"))
        and (each.get("sha256", 0) is None or is_text(each.get("sha256")))
        for each in value
    )
