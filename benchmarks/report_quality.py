"""Write docs/results.md, its plots and the README's table of losses.

They are made of what `standard.py`, `quality.py` and `eigenattn sweep` measured.

python benchmarks/report_quality.py [--plot]    # the plot needs the extra `plot`
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import report_standard
import report_sweeps
from readme import README, with_table

ROOT = Path(__file__).parents[1]
PAGE, PLOT = ROOT / "docs" / "results.md", ROOT / "docs" / "quality.png"
METHODS = {
    "eigen/error_budget/0": "the paper's method",
    "eigen/uniform/0": "its basis, uniform ranks",
    "eigen/sensitivity/0": "its basis, our ranks",
    "attention/sensitivity/0": "our basis and ranks, no window",
    "attention+refit/sensitivity/0": "our basis and ranks, no window, decoders refitted (`--uncoded --window 0`)",
    "attention:3kv/sensitivity/0": "ours, keys and values of all 3 heads to a latent, no window",
    "attention:6kv/sensitivity/0": "ours, keys and values of all 6 heads to a latent, no window",
    "eigen/error_budget/32": "the paper's method, window 32",
    "eigen/uniform/32": "its basis, uniform ranks, window 32",
    "attention/uniform/32": "our basis, uniform ranks, window 32",
    "attention/sensitivity/32": "**ours**: our basis and ranks, window 32 (`--uncoded`)",
    "attention/sensitivity/48": "ours, window 48",
    "attention:1kv/sensitivity/32": "ours, keys and values of a head to a latent",
    "attention:1-3/sensitivity/32": "ours, values of 3 heads to a latent",
    "attention:3/sensitivity/32": "ours, 3 heads to a latent",
    "attention:3kv/sensitivity/32": "ours, keys and values of 3 heads to a latent",
    "attention:6kv/sensitivity/32": "ours, keys and values of all 6 heads to a latent",
}
USUAL_MULTIPLE = 8
INTRODUCTION = """\
<!-- Written by benchmarks/report_quality.py from benchmarks/results/: edit there. -->
# Results

How much worse does a model predict with a smaller cache? Perplexity on windows of 1,024 tokens, each read on its own,
in fp32, against the same model uncompressed on the same windows; behind it the standard error of the paired difference
of log-likelihoods. Copying is the share of tokens guessed right in the second copy of 512 tokens repeated, which
perplexity hides. "Reached" is the KV ratio of the latents; rank rules keep to the ratio asked for from below. Where
there is a window, its exact tokens (32, but where another number is named) come on top, once a sequence. Coded latents,
which are the default, are judged by the standard protocol and by [bits an element](#bits-an-element); the tables by KV
ratio are of latents in 16 bits (`--uncoded`), whose basis is `attention`.

![Increase of perplexity against the KV ratio](quality.png)
"""


def load() -> dict[str, dict]:
    """Results by model."""
    return {
        path.stem.removeprefix("quality-"): json.loads(path.read_text())
        for path in sorted((ROOT / "benchmarks" / "results").glob("quality-*.json"), reverse=True)
    }


def cells_of(result: dict) -> dict[str, list[dict]]:
    """Cells by method, each with its `ratio` asked for, falling."""
    found: dict[str, list[dict]] = {}
    for key, cell in result["cells"].items():
        basis, rule, window, multiple, ratio = key.split("/")
        found.setdefault(f"{basis}/{rule}/{window}", []).append(
            {**cell, "ratio": float(ratio), "multiple": int(multiple)}
        )
    return {
        name: sorted(rows, key=lambda row: (row["multiple"] != USUAL_MULTIPLE, -row["ratio"]))
        for name, rows in found.items()
    }


def section(name: str, result: dict) -> str:
    """The table of one model and the command that made it."""
    base = result["baseline"]
    lines = [
        f"## {report_sweeps.MODELS.get(name, name)}",
        "",
        f"Calibrated on {result['calibration']}, evaluated on {result['evaluation']}. Uncompressed: perplexity "
        f"{base['perplexity']:.2f}, copying {base['copying']:.1%}. Ranks in multiples of 8, unless said otherwise. "
        f"Measured on {result['machine']}, torch {result['versions']['torch']}, "
        f"transformers {result['versions']['transformers']}.",
        "",
        "| method | asked | reached | perplexity | copying |",
        "| --- | --- | --- | --- | --- |",
    ]
    cells = cells_of(result)
    for method, title in METHODS.items():
        for row in cells.get(method, []):
            other = "" if row["multiple"] == USUAL_MULTIPLE else f", ranks in multiples of {row['multiple']}"
            lines.append(
                f"| {title}{other} | {row['ratio']} | {row['kv_ratio']:.3f} | {row['relative_increase']:+.2%} "
                f"± {row['standard_error']:.2%} | {row['copying']:.1%} |"
            )
    multiples = {row["multiple"] for rows in cells.values() for row in rows}
    for multiple in sorted(multiples, reverse=True):
        held = {method: [row for row in rows if row["multiple"] == multiple] for method, rows in cells.items()}
        ratios = sorted({row["ratio"] for rows in held.values() for row in rows}, reverse=True)
        lines += [
            "",
            f"    python benchmarks/quality.py {result['model']} --calibration sotu-calibration.txt \\",
            f"        --evaluation sotu-evaluation.txt --out benchmarks/results/quality-{name}.json \\",
            f"        --cells {' '.join(method for method in METHODS if held.get(method))} \\",
            f"        --ratios {' '.join(map(str, ratios))}"
            + ("" if multiple == USUAL_MULTIPLE else f" --rank-multiple {multiple}"),
        ]
    return "\n".join([*lines, ""])


def page(results: dict[str, dict]) -> str:
    tables = "\n".join(section(name, result) for name, result in results.items())
    standard = report_standard.section(report_standard.load())
    return f"{INTRODUCTION}\n{standard}\n{tables}\n{report_sweeps.page(report_sweeps.load())}"


def readme() -> str:
    """The README with the table of losses as it is now."""
    return with_table("losses", report_standard.losses(report_standard.load()))


def plot(results: dict[str, dict]) -> None:
    """One panel a model; dashed lines are of methods without a window."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(results), figsize=(5 * len(results), 6), layout="constrained")
    found = {name: cells_of(result) for name, result in results.items()}
    measured = [method for method in METHODS if any(method in cells for cells in found.values())]
    colours = {method: pyplot.get_cmap("tab20")(number % 20) for number, method in enumerate(measured)}
    lines = {}
    for panel, (name, cells) in zip(panels, found.items(), strict=True):
        for method, colour in colours.items():
            rows = [row for row in cells.get(method, []) if row["multiple"] == USUAL_MULTIPLE]
            x, y = [row["kv_ratio"] for row in rows], [max(100 * row["relative_increase"], 0.005) for row in rows]
            style = "--" if method.endswith("/0") else "-"
            (lines[method],) = panel.plot(x, y, style, color=colour, marker="o", markersize=4)
        panel.set(title=report_sweeps.MODELS.get(name, name), xlabel="KV ratio of the latents", yscale="log")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("increase of perplexity, %")
    titles = [METHODS[method].replace("**", "").replace("`", "") for method in lines]
    figure.legend(lines.values(), titles, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", action="store_true")
    results = load()
    if parser.parse_args().plot:
        plot(results)
        report_sweeps.plot(report_sweeps.load())
        report_standard.plot(report_standard.load())
    PAGE.write_text(page(results), encoding="utf-8")
    README.write_text(readme(), encoding="utf-8")


if __name__ == "__main__":
    main()
