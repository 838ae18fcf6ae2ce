"""Write docs/spectra.md, and its plot, from what `eigenattn spectrum` measured.

python benchmarks/report_spectra.py [--plot] [FOLDER ...]    # the plot needs the extra `plot`

Folders are those of `eigenattn spectrum`. What the page needs of them goes to benchmarks/results/spectra.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from report_sweeps import MODELS

from eigenattn.evaluation.spectra import SIDES, read_spectra
from eigenattn.files import whole

ROOT = Path(__file__).parents[1]
RESULTS, PAGE, PLOT = (
    ROOT / "benchmarks" / "results" / "spectra.json",
    ROOT / "docs" / "spectra.md",
    ROOT / "docs" / "spectra.png",
)
# basis -> what the spectra of keys and of values are called.
NAMES = {
    "eigen": ("keys and queries", "values"),
    "attention": ("keys as queries see them", "values as outputs need them"),
}
ENERGY = 0.99
INTRODUCTION = """\
<!-- Written by benchmarks/report_spectra.py from benchmarks/results/spectra.json: edit there. -->
# Spectra

Which layers and families compress, and which do not? Of every KV head, the eigenvalues of two kinds of moments:

- basis `eigen`, the paper's: of keys with their group's queries, before rotation, and of values, about zero and not
  about their mean;
- basis `attention`, window 32, that of latents in 16 bits: of the error that leaving a direction out would make, over
  pairs of queries and keys that lie further apart than the exact window.

The *effective rank* is the exponential of the entropy of the eigenvalues' shares: 1 if one direction holds everything,
the head dimension if all weigh the same. Where it is low, few channels of a latent do.

![Effective rank by layer, means over heads](spectra.png)

How many of a head's directions hold 99% of the sum of eigenvalues, and the effective rank, as shares of the head
dimension; means over layers and heads, and the layers where the effective rank is lowest and highest:
"""


def condensed(found: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of one `spectrum.json`: by layer, means over heads."""
    sides = {}
    for side in SIDES:
        by_layer = found[side]["energy_kept"]
        needed = [[1 + sum(kept < ENERGY for kept in head) for head in heads] for heads in by_layer]
        sides[side] = {
            "effective_rank": [_mean(heads) for heads in found[side]["effective_rank"]],
            "rank_of_energy": [_mean(heads) for heads in needed],
        }
    facts = {name: found[name] for name in ("window", "samples", "length", "seed", "versions")}
    texts = [text["source"] for text in found["text"]]
    return facts | {"text": texts, "head_dim": len(found["keys"]["eigenvalues"][0][0]), **sides}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def load() -> dict[str, dict[str, Any]]:
    """Condensed spectra by model and basis."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def page(results: dict[str, dict[str, Any]]) -> str:
    lines = [INTRODUCTION, "| model | spectrum of | 99% | effective rank | lowest in layer | highest in layer |"]
    lines.append("| --- " * 6 + "|")
    for model, by_basis in results.items():
        for basis, found in by_basis.items():
            for side, name in zip(SIDES, NAMES[basis], strict=True):
                dim = found["head_dim"]
                needed = _mean(found[side]["rank_of_energy"]) / dim
                ranks = [rank / dim for rank in found[side]["effective_rank"]]
                extremes = " | ".join(f"{ranks.index(each)}: {each:.0%}" for each in (min(ranks), max(ranks)))
                lines.append(f"| {MODELS[model]} | {name} | {needed:.0%} | {_mean(ranks):.0%} | {extremes} |")
    lines += ["", _reading(results)]
    for model, by_basis in results.items():
        lines += ["", f"## {MODELS[model]}", ""]
        columns = [name for basis in by_basis for name in NAMES[basis]]
        head_dim = next(iter(by_basis.values()))["head_dim"]
        lines += [f"Effective rank, of {head_dim}, means over heads.", ""]
        lines += [f"| layer | {' | '.join(columns)} |", "| --- " * (1 + len(columns)) + "|"]
        ranks = [found[side]["effective_rank"] for found in by_basis.values() for side in SIDES]
        lines += [
            f"| {layer} | {' | '.join(f'{x:.1f}' for x in row)} |" for layer, row in enumerate(zip(*ranks, strict=True))
        ]
        lines += ["", *(_command(model, basis, found) for basis, found in by_basis.items())]
        versions = by_basis["eigen"]["versions"]
        lines += ["", f"fp32, torch {versions['torch']}, transformers {versions['transformers']}, two x86-64 cores."]
    return "\n".join(lines) + "\n"


def _reading(results: dict[str, dict[str, Any]]) -> str:
    """In words what the table says of the basis `attention`."""
    parts = []
    for model, by_basis in results.items():
        keys, values = (by_basis["attention"][side]["effective_rank"] for side in SIDES)
        lower = sum(key < value for key, value in zip(keys, values, strict=True))
        parts.append(f"{lower} of {len(keys)} layers of {MODELS[model]}")
    return (
        f"As the basis `attention` weighs them, keys need fewer directions than values in {'; '.join(parts)}. So rank "
        "rules give values more. An effective rank is not a rank to choose: many small eigenvalues beyond it add up, "
        "and a model may mind them (see the curves in [Results](results.md))."
    )


def _command(model: str, basis: str, found: dict[str, Any]) -> str:
    texts = "".join(f" --text {text}" for text in found["text"])
    return (
        f"    eigenattn spectrum {model} {model}-{basis} --basis {basis} --window {found['window']}{texts} "
        f"--samples {found['samples']} --dtype float32"
    )


def plot(results: dict[str, dict[str, Any]]) -> None:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(results), figsize=(4.5 * len(results), 3.6), constrained_layout=True, sharey=True, squeeze=False
    )
    for panel, (model, by_basis) in zip(panels[0], results.items(), strict=True):
        for (basis, found), line in zip(by_basis.items(), ("--", "-"), strict=True):
            for side, name, colour in zip(SIDES, NAMES[basis], ("tab:blue", "tab:orange"), strict=True):
                ranks = [rank / found["head_dim"] for rank in found[side]["effective_rank"]]
                panel.plot(ranks, line, color=colour, marker="o", markersize=3, label=name)
        panel.set(title=MODELS[model], xlabel="layer", ylim=(0, 1))
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("effective rank, of the head dimension")
    panels[0][0].legend(fontsize=7)
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--plot", action="store_true")
    args = parser.parse_args()
    results = load()
    for folder in args.folders:
        found = read_spectra(folder)
        results.setdefault(Path(found["model"]).name, {})[found["basis"]] = condensed(found)
    results = {model: {basis: results[model][basis] for basis in NAMES} for model in MODELS if model in results}
    with whole(RESULTS) as beside:
        beside.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        plot(results)
    with whole(PAGE) as beside:
        beside.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
