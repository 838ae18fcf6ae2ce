"""What comes from `standard.py`: a section of docs/results.md, its plot, and the table of losses of the README.

`report_quality.py` writes them.

It is read from benchmarks/results/standard-MODEL.json.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS, PLOT = ROOT / "benchmarks" / "results", ROOT / "docs" / "standard.png"
BEGIN, END = "<!-- standard protocol: begin -->", "<!-- standard protocol: end -->"
Results = dict[str, Any]
ORIGINAL_BITS = 16
# How many more bits than ours a rival may take to be compared with (chosen: so many have scales of groups of 64, and
# what a rival stores once a sequence, beyond the sizes that ours is asked for).
WITHIN = 0.35
# Caches side by side in one table.
COLUMNS = 3
# A cache that rounds nothing, read as others are: what arithmetic in the model's dtype makes of a window.
NOTHING = "nothing coded"
TITLES = {
    "smollm2": "SmolLM2-135M-Instruct",
    "qwen": "Qwen2.5-Coder-0.5B-Instruct",
    "opt-13m": "OPT, 13M",
    "mpt-12m": "MPT, 12M",
}
# The README's models and caches, and rivals by how their names begin; of each the best variant counts.
SHOWN = ("smollm2", "qwen")
SHOWN_CACHES = tuple(f"mixture/fisher/bits/32/{size}" for size in (4.25, 3.25, 2.25))
# As many bits as the strongest rival takes.
EQUAL_CACHES = tuple(f"mixture/fisher/bits/32/{size}" for size in (4.55, 3.55, 2.55))
FAMILIES = {
    "turboquant": "TurboQuant",
    "e8": "lattice E8 (NestQuant)",
    "hadamard": "Hadamard rotation, integers (QuaRot)",
    "kivi": "KIVI",
    "plain": "integers by channel (KVQuant)",
    "hqq": "transformers' quantised cache, HQQ",
}
INTRODUCTION = """\
## The standard protocol

Ours with default options and every rival that needs no text, at equal bits, on kinds of text that ours was not
calibrated on: [evaluation](evaluation.md#the-standard-protocol) says how. Bits are those of each element outside the
exact window, everything counted. Divergence is in thousandths of a nat a token, with the standard error over windows;
perplexity is the increase over the original's; flips are tokens whose likeliest successor is another. The best rival is
the one of the least divergence on that kind of text that takes the same bits or at most 0.35 more. With "nothing coded"
is what arithmetic in the model's dtype makes of an exact window: no cache can be told from another below that.

At 4.25, 3.25 and 2.25 bits the strongest rival takes some 0.3 bits more than ours; at 4.55, 3.55 and 2.55 the same.
"""


class Place(NamedTuple):
    """Where a cell was measured."""

    length: int
    text: str
    cache: str


class Comparison(NamedTuple):
    """Ours and the best rival on one kind of text."""

    text: str
    ours: dict[str, Any]
    rival: str
    best: dict[str, Any]

    @property
    def ratio(self) -> float:
        """Of the divergences."""
        return self.ours["divergence"] / self.best["divergence"]


def place_of(key: str) -> Place:
    """The place that a cell's key names: `1024/novel/turboquant-4`."""
    length, text, cache = key.split("/", 2)
    return Place(int(length), text, cache)


def load(folder: Path = RESULTS) -> dict[str, Results]:
    """Results by model."""
    return {
        path.stem.removeprefix("standard-"): json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("standard-*.json"), key=lambda path: _rank(path.stem))
    }


def _rank(stem: str) -> tuple[int, str]:
    name, known = stem.removeprefix("standard-"), list(TITLES)
    return (known.index(name) if name in known else len(known)), name


def lengths(results: Results) -> list[int]:
    """Lengths of windows that were read, rising."""
    return sorted({place_of(key).length for key in results["cells"]})


def is_ours(results: Results, name: str) -> bool:
    """Whether a cache is one of ours."""
    return results["caches"][name].get("ours", False)


def is_rival(results: Results, name: str) -> bool:
    """Whether a cache is a rival's."""
    return name != NOTHING and not is_ours(results, name)


def bits(results: Results, name: str, length: int) -> float:
    """Bits an element outside the window, in a sequence of that length."""
    return ORIGINAL_BITS * results["caches"][name]["sizes"][str(length)]["kv_ratio"]


def cells(results: Results, length: int, name: str) -> dict[str, dict[str, Any]]:
    """What was measured of a cache at a length, by text; those in the calibration text stand last."""
    texts, matched = list(results["texts"]), results["settings"]["matched"]
    found = {}
    for text in sorted(texts, key=lambda text: text in matched):
        cell = results["cells"].get(f"{length}/{text}/{name}")
        if cell is not None:
            found[text] = cell
    return found


def foreign(results: Results, by_text: dict[str, Any]) -> dict[str, Any]:
    """Without kinds of text that are in the calibration text."""
    return {text: cell for text, cell in by_text.items() if text not in results["settings"]["matched"]}


def contenders(results: Results, least: float, most: float, length: int) -> list[str]:
    """Rivals of so many bits that were measured at a length."""
    return [
        name
        for name, cache in results["caches"].items()
        if is_rival(results, name)
        and str(length) in cache["sizes"]
        and least <= bits(results, name, length) <= most
        and cells(results, length, name)
    ]


def finalists(results: Results, sizes: Sequence[float], count: int) -> list[str]:
    """The rivals of each size with the least mean divergence on the main kinds of text."""
    length, main = lengths(results)[0], results["settings"]["main"]

    def divergence(name: str) -> float:
        return statistics.fmean(results["cells"][f"{length}/{text}/{name}"]["divergence"] for text in main)

    found: dict[str, None] = {}
    for size in sizes:
        able = contenders(results, size, size + WITHIN, length)
        found |= dict.fromkeys(sorted(able, key=divergence)[:count])
    return list(found)


def comparisons(results: Results, name: str, length: int) -> list[Comparison]:
    """One of our caches against the best rival, for each kind of text on which there is one."""
    most = results["caches"][name]["asked"] + WITHIN
    able = contenders(results, bits(results, name, length), most, length)
    found = []
    for text, ours in cells(results, length, name).items():
        by_rival = {rival: cell for rival in able if (cell := cells(results, length, rival).get(text)) is not None}
        if by_rival:
            best = min(by_rival, key=lambda rival: by_rival[rival]["divergence"])
            found.append(Comparison(text, ours, best, by_rival[best]))
    return found


def section(by_model: dict[str, Results]) -> str:
    """All tables, between their markers."""
    if not by_model:
        return f"{BEGIN}\n{END}\n"
    parts = [BEGIN, INTRODUCTION, "![Divergence against bits an element](standard.png)", ""]
    parts += [*_summary(by_model), ""]
    for model, results in by_model.items():
        parts += [f"### {TITLES.get(model, model)}, all caches", "", _facts(results), ""]
        for length in lengths(results):
            parts += [*_by_kind(results, length), "", *_all(results, length), ""]
        parts += [*_sizes(results), "", *_skipped(results), _command(results), ""]
    return "\n".join([*parts, END, ""])


def losses(by_model: dict[str, Results]) -> list[str]:
    """The README's table: ours and the best of each family of rivals, of two models."""
    shown = [(model, by_model[model]) for model in SHOWN if model in by_model]
    columns = [(model, results, name) for model, results in shown for name in SHOWN_CACHES if name in results["caches"]]
    asked = [results["caches"][name]["asked"] for _, results, name in columns]
    titles = [f"{TITLES[model].split('-')[0]}, {size:g} bits" for (model, *_), size in zip(columns, asked, strict=True)]
    ours = [f"**{_on_main(results, name):.1f}**" for _, results, name in columns]
    lines = [*_heading("cache", *titles), _row("**eigenattn**", *ours)]
    shared = [_most_shared(results, name) for _, results, name in columns]
    if any(shared):
        together = zip(columns, shared, strict=True)
        row = ["" if found is None else f"**{_on_main(results, found):.1f}**" for (_, results, _), found in together]
        lines.append(_row("**eigenattn**, a layer's heads in one latent (`--share`)", *row))
    for start, title in FAMILIES.items():
        row = []
        for (_, results, _), size in zip(columns, asked, strict=True):
            able = contenders(results, size, size + WITHIN, lengths(results)[0])
            found = [_on_main(results, name) for name in able if name.startswith(f"{start}-")]
            row.append(f"{min(found):.1f}" if found else "")
        if any(row):
            lines.append(_row(title, *row))
    return lines + _at_equal_bits(shown)


def _most_shared(results: Results, name: str) -> str | None:
    """The cache like this one in which the most heads, more than one, have keys and values in one latent."""
    sharing = re.compile(re.escape(name).replace("fisher/", r"fisher:(\d+)kv/"))
    found = {int(match[1]): match[0] for match in map(sharing.fullmatch, results["caches"]) if match}
    return found[max(found)] if max(found, default=0) > 1 else None


def _on_foreign(results: Results, name: str, length: int) -> list[Comparison]:
    """`comparisons` on kinds of text that are not in the calibration text."""
    found = {each.text: each for each in comparisons(results, name, length)}
    return [*foreign(results, found).values()]


def _means(results: Results, names: Sequence[str]) -> str:
    """The mean ratio to the best rival of each cache; empty if one of those of equal bits was not compared."""
    each = [_on_foreign(results, name, lengths(results)[0]) for name in names]
    means = [f"{statistics.fmean(one.ratio for one in several):.2f}" for several in each if several]
    return " / ".join(means) if len(means) == len(EQUAL_CACHES) else ""


def _at_equal_bits(shown: list[tuple[str, Results]]) -> list[str]:
    """A sentence on the ratios to the best rival where it has no more bits, if that was measured."""
    found = []
    for model, results in shown:
        apart = _means(results, [name for name in EQUAL_CACHES if name in results["caches"]])
        together = _means(results, [name for each in EQUAL_CACHES if (name := _most_shared(results, each))])
        if apart:
            also = f" ({together} in one latent)" if together else ""
            found.append(f"{apart}{also} on {TITLES[model].split('-')[0]}")
    if not found:
        return []
    sizes = ", ".join(name.rsplit("/", 1)[1] for name in EQUAL_CACHES)
    return [
        "",
        f"At the bits that the strongest rival takes ({sizes}), divergence over that rival's, a mean over all kinds of "
        f"text, is {', and '.join(found)}.",
    ]


def _on_main(results: Results, name: str) -> float:
    """The mean divergence on the main kinds of text, which all caches were read on, in thousandths."""
    found = cells(results, lengths(results)[0], name)
    return 1e3 * statistics.fmean(found[text]["divergence"] for text in results["settings"]["main"])


def _ours(results: Results, length: int) -> list[str]:
    return [name for name in results["caches"] if is_ours(results, name) and cells(results, length, name)]


def _row(*values: str) -> str:
    return f"| {' | '.join(values)} |"


def _heading(*names: str) -> list[str]:
    return [_row(*names), "| --- " * len(names) + "|"]


def _thousandths(cell: dict[str, Any]) -> str:
    error = cell.get("divergence_error")
    return f"{1e3 * cell['divergence']:.2f}" + (f" ± {1e3 * error:.2f}" if error is not None else "")


def _worst(by_text: dict[str, Any], figure: str) -> str:
    return max(by_text, key=lambda text: by_text[text][figure])


def _summary(by_model: dict[str, Results]) -> list[str]:
    """Ratios of divergences, means over kinds and worst kinds."""
    lines = _heading(
        *("model", "tokens", "cache", "bits", "kinds", "divergence over the best rival's, mean"),
        *("worst kind", "perplexity, mean", "worst kind"),
    )
    for model, results in by_model.items():
        for length in lengths(results):
            for name in _ours(results, length):
                by_text = foreign(results, cells(results, length, name))
                ratios = _on_foreign(results, name, length)
                if not by_text:
                    continue
                mean = worst = "no such rival"
                if ratios:
                    last = max(ratios, key=lambda each: each.ratio)
                    mean = f"{statistics.fmean(each.ratio for each in ratios):.2f}"
                    worst = f"{last.ratio:.2f} ({last.text}, `{last.rival}`)"
                increase = _worst(by_text, "relative_increase")
                lines.append(
                    _row(
                        *(TITLES.get(model, model), f"{length:,}", f"`{name}`", f"{bits(results, name, length):.2f}"),
                        *(str(len(by_text)), mean, worst, f"{_mean(by_text, 'relative_increase'):+.2%}"),
                        f"{by_text[increase]['relative_increase']:+.2%} ({increase})",
                    )
                )
    return lines


def _mean(by_text: dict[str, Any], figure: str) -> float:
    return statistics.fmean(cell[figure] for cell in by_text.values())


def _facts(results: Results) -> str:
    settings = results["settings"]
    count = {length: results["windows"][str(length)] for length in lengths(results)}
    windows = ", ".join(f"{number} windows of {length:,}" for length, number in count.items())
    matched = f" In the calibration text, and in no mean: {', '.join(settings['matched'])}." * bool(settings["matched"])
    return (
        f"For each kind of text {windows} tokens, longer ones of {' and '.join(settings['main'])} alone. Ours is "
        f"calibrated on {settings['samples']} windows of {settings['calibration_length']:,} tokens.{matched} The last "
        f"{results['window']} tokens are exact in every cache. {settings['dtype'] or 'The dtype of the checkpoint'}, "
        f"{results['machine']}, torch {results['versions']['torch']}, "
        f"transformers {results['versions']['transformers']}."
    )


def _by_kind(results: Results, length: int) -> list[str]:
    """Our caches beside the best rivals, kind by kind, in tables that fit a page."""
    lines = [f"Divergence by kind of text, {length:,} tokens: ours; the best rival's; their ratio."]
    ours = _ours(results, length)
    for names in (ours[start : start + COLUMNS] for start in range(0, len(ours), COLUMNS)):
        lines += ["", *_heading("text", "original", *(f"`{name}`" for name in names))]
        found = {name: {each.text: each for each in comparisons(results, name, length)} for name in names}
        for text in dict.fromkeys(text for name in names for text in cells(results, length, name)):
            row = []
            for name in names:
                cell, each = cells(results, length, name).get(text), found[name].get(text)
                beside = f"; `{each.rival}` {_thousandths(each.best)}; **{each.ratio:.2f}**" if each else ""
                row.append(_thousandths(cell) + beside if cell else "")
            lines.append(_row(text, f"{results['baselines'][f'{length}/{text}']['perplexity']:.2f}", *row))
    return lines


def _all(results: Results, length: int) -> list[str]:
    """Every cache, largest first."""
    lines = [f"All caches, {length:,} tokens.", ""]
    lines += _heading(
        *("cache", "bits", "kinds", "divergence, mean", "worst kind", "perplexity, mean", "worst kind"),
        *("flips", "copying", "needles"),
    )
    names = [name for name in results["caches"] if cells(results, length, name)]
    for name in sorted(names, key=lambda name: (-bits(results, name, length), name)):
        by_text = foreign(results, cells(results, length, name))
        if not by_text:
            continue
        apart, increase = _worst(by_text, "divergence"), _worst(by_text, "relative_increase")
        lines.append(
            _row(
                *(f"**`{name}`**" if is_ours(results, name) else f"`{name}`", f"{bits(results, name, length):.2f}"),
                *(str(len(by_text)), f"{1e3 * _mean(by_text, 'divergence'):.2f}"),
                *(f"{_thousandths(by_text[apart])} ({apart})", f"{_mean(by_text, 'relative_increase'):+.2%}"),
                f"{by_text[increase]['relative_increase']:+.2%} ± "
                f"{by_text[increase]['relative_increase_error'] or 0:.2%} ({increase})",
                *(f"{1 - _mean(by_text, 'top1_agreement'):.2%}", _copying(by_text), _needles(results, length, by_text)),
            )
        )
    return lines


def _copying(by_text: dict[str, Any]) -> str:
    """The share of copied tokens guessed right, and what it is more than the original's."""
    found = [cell["copying"] for cell in by_text.values() if "copying" in cell]
    if not found:
        return ""
    accuracy, apart = (statistics.fmean(each[name] for each in found) for name in ("accuracy", "difference"))
    return f"{accuracy:.1%} ({100 * apart:+.2f})"


def _needles(results: Results, length: int, by_text: dict[str, Any]) -> str:
    """Needles found; the original's alone where it finds too few for others to be asked."""
    found = [each for cell in by_text.values() for each in cell.get("needles", ())]
    if found:
        hits = round(sum(each["accuracy"] * each["items"] for each in found))
        original = round(sum(each["baseline_accuracy"] * each["items"] for each in found))
        return f"{hits} (original {original}) of {sum(each['items'] for each in found)}"
    asked = [each for text in by_text for each in results["baselines"].get(f"{length}/{text}", {}).get("needles", ())]
    if not asked:
        return ""
    hits = round(sum(each["accuracy"] * each["items"] for each in asked))
    return f"original {hits} of {sum(each['items'] for each in asked)}"


def _sizes(results: Results) -> list[str]:
    """What maps weigh, and what whole caches take: what the format needs, and what transformers allocates."""
    every = lengths(results)
    lines = [
        "Maps, and whole caches of one sequence with the exact window, in 16 bits: what the format needs; and, of "
        "ours, what the cache in transformers allocates. Rivals, here the best ones, are rounded and not packed.",
        "",
    ]
    lines += _heading("cache", "maps", "paid back after", *(f"{length:,} tokens" for length in every))
    original = {
        length: next(
            cache["sizes"][str(length)]["original_bytes"]
            for cache in results["caches"].values()
            if str(length) in cache["sizes"]
        )
        for length in every
    }
    lines.append(_row("the original", "", "", *(f"{original[length] / 1e6:.2f} MB" for length in every)))
    pairs = [(name, length) for length in every for name in _ours(results, length)]
    best = {each.rival for pair in pairs for each in comparisons(results, *pair)}
    for name, cache in results["caches"].items():
        if not is_ours(results, name) and name not in best:
            continue
        columns = []
        for length in every:
            size = cache["sizes"].get(str(length))
            needed = f"{size['format_bytes'] / 1e6:.2f} MB" if size else ""
            columns.append(f"{needed}, {size['allocated_bytes'] / 1e6:.2f} MB" if size and "ours" in cache else needed)
        if is_ours(results, name):
            ours = f"{cache['maps_bytes'] / 1e6:.2f} MB", f"{cache['pays_back_after']:,.0f} tokens"
            lines.append(_row(f"**`{name}`**", *ours, *columns))
        else:
            lines.append(_row(f"`{name}`", "none", "at once", *columns))
    return lines


def _skipped(results: Results) -> list[str]:
    if not results["skipped"]:
        return []
    found: dict[str, list[str]] = {}
    for name, reason in results["skipped"].items():
        found.setdefault(reason.replace(f"rival {name!r}", "it").replace(name, "it"), []).append(name)
    return [*(f"- Without {', '.join(names)}: {reason}" for reason, names in found.items()), ""]


def _command(results: Results) -> str:
    settings = results["settings"]
    ours = [each for each in results["caches"].values() if each.get("ours")]

    def several(name: str, values: Iterator[Any] | Sequence[Any]) -> str:
        given = " ".join(map(str, dict.fromkeys(values)))
        return f" --{name} {given}" if given else ""

    lines = [
        f"    python benchmarks/standard.py {results['model']}{several('dtype', [settings['dtype'] or ''])}",
        f"       {several('text', [f'{name}={name}.txt' for name in results['texts']])}",
        f"       {several('main', settings['main'])}{several('matched', settings['matched'])}"
        f"{several('calibration', list(results['calibrations']))}",
        f"       {several('lengths', list(results['windows']))} --windows "
        + " ".join(map(str, results["windows"].values()))
        + several("bits", [f"{each['asked']:g}" for each in ours]),
        f"        --samples {settings['samples']} --calibration-length {settings['calibration_length']}"
        f" --finalists {settings['finalists']} --copies {settings['copies']} --trials "
        + " ".join(map(str, results["trials"].values()))
        + several("depths", settings["depths"]),
    ]
    rivals = several(
        "rivals", [name for name in (*results["caches"], *results["skipped"]) if _names_rival(results, name)]
    )
    lines.append(f"       {rivals}")
    variants = several("variants", [each["variant"] for each in ours if each["variant"]])
    return " \\\n".join([*lines, *([f"       {variants}"] if variants else [])])


def _names_rival(results: Results, name: str) -> bool:
    return is_rival(results, name) if name in results["caches"] else "/" not in name and not name.startswith("windows")


def family(name: str) -> str:
    """A rival without its bits: `turboquant-4-sinks` and `turboquant-2-sinks` are one curve."""
    return "-".join(part for part in name.split("-") if part not in ("8", "4", "3", "2", "1"))


def plot(by_model: dict[str, Results]) -> None:
    """Draw mean divergence on the main kinds of text against bits, a panel a model."""
    if not by_model:
        return
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(by_model), figsize=(max(5 * len(by_model), 8), 6), layout="constrained", squeeze=False
    )
    drawn = {model: _curves(results) for model, results in by_model.items()}
    names = list(dict.fromkeys(name for curves in drawn.values() for name in curves))
    for panel, (model, curves) in zip(panels[0], drawn.items(), strict=True):
        for name, points in curves.items():
            number = names.index(name)
            ours = "/" in name
            style = {"color": f"C{number % 10}", "marker": "os^vDPX*"[number // 10 % 8], "markersize": 4}
            style["linewidth"] = 2.5 if ours else 1
            panel.plot(*zip(*sorted(points), strict=True), "-" if ours else ":", label=name, **style)
        panel.set(title=TITLES.get(model, model), xlabel="bits an element", yscale="log")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("divergence, nats a token")
    lines = {line.get_label(): line for panel in panels[0] for line in panel.get_lines()}
    figure.legend(lines.values(), lines, fontsize=7, loc="outside lower center", ncols=4)
    figure.savefig(PLOT, dpi=110)
    pyplot.close(figure)


def _curves(results: Results) -> dict[str, list[tuple[float, float]]]:
    length, main = lengths(results)[0], results["settings"]["main"]
    found: dict[str, list[tuple[float, float]]] = {}
    for name, cache in results["caches"].items():
        by_text = cells(results, length, name)
        if name == NOTHING or not all(text in by_text for text in main):
            continue
        curve = f"{cache['calibration']}/{cache['method']}" if is_ours(results, name) else family(name)
        divergence = statistics.fmean(by_text[text]["divergence"] for text in main)
        found.setdefault(curve, []).append((bits(results, name, length), divergence))
    return found
