"""The sections of docs/results.md that come from `eigenattn sweep`, and their plots.

They are read from benchmarks/results/{bits,long,longest,texts,limits}-MODEL.json, which are the `sweep.json` of the
commands that every section states.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from eigenattn.compression.ranks import RANK_RULES
from eigenattn.config import Sharing

ROOT = Path(__file__).parents[1]
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
# Share of a copied text guessed right from which on copying says something about retrieval (chosen).
RETRIEVES = 0.5
USUAL_LENGTH = 1024
KINDS = ("bits", "long", "longest", "texts", "limits")
MODELS = {"smollm2": "SmolLM2-135M-Instruct", "opt-13m": "OPT, 13M", "mpt-12m": "MPT, 12M"}
INTRODUCTIONS = {
    "bits": """\
## Bits an element

Latents coded channel by channel, and what plain quantisation costs beside the same exact window: keys per channel
and before rotation, values per token, scales and zero points counted (`plain`); and transformers' own quantised caches
(`quanto`, `hqq`), which read in pieces of 32 tokens. The latents' basis is `attention`, calibrated on text of the same
kind.
Bits are those of the latents for each element of the original cache, which has 16. "Whole cache" is all that is
allocated at 1,024 tokens, window included, against the original's. KL is the divergence of predictions from the
original's, in thousandths of a nat a token.

![Increase of perplexity against bits an element](bits.png)
""",
    "long": """\
## Longer contexts

Windows of 4,096 and of 8,192 tokens, for calibration and evaluation alike: calibrated on windows of 1,024, copying at
4,096 loses three times as much (see [rules](rules.md)). Copying is the share of tokens guessed right
in the second copy of half as many tokens repeated, of which the exact window is a small part; behind it the paired
difference.
""",
    "texts": """\
## Which text, and how much of it

One KV ratio, calibrated on each text by itself and judged on what is held out of every text: the last fifth of files,
and topics of the Python reference (`python-docs`). `self` is text that the model writes. Windows are of 1,024 tokens.

- What a mismatch costs: many times what compression costs on its own kind of text. SmolLM2 at 0.5, calibrated on
  32,768 tokens, loses 0.19% on speeches if they are speeches, and 3.2% if they are the Python reference. OPT and MPT at
  0.4 lose up to 1.1% on the kind of text they were calibrated on, and up to 1.9 and 3.9% on another.
- Which text: WikiText-2, which is about many things, is the best over all three texts on OPT and MPT, and the Python
  reference on SmolLM2, with WikiText-2 close behind (2.09 and 2.34%). Speeches are the worst there.
- How much: as much as one has, where the text is not of the kind to come. From 2,048 to 32,768 tokens the Python
  reference goes from 4.4 to 2.1% on SmolLM2, WikiText-2 from 4.0 to 2.3%. On OPT and MPT 2,048 tokens of WikiText-2 are
  nearly as good as 32,768 (0.38 against 0.33%, 1.05 against 0.95%). On its own kind of text more than 2,048 tokens
  make no difference to SmolLM2 that is clear of the errors, and more of the wrong text is no remedy: with 32,768
  tokens of speeches it does no better on others.
- The model's own text, which needs no data, is second best on OPT, no better than the other two on MPT, and with 8,192
  tokens next to the worst on SmolLM2.

![Increase of perplexity against tokens calibrated on](texts.png)
""",
    "limits": """\
## Limits

Where quality begins to fall, for each basis and rank rule, with the exact window and without, decoders not refitted.

- With the window, our basis and ranks (`attention, sensitivity, 32`) stay within 1% of the original's perplexity down
  to a ratio of 0.2 on OPT and MPT, whose heads have keys of their own, and lose 1.0% at 0.4 on SmolLM2, where three
  query heads share each key already. Without it 1% is passed near 0.5 on OPT and MPT, and above 0.8 on SmolLM2.
- Retrieval goes before perplexity: at 0.2 SmolLM2 reads 6.8% worse, and copies four tokens of ten.
- The rank rule decides as much as the basis. The paper's basis at uniform ranks costs SmolLM2 14% at a ratio of 0.8
  even beside the window, for what it loses first is the attention sink. The paper's rank rule looks at errors of layer
  outputs, and cuts layers whose errors the model cannot bear.

![Increase of perplexity against the KV ratio, by basis and rank rule](limits.png)
""",
}


def load() -> dict[str, dict[str, dict[str, Any]]]:
    """Sweeps by kind and model, as far as they were run."""
    return {
        kind: {
            model: json.loads(path.read_text(encoding="utf-8"))
            for model in MODELS
            if (path := RESULTS / f"{kind}-{model}.json").exists()
        }
        for kind in KINDS
    }


def page(sweeps: dict[str, dict[str, dict[str, Any]]]) -> str:
    """All sections."""
    tables = {"bits": _bits, "long": _long, "longest": _long, "texts": _calibration, "limits": _limits}
    parts = []
    for kind, by_model in sweeps.items():
        if by_model and kind in INTRODUCTIONS:
            parts.append(INTRODUCTIONS[kind])
        for model, sweep in by_model.items():
            parts.append("\n".join([f"### {_title(model, sweep)}", "", _facts(sweep), "", *tables[kind](sweep), ""]))
            parts.append(_command(kind, model, sweep))
    return "\n".join(parts)


def _title(model: str, sweep: dict[str, Any]) -> str:
    length = sweep["settings"]["length"]
    return MODELS[model] if length == USUAL_LENGTH else f"{MODELS[model]}, {length:,} tokens"


def _facts(sweep: dict[str, Any]) -> str:
    texts = sweep["baseline"]["texts"]
    read = "; ".join(f"{row['text']}: {row['windows']} windows, {row['perplexity']:.2f}" for row in texts)
    copying, dtype = sweep["baseline"]["copying"]["accuracy"], sweep["settings"]["protocol"]["dtype"]
    return (
        f"Uncompressed perplexity on {read}; copying {copying:.1%}. Two x86-64 cores, {dtype}, "
        f"torch {sweep['versions']['torch']}, transformers {sweep['versions']['transformers']}."
    )


def _change(row: dict[str, Any]) -> str:
    return f"{row['relative_increase']:+.2%} ± {row['relative_increase_error']:.2%}"


def _is_rival(cell: dict[str, Any]) -> bool:
    return "calibration" not in cell


def _bits_of(cell: dict[str, Any]) -> float:
    return 16 * cell["kv_ratio"]


def _cells(sweep: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(sweep["cells"].values(), key=lambda cell: -cell["kv_ratio"])


def _bits(sweep: dict[str, Any]) -> list[str]:
    lines = ["| cache | bits an element | whole cache | perplexity | KL | copying |", "| --- " * 6 + "|"]
    for cell in _cells(sweep):
        text = cell["texts"][0]
        name = cell["method"] if _is_rival(cell) else _latents(cell)
        lines.append(
            f"| {name} | {_bits_of(cell):.2f} | {cell['cache_ratio']:.3f} | {_change(text)} "
            f"| {1e3 * text['divergence']:.2f} | {cell['copying']['accuracy']:.1%} |"
        )
    return lines


def _long(sweep: dict[str, Any]) -> list[str]:
    heading = ["latents", "KV ratio", "whole cache", "perplexity", "KL", "copying", "difference"]
    lines = [f"| {' | '.join(heading)} |", "| --- " * len(heading) + "|"]
    for cell in _cells(sweep):
        text, copying, bits = cell["texts"][0], cell["copying"], cell.get("bits_per_element")
        name = _latents(cell) + (f", {bits:g} bits an element" if bits else "")
        lines.append(
            f"| {name} | {cell['kv_ratio']:.3f} | {cell['cache_ratio']:.3f} | {_change(text)} "
            f"| {1e3 * text['divergence']:.2f} | {copying['accuracy']:.1%} "
            f"| {100 * copying['difference']:+.2f} ± {100 * copying['difference_error']:.2f} points |"
        )
    return lines


def _sharing(cell: dict[str, Any]) -> Sharing:
    """Which latents are shared; cells were written with a name for each kind of sharing before they had `share`."""
    if "share" in cell:
        return Sharing.of(cell["share"])
    keys = cell.get("shared_heads", 1)
    return Sharing(keys, cell.get("shared_values") or keys, bool(cell.get("joint")))


def _latents(cell: dict[str, Any]) -> str:
    keys, values, both = _sharing(cell)
    if both:
        return f"latents that keys and values of {keys} heads share" if keys > 1 else "latents of keys and values"
    if values != keys:
        return f"latents, of values of {values} heads"
    return "**latents**" if keys == 1 else f"latents that {keys} heads share"


def _calibration(sweep: dict[str, Any]) -> list[str]:
    cells = _cells(sweep)
    judged = [row["text"] for row in sweep["baseline"]["texts"]]
    lines = [
        f"KV ratio {cells[0]['asked']}, window {cells[0]['window']}.",
        "",
        f"| calibrated on | tokens | {' | '.join(judged)} | mean |",
        "| --- " * (3 + len(judged)) + "|",
    ]
    for cell in sorted(cells, key=lambda cell: (cell["calibration"] == "self", _calibrated_on(cell), cell["samples"])):
        tokens = cell["samples"] * sweep["settings"]["length"]
        changes = [_change(next(row for row in cell["texts"] if row["text"] == name)) for name in judged]
        lines.append(f"| {_calibrated_on(cell)} | {tokens:,} | {' | '.join(changes)} | {_mean_increase(cell):+.2%} |")
    return lines


def _calibrated_on(cell: dict[str, Any]) -> str:
    return cell["calibration"] + (f", shrinkage {cell['shrinkage']:g}" if cell.get("shrinkage") else "")


def _limits(sweep: dict[str, Any]) -> list[str]:
    lines = _by_ratio(sweep, lambda cell: f"{_increase(cell):+.2%}")
    if sweep["baseline"]["copying"]["accuracy"] < RETRIEVES:
        return lines
    return [*lines, "", "Copying:", "", *_by_ratio(sweep, lambda cell: f"{cell['copying']['accuracy']:.1%}")]


def _by_ratio(sweep: dict[str, Any], figure: Callable[[dict[str, Any]], str]) -> list[str]:
    """A table with a row for each basis, rank rule and window, and a column for each ratio."""
    curves = _curves(sweep)
    asked = sorted({cell["asked"] for cells in curves.values() for cell in cells}, reverse=True)
    lines = [
        f"| basis, ranks, window | {' | '.join(map(str, asked))} |",
        "| --- " * (1 + len(asked)) + "|",
    ]
    for name, cells in curves.items():
        by_ratio = {cell["asked"]: figure(cell) for cell in cells}
        lines.append(f"| {name} | {' | '.join(by_ratio.get(each, '') for each in asked)} |")
    return lines


def _curves(sweep: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    curves: dict[str, list[dict[str, Any]]] = {}
    for cell in sorted(_cells(sweep), key=lambda cell: (cell["window"], cell["basis"], cell["ranks"])):
        curves.setdefault(f"{cell['basis']}, {cell['ranks']}, {cell['window']}", []).append(cell)
    return curves


def _command(kind: str, model: str, sweep: dict[str, Any]) -> str:
    """The commands that a sweep came from, out of its own cells: plain and coded latents have one of their own."""
    found = sweep["cells"].values()
    rivals = [cell["method"] for cell in found if _is_rival(cell)]
    measured = [cell for cell in found if not _is_rival(cell)]
    # Where keys and values are one latent, and where they are two, other ratios may have been asked for.
    groups = [
        [cell for cell in measured if (_is_coded(cell), _sharing(cell).joint) == (coded, joint)]
        for joint in (False, True)
        for coded in (False, True)
    ]
    commands = [
        _one_command(kind, model, sweep, cells, rivals if number == 0 else [])
        for number, cells in enumerate(filter(None, groups))
    ]
    return "".join(commands)


def _is_coded(cell: dict[str, Any]) -> bool:
    return bool(cell.get("bits_per_element"))


def _one_command(kind: str, model: str, sweep: dict[str, Any], cells: list[dict[str, Any]], rivals: list[str]) -> str:
    def several(name: str, values: Iterable[Any]) -> str:
        found = dict.fromkeys(value for value in values if value is not None)
        return f" --{name} {','.join(map(str, found))}" if found else ""

    def of(name: str) -> list[Any]:
        return [cell.get(name) for cell in cells]

    texts = list(dict.fromkeys(cell["calibration"] for cell in cells))
    sources = "".join(f" --text {text.removesuffix(', first part')}" for text in texts)
    settings, copies = sweep["settings"], sweep["baseline"]["copying"]["items"]
    sizes = (" --coded" if _is_coded(cells[0]) else "") + several(
        "kv-ratio", (f"{cell['asked'] / (16 if _is_coded(cell) else 1):g}" for cell in cells)
    )
    # A sweep of coded latents has another basis by default than one of others.
    choices = several("basis", of("basis")) if kind == "limits" or _is_coded(cells[0]) else ""
    choices += several("ranks", of("ranks")) if kind == "limits" else ""
    # Without a window decoders are refitted unless one says otherwise.
    refit = " --no-refit" if any(not (cell["window"] or cell.get("refit")) for cell in cells) else ""
    shrinkage = several("shrinkage", of("shrinkage")) if any(of("shrinkage")) else ""
    shared = several("share", (str(_sharing(cell)) for cell in cells))
    length = "" if settings["length"] == USUAL_LENGTH else f" --length {settings['length']}"
    options = [
        sizes
        + choices
        + several("window", of("window"))
        + ("" if shared == " --share 1" else shared)
        + refit
        + shrinkage,
        f"{' --each-text' if len(texts) > 1 else ''}{sources}{several('samples', of('samples'))}{length}",
        f"{f' --rivals {chr(44).join(rivals)}' if rivals else ''}"
        + "".join(f" --evaluation-text {row['source']}" for row in settings["evaluation"] if kind != "texts"),
        f" --tokens {settings['protocol']['tokens_read']} --copies {copies} --dtype {settings['protocol']['dtype']}",
    ]
    head = f"    eigenattn sweep {model} {kind}-{model}"
    return " \\\n".join([head, *(f"       {option}" for option in options if option)]) + "\n"


def plot(sweeps: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Draw one picture of each kind that was run."""
    from matplotlib import pyplot

    curves = {"bits": _bits_curves, "texts": _calibration_curves, "limits": _limit_curves}
    labels = {"bits": "bits an element", "texts": "tokens calibrated on", "limits": "KV ratio of the latents"}
    for kind, by_model in sweeps.items():
        if not by_model or kind not in curves:
            continue
        figure, panels = pyplot.subplots(
            1, len(by_model), figsize=(max(5 * len(by_model), 8), 5), constrained_layout=True, squeeze=False
        )
        drawn = {model: curves[kind](sweep) for model, sweep in by_model.items()}
        names = list(dict.fromkeys(name for found in drawn.values() for name in found))
        for panel, (model, found) in zip(panels[0], drawn.items(), strict=True):
            for name, points in found.items():
                x, y = zip(*sorted(points), strict=True)
                # A model may predict better by chance: on a logarithmic axis such points lie at its lower end.
                of_name = {"color": f"C{names.index(name)}", "marker": "o"}
                style = _limit_style(name) if kind == "limits" else of_name
                panel.plot(x, [max(100 * each, 0.005) for each in y], markersize=4, label=name, **style)
            panel.set(title=MODELS[model], xlabel=labels[kind], yscale="log")
            panel.grid(alpha=0.3)
            if kind == "texts":
                panel.set_xscale("log", base=2)
        panels[0][0].set_ylabel("increase of perplexity, %")
        lines = {line.get_label(): line for panel in panels[0] for line in panel.get_lines()}
        figure.legend(lines.values(), lines, fontsize=7, loc="outside lower center", ncols=4)
        figure.savefig(DOCS / f"{kind}.png", dpi=110)
        pyplot.close(figure)


def _increase(cell: dict[str, Any]) -> float:
    return cell["texts"][0]["relative_increase"]


def _mean_increase(cell: dict[str, Any]) -> float:
    return sum(row["relative_increase"] for row in cell["texts"]) / len(cell["texts"])


def _bits_curves(sweep: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for cell in _cells(sweep):
        name = cell["method"].split("-")[0] if _is_rival(cell) else _latents(cell).strip("*")
        found.setdefault(name, []).append((_bits_of(cell), _increase(cell)))
    return found


def _calibration_curves(sweep: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Averaged over the texts that are judged."""
    found: dict[str, list[tuple[float, float]]] = {}
    for cell in _cells(sweep):
        tokens = cell["samples"] * sweep["settings"]["length"]
        found.setdefault(_calibrated_on(cell), []).append((tokens, _mean_increase(cell)))
    return found


def _limit_curves(sweep: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    return {name: [(cell["kv_ratio"], _increase(cell)) for cell in cells] for name, cells in _curves(sweep).items()}


def _limit_style(name: str) -> dict[str, str]:
    """Colours for rank rules, dashes for the paper's basis, crosses for no window."""
    basis, rule, window = name.split(", ")
    return {
        "color": f"C{sorted(RANK_RULES).index(rule)}",
        "linestyle": "-" if basis == "attention" else "--",
        "marker": "x" if window == "0" else "o",
    }
