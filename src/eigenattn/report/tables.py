"""Evaluation results as tables, which the terminal, the model card and the page all show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..cache.layout import SIDES, Latent, Layout


@dataclass(frozen=True)
class TextTable:
    """A table: headings, and rows of text."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """As Markdown has tables."""
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


def with_error(row: Mapping[str, Any], name: str, form: str, of: str = "") -> str:
    """A figure and, if it has one, its standard error; in a table that has several, of one text."""
    error = row[f"{name}_error{of}"]
    return f"{row[f'{name}{of}']:{form}}" + ("" if error is None else f" ± {error:{form.lstrip('+')}}")


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
        increases = [with_error(row, "relative_increase", "+.2%", of=f" ({text})") for text in texts]
        asked = "" if row["asked"] is None else f"{row['asked']:g}" + (" bits" if row["bits_per_element"] else "")
        drawn = ["" if row[name] is None else str(row[name]) for name in varied]
        others = ["" if row.get(name) is None else f"{row[name]:.1%}" for name in extra]
        sizes = [asked, f"{row['kv_ratio']:.3f}", f"{row['cache_ratio']:.3f}"]
        shown.append([row["method"], *drawn, *sizes, *increases, *others])
    return TextTable(["method", *varied, "asked", "KV ratio", "whole cache", *texts, *extra], shown)


# What latents are called, by the sides that they are made of.
_IN_WORDS = {("key",): "keys", ("value",): "values", SIDES: "keys and values"}


def sides_in_words(layer: Layout, latent: Latent) -> str:
    """What a latent of a layer is called."""
    return _IN_WORDS[SIDES if layer.tied else latent.sides]


def layout_table(layers: Sequence[Layout], element_size: int) -> TextTable:
    """The latents of each layer, a row each: their ranks, channels by width where they are coded, and bytes a token."""
    latents = [latent for layer in layers for latent in layer.latents]
    widths = sorted({bits for latent in latents if latent.widths for bits, _ in latent.widths.counts}, reverse=True)
    heading = f"channels of {', '.join(map(str, widths))} bits"
    kinds = dict.fromkeys((latent.sides, sides_in_words(layer, latent)) for layer in layers for latent in layer.latents)
    headings, columns = ["layer"], []
    for sides, name in kinds:
        found = [next((latent for latent in layer.latents if latent.sides == sides), None) for layer in layers]
        headings.append(f"rank of {name}")
        columns.append(["" if latent is None else f"{latent.rank} of {latent.full_rank}" for latent in found])
        if any(latent and latent.widths for latent in found):
            headings.append(f"{name}, {heading}")
            counts = [dict(latent.widths.counts) if latent and latent.widths else None for latent in found]
            columns.append(["" if of is None else ", ".join(str(of.get(bits, 0)) for bits in widths) for of in counts])
    sizes = [f"{layer.bytes_per_token(element_size):,}" for layer in layers]
    rows = zip(map(str, range(len(layers))), *columns, sizes, strict=True)
    return TextTable([*headings, "bytes a token"], list(rows))


def memory_table(memory: Mapping[str, Mapping[str, int | None]]) -> TextTable:
    """Bytes of weights and of caches, of the original at 16 bits and of a model as it is stored."""
    rows = [
        [name, *("" if each is None else f"{each / 1e6:,.1f}" for each in sizes.values())]
        for name, sizes in memory.items()
    ]
    return TextTable(["megabytes", "original, 16 bits", "this model"], rows)


def latents_in_words(layers: Sequence[Layout]) -> str:
    """What the latents of a model are made of: `latents of keys of one KV head, values of 3 KV heads`."""
    kinds = dict.fromkeys(
        (sides_in_words(layer, latent), latent.heads)
        for layer in layers
        for latent in layer.latents
        if not latent.verbatim
    )
    words = [f"{sides} of {f'{n} KV heads' if n > 1 else 'one KV head'}" for sides, n in kinds]
    return f"latents of {', '.join(words)}" if words else "full rank"


def windows_in_words(facts: Mapping[str, Any]) -> str:
    """What statistics were collected on."""
    texts = ", ".join(
        text["source"] + (f" (SHA-256 {text['sha256']})" if text["sha256"] else "") for text in facts["text"]
    )
    return f"{facts['samples']} windows of {facts['length']} tokens, seed {facts['seed']}, of {texts}"
