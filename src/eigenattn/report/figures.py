"""Pictures, drawn with matplotlib: as files, or as SVG that stands inside a page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EigenAttnError
from ..files import whole
from .tables import calibrations

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What is drawn in this grey takes the colour of the text around it in a page, dark or light; it reads on both.
INK = "#767676"
# Up to this many per cent of increase the axis is linear: differences there are often below zero, by chance.
LINEAR = 0.1


def new_figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, Any]:
    """An empty figure and its axes, [rows, columns]; one axis alone stands for itself.

    Raises:
        EigenAttnError: if matplotlib is absent.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise EigenAttnError("pictures need matplotlib: pip install 'eigenattn[plot]'.") from None
    style: dict[Any, Any] = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    )
    style |= {"font.size": 9, "grid.color": INK}
    style |= {"axes.facecolor": "none", "figure.facecolor": "none", "axes.titlecolor": INK}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns)


def save_figure(figure: Figure, path: Path) -> None:
    """Write `path` with `.png` and `.svg`.

    Raises:
        EigenAttnError: if they cannot be written.
    """
    with whole(path.with_suffix(".png")) as png, whole(path.with_suffix(".svg")) as svg:
        _write(figure, png, "png", dpi=150, facecolor="white")
        _write(figure, svg, "svg", transparent=True)


def _write(figure: Figure, target: Any, kind: str, **options: Any) -> None:
    import matplotlib

    # Letters as text, the same names on every run, and no date: files differ only where figures do.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "eigenattn"}):
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(target, format=kind, metadata=metadata, **options)


def inline_svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an `<svg>` element of a page, which takes the page's colour of text and the width there is.

    Args:
        name: makes its ids unique in the page.
        label: what it shows, in words.
    """
    stream = io.StringIO()
    _write(figure, stream, "svg", transparent=True)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    # Letters stay legible on a narrow screen, where the page lets the picture scroll.
    points = figure.get_size_inches()[0] * 72
    tag = f'<svg role="img" aria-label="{label}" style="min-width: {0.8 * points:.0f}px; max-width: {2 * points:.0f}px"'
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf"{tag} \1>", svg, count=1)


def frontier(values: dict[str, Any]) -> Figure:
    """Quality against cache bytes, one curve for each method: what `sweep.json` holds, a panel for each text."""
    texts = [text["text"] for text in values["baseline"]["texts"]]
    panels: list[tuple[str, str, Callable[[dict[str, Any]], tuple[float, float | None] | None]]] = [
        (f"perplexity, {text}", "increase, %", lambda cell, index=index: _increase(cell["texts"][index]))
        for index, text in enumerate(texts)
    ]
    if "copying" in values["baseline"]:
        panels.append(("copying", "accuracy, %", lambda cell: _percent(cell.get("copying"))))
    if values["baseline"]["needles"]:
        panels.append(("needles found", "mean accuracy, %", _needles))
    for task in values["baseline"]["tasks"]:
        panels.append((task["task"], "accuracy, %", lambda cell, name=task["task"]: _percent(_named(cell, name))))
    figure, axes = new_figure(5.0, 3.4 * len(panels), rows=len(panels))
    several = len(calibrations(values)) > 1

    def curve_of(cell: dict[str, Any]) -> str:
        if not several or "samples" not in cell:
            return cell["method"]
        return f"{cell['method']}, {cell['samples']} x {cell['calibration']}"

    curves = dict.fromkeys(map(curve_of, values["cells"].values()))
    length = values["settings"]["protocol"]["length"]
    for (title, unit, figure_of), axis in zip(panels, axes if len(panels) > 1 else [axes], strict=True):
        for curve in curves:
            cells = sorted(
                (cell for cell in values["cells"].values() if curve_of(cell) == curve),
                key=lambda cell: cell["cache_bytes"],
            )
            points = [(cell["cache_bytes"] / 2**20, figure_of(cell)) for cell in cells]
            _curve(axis, [(x, *point) for x, point in points if point is not None], curve)
        if unit == "increase, %":
            axis.set_yscale("symlog", linthresh=LINEAR)
            axis.axhline(0, linestyle=":", color=INK)
        else:
            base = figure_of(values["baseline"])
            axis.axhline(base[0] if base else 0, linestyle=":", color=INK, label="original")
        axis.set(title=title, xlabel=f"cache of {length:,} tokens at 16 bits, MiB", ylabel=unit)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, frameon=False, labelcolor=INK)
    return figure


def calibration_study(values: dict[str, Any]) -> Figure:
    """Quality against the tokens calibrated on: a row for each method and size, a panel for each text read."""
    texts = [text["text"] for text in values["baseline"]["texts"]]
    cells = [cell for cell in values["cells"].values() if "calibration" in cell]
    length = values["settings"]["length"]
    rows = list(dict.fromkeys((cell["method"], cell["asked"]) for cell in cells))
    figure, axes = new_figure(3.2 * len(texts) + 1, 2.6 * len(rows), columns=len(texts), rows=len(rows))
    grid = [axes] if len(texts) == len(rows) == 1 else list(getattr(axes, "flat", axes))
    panels = ((row, index) for row in rows for index in range(len(texts)))
    for axis, ((method, asked), index) in zip(grid, panels, strict=True):
        for name in dict.fromkeys(cell["calibration"] for cell in cells):
            of_curve = [c for c in cells if (c["calibration"], c["method"], c["asked"]) == (name, method, asked)]
            _curve(axis, sorted((c["samples"] * length, *_increase(c["texts"][index])) for c in of_curve), name)
        axis.set(
            title=f"{method} at {asked:g}, read: {texts[index]}", xlabel="tokens calibrated on", ylabel="increase, %"
        )
        axis.title.set_fontsize(7)
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    grid[0].legend(fontsize=7, frameon=False, labelcolor=INK)
    return figure


def _curve(axis: Any, points: list[tuple[float, float, float | None]], label: str) -> None:
    """Figures with their standard errors, where they have some."""
    if points:
        x, y, error = zip(*points, strict=True)
        axis.errorbar(x, y, yerr=[e or 0.0 for e in error], marker="o", markersize=4, label=label)


def _increase(text: dict[str, Any]) -> tuple[float, float | None]:
    error = text["relative_increase_error"]
    return 100 * text["relative_increase"], None if error is None else 100 * error


def _percent(row: dict[str, Any] | None) -> tuple[float, float | None] | None:
    if row is None:
        return None
    # Curves are compared with the original's line, and that difference is paired.
    error = row.get("difference_error")
    return 100 * row["accuracy"], None if error is None else 100 * error


def _needles(cell: dict[str, Any]) -> tuple[float, float | None] | None:
    rows = cell["needles"]
    return (100 * sum(row["accuracy"] for row in rows) / len(rows), None) if rows else None


def _named(cell: dict[str, Any], task: str) -> dict[str, Any] | None:
    return next((row for row in cell["tasks"] if row["task"] == task), None)


def decay(values: dict[str, Any]) -> Figure:
    """Eigenvalues relative to the largest, a curve for each head, coloured by layer: what `spectrum.json` holds."""

    def curves(side: str, layer: int) -> list[list[float]]:
        heads = values[side]["eigenvalues"][layer]
        return [[max(value / (head[0] or 1.0), FAINTEST) for value in head] for head in heads]

    return _by_layer(values, curves, xlabel="direction", ylabel="eigenvalue, of the largest", linewidth=0.7, alpha=0.7)


def energy(values: dict[str, Any]) -> Figure:
    """Energy that is left out at each rank, a curve for each layer, heads averaged."""

    def curves(side: str, layer: int) -> list[list[float]]:
        heads = values[side]["energy_kept"][layer]
        lost = (1 - sum(kept) / len(kept) for kept in zip(*heads, strict=True))
        return [[share for share in lost if share > FAINTEST]]

    return _by_layer(values, curves, xlabel="rank", ylabel="energy left out", linewidth=1)


def _by_layer(
    values: dict[str, Any], curves: Callable[[str, int], list[list[float]]], xlabel: str, ylabel: str, **style: Any
) -> Figure:
    """A panel for each side, and in it the curves of every layer in a colour of its own."""
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure, axes = new_figure(8.0, 3.4, columns=2)
    layers = len(values["keys"]["eigenvalues"])
    colours: Any = ScalarMappable(Normalize(0, max(layers - 1, 1)), matplotlib.colormaps["viridis"])
    for axis, side, title in zip(axes, ("keys", "values"), spectrum_titles(values), strict=True):
        for layer in range(layers):
            for curve in curves(side, layer):
                axis.plot(range(1, len(curve) + 1), curve, color=colours.to_rgba(layer), **style)
        axis.set(title=title, xlabel=xlabel, ylabel=ylabel, yscale="log")
        axis.grid(alpha=0.3)
    _bar(figure, axes, colours, "layer")
    return figure


def effective_ranks(values: dict[str, Any]) -> Figure:
    """Effective rank of every layer and head, as a map."""
    layers, heads = len(values["keys"]["effective_rank"]), len(values["keys"]["effective_rank"][0])
    figure, axes = new_figure(8.0, max(2.2, min(0.22 * heads + 1.4, 8.0)), columns=2)
    most = len(values["keys"]["eigenvalues"][0][0])
    for axis, side, title in zip(axes, ("keys", "values"), spectrum_titles(values), strict=True):
        by_head = list(zip(*values[side]["effective_rank"], strict=True))
        # As vectors, so that the page needs no picture of pixels.
        mesh = axis.pcolormesh(
            range(layers), range(heads), by_head, vmin=0, vmax=most, cmap="viridis", shading="nearest"
        )
        axis.set(title=title, xlabel="layer", ylabel="KV head")
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.xaxis.get_major_locator().set_params(integer=True)
    _bar(figure, axes, mesh, f"effective rank, of {most}")
    return figure


# Below this share curves are cut off: it is rounding.
FAINTEST = 1e-8


def spectrum_titles(values: dict[str, Any]) -> tuple[str, str]:
    """What the two sides' spectra are of."""
    return ("keys and queries" if values["basis"] == "eigen" else "keys, as queries see them", "values")


def _bar(figure: Figure, axes: Any, mappable: Any, label: str) -> None:
    bar = figure.colorbar(mappable, ax=list(axes), label=label)
    bar.ax.yaxis.label.set_color(INK)
    bar.ax.tick_params(colors=INK)
    bar.outline.set_edgecolor(INK)
