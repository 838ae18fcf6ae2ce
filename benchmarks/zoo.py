"""A zoo of bases: those of many models, measured by the standard protocol as they lie in their folders.

For each model and size a folder of bases, as `eigenattn compress` writes it, with its figures in the model card; and an
index of all. What exists is not made again, and a run goes on where one stopped. Options are those of `standard.py`,
with one length, no copies, needles or rivals by default.

    python benchmarks/zoo.py smollm2 qwen --dtype bfloat16 --bits 4.25 3.25 --text novel=novel.txt code.txt --out zoo
"""

from __future__ import annotations

import argparse
import re
import shlex
import statistics
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import report_standard
from standard import DEFAULTS, Attached, Batch, Protocol, Run, parser, protocol_of
from transformers import PreTrainedModel

from eigenattn.calibration.windows import described
from eigenattn.errors import EigenAttnError
from eigenattn.files import read_text, whole
from eigenattn.models.bases_file import read_config
from eigenattn.models.conversion import eigen_layers
from eigenattn.models.loading import Source, load_model
from eigenattn.models.maps import MAPS, QUANTISERS
from eigenattn.report.tables import TextTable
from eigenattn.workflows.calibrate import CalibrationText
from eigenattn.workflows.compress import compress_checkpoint

INDEX = "README.md"
# Between these a model card shows what was measured.
BEGIN, END = report_standard.BEGIN, report_standard.END


def folder_of(out: Path, stem: str, bits: float) -> Path:
    """Where the bases of a model and size lie.

    Args:
        stem: of the model's name, as in `standard-STEM.json`.
    """
    return out / f"{stem}-{bits:g}-bits"


class Zoo(Run):
    """One model, whose caches are read from folders of bases.

    Args:
        protocol: with one calibration, and no variants.
        name: a folder, a hub id, a `.gguf` file or `smollm2`.
        out: what the folders, the results and the index lie in.
        text: what bases are calibrated on.

    Raises:
        EigenAttnError: if the model or a text cannot be read, or a folder holds something else.
    """

    def __init__(self, protocol: Protocol, name: str, out: Path, again: list[str], text: CalibrationText) -> None:
        super().__init__(protocol, name, out, again)
        self.given, self.text = name, text
        self.folders = {key: folder_of(out, Path(name).stem, ours.cell.asked) for key, ours in self.ours.items()}
        for key, folder in self.folders.items():
            if folder.exists():
                self._check_made(key, folder)

    def _check_made(self, key: str, folder: Path) -> None:
        checkpoint, drawn = read_config(folder), self.text.drawn
        (texts,) = self.protocol.calibrations.values()
        asked = drawn | {"text": [described(each) for each in texts]}
        facts = {name: checkpoint.provenance.get(name) for name in asked}
        if checkpoint.method != self.ours[key].cell.config.to_dict() or facts != asked:
            raise EigenAttnError(f"{folder} was made with other options: move it away, or choose another --out.")

    def make(self) -> None:
        """The bases that are missing."""
        for key, folder in self.folders.items():
            if not folder.exists():
                config = self.ours[key].cell.config
                compress_checkpoint(self.given, folder, config, self.text, dtype=self.protocol.dtype, progress=True)

    def _drawn(self, model: PreTrainedModel) -> dict[str, list[Batch]]:
        """Nothing: bases are there."""
        return {}

    @cached_property
    def attached(self) -> dict[str, Attached]:
        """What the folders hold; seconds are those of loading."""
        found = {}
        for key, folder in self.folders.items():
            start = time.perf_counter()
            layers = eigen_layers(load_model(Source.of(str(folder)), self.protocol.dtype))
            maps = [{each: getattr(layer, each) for each in (*MAPS, *QUANTISERS)} for layer in layers]
            layouts = [layer.layout for layer in layers]
            found[key] = Attached(list(zip(layouts, maps, strict=True)), time.perf_counter() - start)
        return found

    def write_cards(self) -> None:
        """Show in each model card what was measured."""
        for key, folder in self.folders.items():
            path = folder / "README.md"
            card = re.sub(rf"\n*{BEGIN}.*{END}\n*", "\n", read_text(path), flags=re.DOTALL).rstrip()
            with whole(path) as beside:
                beside.write_text(f"{card}\n\n{BEGIN}\n{figures(self.results, key)}\n{END}\n", encoding="utf-8")


def figures(results: dict[str, Any], key: str) -> str:
    """Markdown: what one cache loses on each kind of text, at each length."""
    rows = [
        [
            *(f"{length:,}", name, str(cell["windows"]), f"{cell['perplexity']:.2f}"),
            *(f"{cell['relative_increase']:+.2%}", thousandths(cell), f"{cell['top1_agreement']:.2%}"),
        ]
        for length in report_standard.lengths(results)
        for name, cell in report_standard.cells(results, length, key).items()
    ]
    settings = results["settings"]
    said = (
        f"Against the original, in {settings['dtype'] or 'the dtype of the checkpoint'}, the last {results['window']} "
        "tokens exact. Divergence is in thousandths of a nat a token; ± is one standard error over windows."
    )
    headings = ["tokens", "text", "windows", "perplexity", "increase", "divergence", "same top-1"]
    return "\n\n".join(["## The standard protocol", TextTable(headings, rows).markdown(), said])


def thousandths(cell: dict[str, Any]) -> str:
    """A divergence with its error, where several windows give one."""
    error = cell.get("divergence_error")
    return f"{1e3 * cell['divergence']:.2f}" + (f" ± {1e3 * error:.2f}" if error is not None else "")


def command(results: dict[str, Any], key: str, folder: str) -> str:
    """What makes the bases again: options that are not the defaults."""
    settings, cache = results["settings"], results["caches"][key]
    words = ["eigenattn", "compress", results["model"], folder, "--kv-ratio", str(cache["config"]["kv_ratio"])]
    if cache["calibration"] not in DEFAULTS.text:
        words += [word for name in cache["calibration"].split("+") for word in ("--text", name)]
    for option, value, default in (
        ("--samples", settings["samples"], DEFAULTS.samples),
        ("--length", settings["calibration_length"], DEFAULTS.length),
        ("--seed", settings["seed"], DEFAULTS.seed),
        ("--dtype", settings["dtype"], None),
    ):
        words += [option, str(value)] if value != default else []
    return shlex.join(words)


def index(out: Path) -> str:
    """Markdown: every folder of bases that was measured, at the shortest length."""
    rows = []
    for stem, results in report_standard.load(out).items():
        for key, cache in results["caches"].items():
            if not report_standard.is_ours(results, key):
                continue
            folder, length = folder_of(out, stem, cache["asked"]), report_standard.lengths(results)[0]
            by_text = report_standard.foreign(results, report_standard.cells(results, length, key))
            if not by_text or not folder.is_dir():
                continue
            worst = max(by_text, key=lambda text: by_text[text]["divergence"])
            size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            rows.append(
                [
                    *(results["model"], f"[{report_standard.bits(results, key, length):.2f}]({folder.name}/README.md)"),
                    f"{1e3 * statistics.fmean(cell['divergence'] for cell in by_text.values()):.2f}",
                    *(f"{thousandths(by_text[worst])} ({worst})", f"{size:,}"),
                    f"`{command(results, key, folder.name)}`",
                ]
            )
    table = TextTable(["model", "bits", "divergence", "worst kind", "bytes of bases", "command"], rows).markdown()
    said = (
        "Bits are those of a cached element outside the exact window; the original has 16. Divergence from the "
        "original's predictions is in thousandths of a nat a token, the mean over kinds of text that were not "
        "calibrated on."
    )
    return f"# Bases\n\n{said}\n\n{table}\n"


def main(arguments: list[str] | None = None) -> None:
    """Make and measure what is missing of all models."""
    options = parser()
    options.description, defaults = __doc__, {"lengths": [1024], "windows": [4], "copies": 0, "trials": [0]}
    options.set_defaults(**defaults, rivals=[], finalists=0, out=Path("zoo"))
    args: argparse.Namespace = options.parse_args(arguments)
    try:
        if args.variants or len(args.calibration) > 1:
            raise EigenAttnError("a zoo has one calibration and no variants: leave out --variants.")
        if len({Path(name).stem for name in args.models}) < len(args.models):
            raise EigenAttnError("two models have the same name: rename a folder.")
        protocol = protocol_of(args)
        sources = args.calibration[0].split("+")
        text = CalibrationText(sources, args.samples, args.calibration_length, args.seed)
        args.out.mkdir(parents=True, exist_ok=True)
        for name in args.models:
            zoo = Zoo(protocol, name, args.out, args.again, text)
            zoo.make()
            zoo.measure()
            zoo.write_cards()
            with whole(args.out / INDEX) as beside:
                beside.write_text(index(args.out), encoding="utf-8")
    except EigenAttnError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
