"""Evaluation results as tables, which the terminal, the model card and the page all show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TextTable:
    """A table: headings, and rows of text."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [self.headings, ["---"] * len(self.headings), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def evaluation_tables(result: Mapping[str, Any]) -> list[TextTable]:
    """Texts, and everything that has an accuracy: what `eigenattn evaluate --json` writes, or the same in memory."""
    compared = result["baseline"] is not None
    tables = []
    if result["texts"]:
        extra = ["baseline", "increase", "KL divergence", "same top-1"] if compared else []
        tables.append(
            TextTable(["text", "tokens", "perplexity", *extra], [_text(row, compared) for row in result["texts"]])
        )
    rows = [(row["task"], row) for row in result["tasks"]]
    rows += [(f"{row['task']}, normalised", row["normalised"]) for row in result["tasks"] if "normalised" in row]
    rows += [("copying", result["copying"])] if "copying" in result else []
    rows += [(f"needle at {row['depth']:.0%} of {row['length']:,} tokens", row) for row in result["needles"]]
    if rows:
        extra = ["baseline", "difference"] if compared else []
        tables.append(
            TextTable(["", "items", "accuracy", *extra], [_accuracy(name, row, compared) for name, row in rows])
        )
    return tables


def notes(result: Mapping[str, Any]) -> list[str]:
    """How it was measured, and what the figures cannot say."""
    protocol, window = result["protocol"], result["window"]
    said = [
        f"KV ratio {result['kv_ratio']:.3f}, last {window} tokens exact. Windows of {protocol['length']:,} tokens, one "
        f"every {protocol['stride']:,}, {protocol['reading']}, {protocol['dtype']}. ± is one standard error"
        + (", of the paired difference where two models are compared." if result["baseline"] is not None else ".")
    ]
    said += [
        f"{row['task']} has {row['mean_tokens']:.0f} tokens an item, and the last {window} are exact: it says little "
        "of the compressed cache."
        for row in result["tasks"]
        if row["mean_tokens"] <= 2 * window
    ]
    return said


def _text(row: Mapping[str, Any], compared: bool) -> list[str]:
    cells = [row["text"], f"{row['tokens']:,}", with_error(row, "perplexity", ".3f")]
    if compared:
        cells += [f"{row['baseline_perplexity']:.3f}", with_error(row, "relative_increase", "+.2%")]
        cells += [with_error(row, "divergence", ".4f"), with_error(row, "top1_agreement", ".2%")]
    return cells


def _accuracy(name: str, row: Mapping[str, Any], compared: bool) -> list[str]:
    cells = [name, str(row["items"]), with_error(row, "accuracy", ".1%")]
    if compared:
        cells += [f"{row['baseline_accuracy']:.1%}", with_error(row, "difference", "+.1%")]
    return cells


def with_error(row: Mapping[str, Any], name: str, form: str) -> str:
    """A figure and, if it has one, its standard error."""
    error = row[f"{name}_error"]
    return f"{row[name]:{form}}" + ("" if error is None else f" ± {error:{form.lstrip('+')}}")


def calibrations(values: Mapping[str, Any]) -> list[tuple[str, int]]:
    """What the cells of a sweep were calibrated on, and on how many windows of it; rivals need none."""
    found = ((cell["calibration"], cell["samples"]) for cell in values["cells"].values() if "calibration" in cell)
    return list(dict.fromkeys(found))


def sweep_table(rows: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> TextTable:
    """Cells of a sweep, from `eigenattn.evaluation.sweep_folder.table`."""
    extra = [name for name in (rows[0] if rows else {}) if name in ("copying", "needles") or name.startswith("task ")]
    varied = [name for name in ("calibration", "samples") if len({row[name] for row in rows} - {None}) > 1]
    shown = []
    for row in rows:
        increases = [
            with_error(
                {
                    "increase": row[f"relative_increase ({text})"],
                    "increase_error": row[f"relative_increase_error ({text})"],
                },
                "increase",
                "+.2%",
            )
            for text in texts
        ]
        asked = "" if row["asked"] is None else f"{row['asked']:g}" + (" bits" if row["bits_per_element"] else "")
        drawn = ["" if row[name] is None else str(row[name]) for name in varied]
        others = ["" if row.get(name) is None else f"{row[name]:.1%}" for name in extra]
        sizes = [asked, f"{row['kv_ratio']:.3f}", f"{row['cache_ratio']:.3f}"]
        shown.append([row["method"], *drawn, *sizes, *increases, *others])
    return TextTable(["method", *varied, "asked", "KV ratio", "whole cache", *texts, *extra], shown)


def full_rank(of: Sequence[int]) -> str:
    """The full ranks of keys and of values, in words."""
    keys, values = of
    return str(keys) if keys == values else f"{keys} and {values}"


def rank_titles(layers: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What ranks, and widths if there are any, are called over their columns, by name."""
    joint = any(not layer["rank_v"] for layer in layers)
    titles = {"rank_k": "rank of keys, or of both" if joint else "rank of keys", "rank_v": "rank of values"}
    if any("widths_k" in layer for layer in layers):
        titles |= {
            "widths_k": "both in 8, 6, 4, 2 bits" if joint else "keys of 8, 6, 4, 2 bits",
            "widths_v": "values of 8, 6, 4, 2 bits",
        }
    return titles
