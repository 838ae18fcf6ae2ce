"""The report of a checkpoint: what is known of it, on one page."""

from __future__ import annotations

import gc
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..cache.size import cache_bytes
from ..config import TARGETS, EigenAttentionConfig
from ..errors import EigenAttnError
from ..evaluation.generation import continue_prompt
from ..evaluation.spectra import read_spectra
from ..evaluation.sweep_folder import read_sweep
from ..evaluation.sweep_folder import table as sweep_rows
from ..models.loading import Source, load_model, load_tokenizer
from . import html
from .card import EVALUATION
from .figures import decay, effective_ranks, energy, frontier, inline_svg
from .inspection import Inspection, inspect_checkpoint
from .tables import (
    TextTable,
    calibrations,
    evaluation_tables,
    latents_in_words,
    layout_table,
    notes,
    sweep_table,
    windows_in_words,
)

PROMPTS = ("The history of the city begins with", "To make a good soup, first", "def fibonacci(n):\n")
NEW_TOKENS = 48
# Contexts to slide over, in tokens, and the one that is shown first.
CONTEXTS, SHOWN_CONTEXT = tuple(2**power for power in range(9, 21)), 2**15
GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class Material:
    """What a page is made of; only the inspection is always there.

    Args:
        evaluation, sweep, spectra: what `eigenattn evaluate`, `sweep` and `spectrum` wrote.
        continuations: prompts, each continued by the baseline and by the checkpoint.
    """

    name: str
    inspection: Inspection
    evaluation: dict[str, Any] | None = None
    sweep: dict[str, Any] | None = None
    spectra: dict[str, Any] | None = None
    baseline: str | None = None
    continuations: list[tuple[str, str, str]] = field(default_factory=list)


def gather(
    name: str,
    *,
    evaluation: Path | None = None,
    sweep: Path | None = None,
    spectra: Path | None = None,
    baseline: str | None = None,
    prompts: Sequence[str] = (),
    dtype: str | None = None,
    device: str | None = None,
) -> Material:
    """Read everything a page shows; only with a baseline are models loaded.

    Args:
        name: a compressed checkpoint.
        evaluation: a file that `eigenattn evaluate --json` wrote; by default the one kept in the checkpoint, if any.
        sweep, spectra: folders of `eigenattn sweep` and `eigenattn spectrum`.
        baseline: the original model, to set continuations side by side.

    Raises:
        EigenAttnError: if something cannot be read, or the model is not compressed.
    """
    inspection = inspect_checkpoint(name)
    if not inspection.compressed:
        raise EigenAttnError(f"{name} is not compressed: there is nothing to report.")
    saved = Path(name) / EVALUATION
    if evaluation is None and saved.is_file():
        evaluation = saved
    return Material(
        name,
        inspection,
        evaluation=_read_evaluation(evaluation) if evaluation else None,
        sweep=read_sweep(sweep) if sweep else None,
        spectra=read_spectra(spectra) if spectra else None,
        baseline=baseline,
        continuations=_continued(name, baseline, prompts or PROMPTS, dtype, device) if baseline else [],
    )


def _read_evaluation(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EigenAttnError(f"{file} could not be read: is it from `eigenattn evaluate --json`?") from error
    if not isinstance(values, dict) or not {"texts", "tasks", "needles", "protocol"} <= set(values):
        raise EigenAttnError(f"{file} holds no evaluation: give a file of `eigenattn evaluate --json`.")
    return values


def _continued(
    name: str, baseline: str, prompts: Sequence[str], dtype: str | None, device: str | None
) -> list[tuple[str, str, str]]:
    said = []
    for which in (baseline, name):
        source = Source.of(which)
        tokenizer, model = load_tokenizer(source), load_model(source, dtype, device)
        said.append([continue_prompt(model, tokenizer, each, max_new_tokens=NEW_TOKENS).text for each in prompts])
        del model
        gc.collect()
    return list(zip(prompts, *said, strict=True))


def build(material: Material) -> str:
    """The page as HTML.

    Raises:
        EigenAttnError: if it is to show spectra or a sweep, and matplotlib is absent.
    """
    found = material.inspection
    title = f"{Path(material.name).name}: KV cache at {found.kv_ratio:.1%}"
    parts = [html.heading(title, 1), *_size(found), *_ranks(found)]
    if material.evaluation is not None:
        against = material.evaluation["baseline"]
        parts.append(html.heading("Evaluation" + (f" against {against}" if against else "")))
        parts += [html.table(each) for each in evaluation_tables(material.evaluation)]
        parts += [html.paragraph(note, note=True) for note in notes(material.evaluation)]
    if material.sweep is not None:
        parts += _frontier(material.sweep)
    if material.spectra is not None:
        parts += _spectra(material.spectra)
    if material.continuations:
        parts.append(html.heading("Continuations, side by side"))
        for prompt, original, compressed in material.continuations:
            sides = ((material.baseline, original), (Path(material.name).name, compressed))
            parts.append('<div class="pair">')
            parts += [
                f'<div>{html.heading(str(who), 3)}<div class="said"><i>{html.escape(prompt)}</i>'
                f"{html.escape(text)}</div></div>"
                for who, text in sides
            ]
            parts.append("</div>")
    return html.page(title, parts + _origin(material))


def _size(found: Inspection) -> list[str]:
    saved = 1 - found.kv_ratio
    parts = [
        html.facts(
            [
                ("of the original's cache", f"{found.kv_ratio:.1%}"),
                ("cache bytes a token", f"{found.bytes_per_token:,}"),
                ("in the original", f"{found.baseline_bytes_per_token:,}"),
                ("exact tokens", str(found.window)),
            ]
        ),
        html.paragraph(f"A cached token outside the exact window takes {saved:.1%} fewer bytes than in the original."),
    ]
    if found.window:
        rows = [[f"{length:,}", f"{ratio:.3f}"] for length, ratio in found.ratio_at.items()]
        parts.append(html.table(TextTable(["tokens in the cache", "ratio of the whole cache, window included"], rows)))
    return [*parts, _memory(found)]


def _memory(found: Inspection) -> str:
    original = [layer.original for layer in found.layers]
    steps = []
    for length in CONTEXTS:
        before = cache_bytes(original, found.element_size, length)
        after = cache_bytes(found.layers, found.element_size, length)
        steps.append(
            {
                "tokens of one sequence": f"{length:,}",
                "the original's cache": _size_in_words(before),
                "this cache, window included": _size_in_words(after),
                "sequences in the bytes of one": f"{before / after:.1f}",
            }
        )
    return html.slider("How long is a sequence?", steps, CONTEXTS.index(SHOWN_CONTEXT))


def _size_in_words(size: int) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB else f"{size / MIB:,.1f} MiB"


def _ranks(found: Inspection) -> list[str]:
    caption = (
        f"Rank of keys (up) and of values (down) in each layer, of full rank, which is the frame: "
        f"{latents_in_words(found.layers)}. A latent of both stands in both halves."
    )
    numbers = html.table(layout_table(found.layers, found.element_size))
    return [
        html.heading("Ranks by layer"),
        html.figure(html.rank_map(found.layers), caption),
        f"<details><summary>In numbers</summary>{numbers}</details>",
    ]


def _frontier(sweep: dict[str, Any]) -> list[str]:
    texts = [row["text"] for row in sweep["baseline"]["texts"]]
    drawn = ", ".join(f"{samples} windows of {name}" for name, samples in calibrations(sweep)) or "nothing"
    return [
        html.heading("Quality against cache size"),
        *_sizes_measured(sweep),
        html.figure(
            inline_svg(frontier(sweep), "frontier", "quality against cache bytes, by method"),
            "Methods are basis / rank rule / exact window; others are plain quantised caches.",
        ),
        html.table(sweep_table(sweep_rows(sweep), texts)),
        html.paragraph(
            f"Calibrated on {drawn}, of {sweep['settings']['length']:,} tokens each. The columns of texts show the "
            "increase of perplexity with the standard error of the paired difference.",
            note=True,
        ),
    ]


def _sizes_measured(sweep: dict[str, Any]) -> list[str]:
    """A slider over the sizes that a sweep measured: of each the best of ours, and the best rival of no fewer bytes."""
    cells = list(sweep["cells"].values())
    ours = [cell for cell in cells if "asked" in cell]
    best: dict[int, dict[str, Any]] = {}
    for cell in sorted(ours, key=_mean_increase):
        best.setdefault(cell["cache_bytes"], cell)
    # Of two sizes the smaller one is left out where it is the worse for no fewer bytes: what remains is the frontier.
    frontier_cells: list[dict[str, Any]] = []
    for size in sorted(best, reverse=True):
        while frontier_cells and _mean_increase(frontier_cells[-1]) >= _mean_increase(best[size]):
            frontier_cells.pop()
        frontier_cells.append(best[size])
    if len(frontier_cells) < 2:
        return []
    rivals = [cell for cell in cells if "asked" not in cell]
    steps = []
    for cell in frontier_cells:
        step = {
            "of the original's cache": f"{cell['kv_ratio']:.1%}",
            "increase of perplexity": f"{_mean_increase(cell):+.2%}",
            "method": cell["method"],
        }
        if rivals:
            larger = [each for each in rivals if each["cache_bytes"] >= cell["cache_bytes"]]
            beside = min(larger, key=_mean_increase, default=None)
            step["best rival of as many bytes"] = (
                f"{beside['method']}: {_mean_increase(beside):+.2%}" if beside else "none"
            )
        steps.append(step)
    note = "Increases are means over the texts. Each size is the best of ours that was measured in as many bytes."
    return [html.slider("Which size?", steps), html.paragraph(note, note=True)]


def _mean_increase(cell: dict[str, Any]) -> float:
    return sum(text["relative_increase"] for text in cell["texts"]) / len(cell["texts"])


def _spectra(spectra: dict[str, Any]) -> list[str]:
    drawn = (
        (decay, "decay", "How fast eigenvalues fall: a curve for each head."),
        (energy, "energy", "Energy left out at each rank: a curve for each layer."),
        (
            effective_ranks,
            "effective-rank",
            "Effective rank, the exponential of the spectrum's entropy, by layer and head.",
        ),
    )
    texts = ", ".join(text["source"] for text in spectra["text"])
    return [
        html.heading("Spectra"),
        *(html.figure(inline_svg(draw(spectra), name, caption), caption) for draw, name, caption in drawn),
        html.paragraph(
            f"Basis {spectra['basis']}, {spectra['samples']} windows of {spectra['length']:,} tokens of {texts}.",
            note=True,
        ),
    ]


def _origin(material: Material) -> list[str]:
    facts = material.inspection.provenance
    rows = []
    for name, value in facts.items():
        if name == "text":
            value = ", ".join(
                f"{each['source']}" + (f" (SHA-256 {each['sha256'][:12]}…)" if each.get("sha256") else "")
                for each in value
            )
        elif name == "statistics":
            value = "; ".join(map(windows_in_words, value))
        elif isinstance(value, dict):
            value = ", ".join(f"{key} {each}" for key, each in value.items())
        rows.append([name.replace("_", " "), str(value)])
    rows += [[name.replace("_", " "), str(value)] for name, value in material.inspection.method.items()]
    return [
        html.heading("Where it comes from"),
        html.table(TextTable(["", ""], rows)),
        html.heading("To make it again"),
        html.code(commands(material)),
    ]


def _options(values: Mapping[str, Any]) -> list[str]:
    """Options as they are written; None is left out, and one that holds a list is repeated."""
    line: list[str] = []
    for name, value in values.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            line.append(f"--{option}" if value else "--uncoded" if name == "coded" else f"--no-{option}")
        elif value is not None:
            for each in value if isinstance(value, list) else [value]:
                line += [f"--{option}", str(each)]
    return line


def _asked(method: dict[str, Any]) -> dict[str, Any]:
    """What has to be asked for to get a configuration, whose defaults depend on each other."""
    target = {name: method[name] for name in TARGETS if method.get(name) is not None}
    defaults = EigenAttentionConfig(**target).to_dict()
    # The default of each hangs on those before it, and a basis that is named says that latents are not coded.
    dependent = ("coded", "basis", "refit", "coded")
    free = {name: value for name, value in method.items() if name not in (*dependent, "version")}
    asked = target | {n: value for n, value in free.items() if value is not None and value != defaults.get(n)}
    for name in dependent:
        if name in method and getattr(EigenAttentionConfig(**asked), name) != method[name]:
            asked[name] = method[name]
    return {name: asked[name] for name in method if name in asked}


def commands(material: Material) -> list[str]:
    """The commands that give this checkpoint, and what the page shows of it."""
    facts, method, spectra = material.inspection.provenance, material.inspection.method, material.spectra
    base, choices, lines = str(facts.get("base_model", "MODEL")), _options(_asked(method)), []
    read = _options(_reading_options(facts))
    if "statistics" in facts:
        folders = [f"STATISTICS-{number}" for number, _ in enumerate(facts["statistics"], 1)]
        latents = _options({name: method.get(name) for name in ("window", "share")})
        lines += [
            ["calibrate", base, folder, *latents, *_options(_reading_options(each)), *read]
            for folder, each in zip(folders, facts["statistics"], strict=True)
        ]
        read = [*_options({"statistics": folders}), *read]
    lines.append(["compress", base, material.name, *choices, *read])
    if material.evaluation is not None:
        lines.append(["evaluate", material.name, *_options(_evaluation_options(material.evaluation))])
    if material.sweep is not None:
        model = material.sweep["settings"]["model"]
        cells = [cell for cell in material.sweep["cells"].values() if "asked" in cell]
        for coded, unit in ((None, 1), (True, 16)):
            ratios = {cell["asked"] / unit for cell in cells if (cell["bits_per_element"] is not None) == bool(coded)}
            if ratios:
                asked = ",".join(f"{ratio:g}" for ratio in sorted(ratios, reverse=True))
                lines.append(["sweep", model, "SWEEP", *_options({"coded": coded, "kv_ratio": asked})])
    if spectra is not None:
        options = {name: spectra[name] for name in ("basis", "samples")}
        options["text"] = [text["source"] for text in spectra["text"]]
        lines.append(["spectrum", spectra["model"], "SPECTRUM", *_options(options)])
    return [shlex.join(["eigenattn", *line]) for line in lines]


def _reading_options(facts: Mapping[str, Any]) -> dict[str, Any]:
    """By which a text is read again."""
    names = ("samples", "length", "seed", "dtype")
    return {"text": [text["source"] for text in facts.get("text", [])], **{name: facts.get(name) for name in names}}


def _evaluation_options(result: dict[str, Any]) -> dict[str, Any]:
    protocol = result["protocol"]
    return {
        "baseline": result["baseline"],
        "text": [row["text"] for row in result["texts"]],
        "tokens": protocol["tokens_read"],
        "length": protocol["length"],
        "stride": protocol["stride"] if protocol["stride"] != protocol["length"] else None,
        "cached": True if protocol["reading"] == "cached" else None,
        "evict": protocol.get("evict"),
        "budget": protocol.get("budget"),
        "tasks": ",".join(row["task"] for row in result["tasks"]) or None,
        "limit": protocol["task_limit"],
        "needles": ",".join(dict.fromkeys(str(row["length"]) for row in result["needles"])) or None,
        "dtype": protocol["dtype"],
    }
