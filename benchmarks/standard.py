"""The standard protocol of quality: models x texts x caches, ours and every rival's, all read in the same way.

For each model: latents coded to each size, calibrated by default options, and every rival that runs here. On the main
kinds of text all caches are read, with copying, and needles hidden in the first; on the others, and at longer lengths,
ours and the best rivals of each size. Results are written after every cell, and a run goes on where one stopped.

    python benchmarks/standard.py smollm2 qwen --dtype bfloat16 --text novel=novel.txt code=code.txt speeches.txt \\
        --variants attention:3kv --matched wiki
    python benchmarks/report_quality.py --plot    # the tables of docs/results.md
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from report_standard import NOTHING, Results, finalists, place_of
from transformers import PreTrainedModel

from eigenattn.cache.layout import Layout
from eigenattn.cache.size import HALF, baseline_bytes_per_token
from eigenattn.calibration.checks import check_length
from eigenattn.calibration.statistics import Batch
from eigenattn.calibration.text import DEFAULT_SOURCE, Text, load_text
from eigenattn.calibration.windows import complete, described, load_texts, text_windows
from eigenattn.compression.checks import check_sharing
from eigenattn.compression.folding import attach, detach
from eigenattn.compression.recipe import check_supported, check_tied
from eigenattn.config import EigenAttentionConfig
from eigenattn.errors import EigenAttnError
from eigenattn.evaluation.grid import ORIGINAL_BITS, Cell, Grid
from eigenattn.evaluation.measuring import EvaluationPlan, Measured, measure, report
from eigenattn.evaluation.reading import Logits, uncached
from eigenattn.evaluation.retrieval import Needles
from eigenattn.evaluation.rivals import RIVALS, Rival
from eigenattn.evaluation.sweep import SweepModel, rival_sizes, sizes
from eigenattn.files import to_json, whole
from eigenattn.models.families import turns_keys
from eigenattn.models.loading import Source, load_config, load_model, load_tokenizer
from eigenattn.models.maps import MAPS, QUANTISERS
from eigenattn.models.placement import input_device
from eigenattn.progress import TokenProgress
from eigenattn.report.inspection import layouts
from eigenattn.version import versions
from eigenattn.workflows.calibrate import CalibrationText

VERSION = 1
# Share of needles that the original must find for others to be asked (chosen).
FINDS = 0.5
DEFAULTS = CalibrationText([DEFAULT_SOURCE])


@dataclasses.dataclass(frozen=True)
class Ours:
    """One of our caches: what it is calibrated on, its variant of the default, and the compression that comes of it."""

    calibration: str
    variant: str
    cell: Cell


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What is measured of every model.

    Args:
        texts: kinds of text by name; `main` are those that all caches are read on, and that are read at all lengths.
        matched: kinds that are in the calibration text too, and stay out of means.
        lengths: of windows, and how many of each are read.
        calibrations: sources that ours is calibrated on, by name; each by itself.
        sizes: bits an element of ours.
        variants: bases as cells of sweeps have them, such as `attention:3kv`; the empty one is the default.
        rivals: by name.
        finalists: of each size, the rivals that are read on other kinds and lengths; 0 for all.
        trials: needles of each length and depth.
    """

    texts: dict[str, Text]
    main: list[str]
    matched: list[str]
    lengths: dict[int, int]
    calibrations: dict[str, list[Text]]
    samples: int
    calibration_length: int
    seed: int
    sizes: list[float]
    variants: list[str]
    rivals: list[str]
    finalists: int
    copies: int
    trials: dict[int, int]
    depths: list[float]
    dtype: str | None

    def settings(self) -> dict[str, Any]:
        """What all cells of a file have in common, in plain values."""
        names = ("main", "matched", "samples", "calibration_length", "seed", "finalists", "copies", "depths", "dtype")
        return {name: getattr(self, name) for name in names}

    def hashes(self) -> dict[str, Any]:
        """What may grow from run to run, but not change: texts, calibrations, and windows and needles by length."""
        return {
            "texts": {name: text.sha256 for name, text in self.texts.items()},
            "calibrations": {name: [described(text) for text in texts] for name, texts in self.calibrations.items()},
            "windows": {str(length): count for length, count in self.lengths.items()},
            "trials": {str(length): count for length, count in self.trials.items()},
        }

    def places(self) -> list[tuple[int, str]]:
        """Lengths and texts in the order in which they are read: main kinds first, which choose the finalists."""
        first, *longer = self.lengths
        others = [name for name in self.texts if name not in self.main]
        return [(first, name) for name in (*self.main, *others)] + list(itertools.product(longer, self.main))

    def plan(self, length: int, name: str) -> EvaluationPlan:
        """What is read of one text."""
        trials = self.trials[length] if name == self.main[0] else 0
        return EvaluationPlan(
            [dataclasses.replace(self.texts[name], source=name)],
            tokens=self.lengths[length] * length,
            length=length,
            copies=self.copies if name in self.main else 0,
            needles=Needles([length], self.depths, trials) if trials else None,
        )

    def ours(self, turns_keys: bool) -> dict[str, Ours]:
        """Our caches by name, those with the same statistics in a row.

        Args:
            turns_keys: of the model (`eigenattn.models.families.turns_keys`).

        Raises:
            EigenAttnError: if a variant is no such thing.
        """
        found = {}
        for calibration, variant, bits in itertools.product(self.calibrations, self.variants, self.sizes):
            given: dict[str, Any] = {}
            if variant:  # what it does not name is as by default
                asked = Cell.of(f"{variant}/bits/32", bits).config
                given = {"basis": asked.basis}
                given |= {"share": asked.share} if ":" in variant else {}
                given |= {"shrinkage": asked.shrinkage} if "~" in variant else {}
            config = EigenAttentionConfig(kv_ratio=bits / ORIGINAL_BITS, coded=True, **given)
            cell = Cell(config.for_model(turns_keys))
            found[f"{calibration}/{cell.key}"] = Ours(calibration, variant, cell)
        return found


@dataclasses.dataclass(frozen=True)
class Attached:
    """What one of our caches puts on each layer, and how long it took to find."""

    layers: list[tuple[Layout, dict[str, Any]]]
    seconds: float

    @property
    def layouts(self) -> list[Layout]:
        """Of each layer."""
        return [layout for layout, _ in self.layers]

    @property
    def maps_bytes(self) -> int:
        """Maps and levels in 16 bits."""
        return HALF * sum(each.numel() for _, maps in self.layers for each in maps.values() if each is not None)


class Run:
    """One model.

    Args:
        name: a folder, a hub id, a `.gguf` file or `smollm2`.
        folder: where `standard-NAME.json` is.
        again: drop cells of caches whose names contain one of these.

    Raises:
        EigenAttnError: if the model or a text cannot be read, or the file holds something else.
    """

    def __init__(self, protocol: Protocol, name: str, folder: Path, again: list[str]) -> None:
        self.protocol, self.name = protocol, Path(name).name
        self.source, self.path = Source.of(name), folder / f"standard-{Path(name).stem}.json"
        self.config, self.tokenizer = load_config(self.source), load_tokenizer(self.source)
        self.bars = TokenProgress(True)
        self.window = EigenAttentionConfig().window
        self.results: Results = self._take_up(again)
        ours, original = protocol.ours(turns_keys(self.config)), layouts(self.config, None)
        self.ours = {name: each for name, each in ours.items() if self._goes(name, each, original)}
        self._check_defaults()
        self.rivals = {rival.name: rival for rival in map(self._runs, protocol.rivals) if rival is not None}
        able = [length for length in protocol.lengths if self._reads(length)]
        self.places = [place for place in protocol.places() if place[0] in able]
        # Before any work: a text may be too short.
        self.items = {place: protocol.plan(*place).items(self.tokenizer) for place in self.places}

    def _take_up(self, again: list[str]) -> Results:
        protocol = self.protocol
        # As they are read back: tuples become lists.
        settings, hashes = (json.loads(json.dumps(each)) for each in (protocol.settings(), protocol.hashes()))
        if not self.path.exists():
            facts = {"version": VERSION, "model": self.name, "settings": settings, "window": self.window, **hashes}
            machine = f"{platform.machine()}, {os.cpu_count()} cores"
            empty = {name: {} for name in ("skipped", "caches", "baselines", "cells")}
            return facts | {"versions": versions(), "machine": machine} | empty
        results = json.loads(self.path.read_text(encoding="utf-8"))
        if results.get("version") != VERSION:
            raise EigenAttnError(f"{self.path} was written by another version of this script: move it away.")
        for name in sorted(settings):
            if settings[name] != results["settings"].get(name):
                raise EigenAttnError(f"{self.path} was measured with another {name}: choose another --out.")
        for kind, given in hashes.items():
            for name, value in given.items():
                if results[kind].setdefault(name, value) != value:
                    raise EigenAttnError(f"{self.path} was measured with other {kind} ({name}): choose another --out.")
        dropped = [name for name in results["caches"] if any(part in name for part in again)]
        for name in dropped:
            del results["caches"][name]
        results["cells"] = {key: cell for key, cell in results["cells"].items() if place_of(key)[2] not in dropped}
        return results | {"skipped": {}}

    def _check_defaults(self) -> None:
        for name, each in self.ours.items():
            config = each.cell.config.to_dict()
            if self.results["caches"].get(name, {}).get("config", config) != config:
                raise EigenAttnError(f"{name} was measured with other default options: drop it by --again {name}.")

    def _goes(self, name: str, ours: Ours, original: list[Layout]) -> bool:
        """Whether a variant goes with the model, of these layouts; the default has to."""
        config = ours.cell.config
        try:
            check_supported(config)
            check_sharing(original[0].kv_heads, config.sharing)
            check_tied(config, original)
        except EigenAttnError as error:
            if not ours.variant:
                raise
            self._skip(name, str(error))
            return False
        return True

    def _skip(self, name: str, reason: str) -> None:
        self.results["skipped"][name] = reason
        print(f"{self.name}: without {name}: {reason}", flush=True)

    def _runs(self, name: str) -> Rival | None:
        try:
            rival = Rival.of(name)
            rival.check(self.config, self.window)
        except EigenAttnError as error:
            return self._skip(name, str(error))
        return rival

    def _reads(self, length: int) -> bool:
        try:
            check_length(self.config, length)
        except EigenAttnError as error:
            self._skip(f"windows of {length:,}", str(error))
            return False
        return True

    def save(self) -> None:
        """Write all results."""
        with whole(self.path) as beside:
            beside.write_text(to_json(self.results, indent=1), encoding="utf-8")

    def wanted(self, length: int, text: str) -> list[str]:
        """Names of the caches that are to be read in one place."""
        rivals, protocol = list(self.rivals), self.protocol
        if protocol.finalists and (length, text) not in [(self.places[0][0], name) for name in protocol.main]:
            rivals = finalists(self.results, protocol.sizes, protocol.finalists)
        return [NOTHING, *self.ours, *rivals]

    def measure(self) -> None:
        """Everything that is missing."""
        for length, text in self.places:
            names = [name for name in self.wanted(length, text) if self._key(length, text, name) not in self._cells]
            if names:
                self._read(length, text, names)
        self.save()

    @property
    def _cells(self) -> dict[str, Any]:
        return self.results["cells"]

    @staticmethod
    def _key(length: int, text: str, name: str) -> str:
        return f"{length}/{text}/{name}"

    @cached_property
    def subject(self) -> SweepModel:
        """The model, converted, at full rank: it predicts what the original does, to the bit."""
        model = load_model(self.source, self.protocol.dtype)
        self._batches = self._drawn(model)
        grid = Grid([size / ORIGINAL_BITS for size in self.protocol.sizes], coded=True, windows=[self.window])
        return SweepModel(model, [], grid, self.bars, share_costs=False)

    def _drawn(self, model: PreTrainedModel) -> dict[str, list[Batch]]:
        """What ours are calibrated on, by name.

        Args:
            model: before it is converted, as `compress` draws too: what a model writes may hang on a rounding.
        """
        protocol, found = self.protocol, {}
        drawn = protocol.samples, protocol.calibration_length, protocol.seed
        for name, texts in protocol.calibrations.items():
            parts = text_windows(texts, self.tokenizer, *drawn)
            windows = complete(parts, model, *drawn[1:]).to(input_device(model))
            found[name] = [Batch(window) for window in windows.split(1)]
        return found

    @cached_property
    def attached(self) -> dict[str, Attached]:
        """What those of our caches consist of that are still to be read somewhere."""
        subject, found = self.subject, {}
        missing = [name for place in self.places for name in self.ours if self._key(*place, name) not in self._cells]
        before = None
        for name in (name for name in self.ours if name in missing):
            ours = self.ours[name]
            if ours.calibration != before:
                before = ours.calibration
                subject.calibrate(self._batches[before])
            start = time.perf_counter()
            subject.compress(ours.cell, {})
            layers = [
                (layer.layout, {each: getattr(layer, each) for each in (*MAPS, *QUANTISERS)})
                for layer in subject.layers
            ]
            found[name] = Attached(layers, time.perf_counter() - start)
            print(f"{self.name}: {name} made in {found[name].seconds:.0f} s", flush=True)
        subject.calibrate([])
        subject.restore()
        return found

    def _reading(self, name: str) -> AbstractContextManager[Logits]:
        if name in self.rivals:
            return self.rivals[name].reading(self.subject.layers, self.window)
        return self._exactly() if name == NOTHING else self._through(self.attached[name])

    @contextmanager
    def _exactly(self) -> Iterator[Logits]:
        try:
            for layer in self.subject.layers:
                attach(layer, (), self.window)
            yield uncached
        finally:
            self.subject.restore()

    @contextmanager
    def _through(self, attached: Attached) -> Iterator[Logits]:
        try:
            for layer, (layout, maps) in zip(self.subject.layers, attached.layers, strict=True):
                detach(layer)
                layer.layout = layout
                for each, value in maps.items():
                    setattr(layer, each, value)
            yield uncached
        finally:
            self.subject.restore()

    def _describe(self, name: str, length: int) -> None:
        """Note what a cache is, and its size at a length."""
        layouts = self.subject.layouts  # of the original
        original = baseline_bytes_per_token(layouts, HALF)
        cache = self.results["caches"].setdefault(name, {"sizes": {}})
        if name == NOTHING:
            found = {"kv_ratio": 1.0, "format_bytes": original * length, "allocated_bytes": None}
        elif name in self.rivals:
            rival = self.rivals[name]
            size = rival_sizes(layouts, rival, self.window, length)
            found = {"kv_ratio": size["kv_ratio"], "format_bytes": size["cache_bytes"], "allocated_bytes": None}
        else:
            attached, ours = self.attached[name], self.ours[name]
            size = sizes(attached.layouts, length)
            exact = min(self.window, length)
            needed = size["bytes_per_token"] * (length - exact) + original * exact
            found = {
                "kv_ratio": size["kv_ratio"],
                "format_bytes": needed,
                "allocated_bytes": size["cache_bytes"],
            }
            cache |= {
                "ours": True,
                "calibration": ours.calibration,
                "variant": ours.variant,
                "method": ours.cell.method,
                "asked": ours.cell.asked,
                "config": ours.cell.config.to_dict(),
                "maps_bytes": attached.maps_bytes,
                "pays_back_after": attached.maps_bytes / (original - size["bytes_per_token"]),
            }
        cache["sizes"][str(length)] = found | {"original_bytes": original * length}

    def _read(self, length: int, text: str, names: list[str]) -> None:
        items = self.items[length, text]
        subject, plan = self.subject, self.protocol.plan(length, text)
        if any(name in self.ours for name in names):
            _ = self.attached  # before predictions take room
        look = partial(measure, subject.model, self.tokenizer, items=items, bars=self.bars)
        base = look(plan, title="the original", keep=True)
        if base.needles and sum(map(sum, base.needles.values())) < FINDS * sum(map(len, base.needles.values())):
            plan = dataclasses.replace(plan, needles=None)
        self.results["baselines"][f"{length}/{text}"] = _figures(base)
        for name in names:
            self._describe(name, length)
            start = time.perf_counter()
            with self._reading(name) as logits_of:
                found = look(plan, title=name, logits_of=logits_of, original=base.predictions)
            cell = self._cells[self._key(length, text, name)] = _figures(found, base)
            self.save()
            error = cell["divergence_error"]
            print(
                f"{self.name}, {length} tokens of {text}, {name}: divergence {1e3 * cell['divergence']:.2f}"
                f"{f' ± {1e3 * error:.2f}' if error is not None else ''} thousandths, perplexity "
                f"{cell['relative_increase']:+.2%}, {time.perf_counter() - start:.0f} s",
                flush=True,
            )


def _figures(measured: Measured, base: Measured | None = None) -> dict[str, Any]:
    """Those of one text."""
    found = report(measured, base)
    row = {name: value for name, value in found["texts"][0].items() if name != "text"}
    return row | {name: found[name] for name in ("copying", "needles") if found.get(name)}


def _named(value: str) -> tuple[str, Text]:
    """A kind of text: `name=source`, or a source that gives its own name."""
    name, found, source = value.partition("=")
    name, source = (name, source) if found else (Path(value).stem, value)
    if "/" in name:
        raise EigenAttnError(f"a kind of text cannot be called {name!r}: leave out the slash.")
    return name, load_text(source, "evaluation")


def protocol_of(args: argparse.Namespace) -> Protocol:
    """What the command line asks for.

    Raises:
        EigenAttnError: if a text cannot be read, or a name is none.
    """
    texts = dict(map(_named, args.text))
    if len(texts) < len(args.text):
        raise EigenAttnError("two texts have the same name: write name=path.")
    main = args.main or [name for name in texts if name not in args.matched][:2]
    for name in (*main, *args.matched):
        if name not in texts:
            raise EigenAttnError(f"no text is called {name!r}.")
    if not main or not len(args.lengths) == len(args.windows) == len(args.trials):
        raise EigenAttnError("give at least one main kind of text, and numbers of windows and trials for each length.")
    for name in args.rivals:
        if name not in RIVALS:
            raise EigenAttnError(f"unknown rival {name!r}.")
    # By their last names: results say what text it was, and not where it lay.
    sources = {"+".join(Path(each).stem for each in name.split("+")): name.split("+") for name in args.calibration}
    calibrations = {name: load_texts(each) for name, each in sources.items()}
    if len(calibrations) < len(args.calibration):
        raise EigenAttnError("two calibrations have the same name: rename a file.")
    return Protocol(
        texts=texts,
        main=main,
        matched=args.matched,
        lengths=dict(zip(args.lengths, args.windows, strict=True)),
        calibrations=calibrations,
        samples=args.samples,
        calibration_length=args.calibration_length,
        seed=args.seed,
        sizes=args.bits,
        variants=["", *args.variants],
        rivals=args.rivals,
        finalists=args.finalists,
        copies=args.copies,
        trials=dict(zip(args.lengths, args.trials, strict=True)),
        depths=args.depths,
        dtype=args.dtype,
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("models", nargs="+", help="folders, hub ids or smollm2")
    add("--text", nargs="+", required=True, metavar="NAME=SOURCE", help="kinds of text, none of them calibrated on")
    add("--main", nargs="*", default=[], metavar="NAME", help="kinds for all caches and lengths; the first two")
    add("--matched", nargs="*", default=[], metavar="NAME", help="kinds that are in the calibration text")
    add("--lengths", nargs="+", type=int, default=[1024, 4096, 8192])
    add("--windows", nargs="+", type=int, default=[4, 3, 2], help="how many of each length")
    add("--bits", nargs="+", type=float, default=[4.25, 3.25, 2.25], help="sizes of ours")
    add("--variants", nargs="*", default=[], help="besides the default, such as attention:3kv or attention~0.3")
    add("--rivals", nargs="*", default=list(RIVALS), help="all by default")
    add("--finalists", type=int, default=3, help="rivals of each size beyond the main kinds; 0 for all")
    add("--calibration", nargs="+", default=[DEFAULT_SOURCE], metavar="SOURCE+SOURCE", help="each by itself")
    add("--samples", type=int, default=DEFAULTS.samples)
    add("--calibration-length", type=int, default=DEFAULTS.length)
    add("--seed", type=int, default=DEFAULTS.seed)
    add("--copies", type=int, default=2, help="windows that are copied, of main kinds")
    add("--trials", nargs="+", type=int, default=[0, 4, 4], help="needles of each length, at each depth; 0 for none")
    add("--depths", nargs="+", type=float, default=[0.0, 0.5, 1.0])
    add("--dtype", help="float32, bfloat16 or float16; the checkpoint's by default")
    add("--out", type=Path, default=Path(__file__).parent / "results")
    add("--again", nargs="*", default=[], metavar="PART", help="measure caches anew whose names contain this")
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure all models."""
    args = parser().parse_args(arguments)
    try:
        protocol = protocol_of(args)
        args.out.mkdir(parents=True, exist_ok=True)
        runs = [Run(protocol, name, args.out, args.again) for name in args.models]
        while runs:  # each is let go of when it is done: the next one needs the room
            runs.pop(0).measure()
    except EigenAttnError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
