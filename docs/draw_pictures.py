"""Draw the pictures that explain, for light pages and for dark ones, into `pictures/` beside this file.

They are drawn to scale: in `cache` an area is a number of bytes. `python docs/draw_pictures.py`
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

FOLDER = Path(__file__).with_name("pictures")
# Bits of channels, and how many in a hundred have them (chosen: 4 bits on average, widths of a few kinds; those of a
# checkpoint are what `eigenattn inspect` shows).
WIDTHS = {8: 12, 6: 19, 4: 36, 2: 23, 0: 10}
WINDOW = 32


class Colours(NamedTuple):
    """Of one kind of page; `codes` are those of channels, of many bits first."""

    ink: str
    soft: str
    back: str
    exact: str
    other: str
    codes: tuple[str, ...]


THEMES = {
    "light": Colours(
        "#1f2328", "#59636e", "#ffffff", "#8c959f", "#c2571a", ("#0b4a8f", "#2f74c0", "#6ea8ea", "#b9d6f7")
    ),
    "dark": Colours(
        "#e6edf3", "#9198a1", "#0d1117", "#6e7681", "#f09a5e", ("#cfe4ff", "#8fc0f7", "#4f8fd8", "#2b5a94")
    ),
}


def svg(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    """A whole picture, with what it shows in words."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" font-size="16">'
        f"<title>{escape(label)}</title>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def text(x: float, y: float, words: str, fill: str, anchor: str = "start", more: str = "") -> str:
    """A line of text."""
    return f'<text x="{x:g}" y="{y:g}" fill="{fill}" text-anchor="{anchor}"{more}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, more: str = "") -> str:
    """A rectangle."""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"{more}/>'


def arrow(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    """A line with a head at its end."""
    turn = math.atan2(y2 - y1, x2 - x1)
    wings = [(x2 - 9 * math.cos(turn + side), y2 - 9 * math.sin(turn + side)) for side in (0.45, -0.45)]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in [wings[0], (x2, y2), wings[1]])
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="2"/>'
        f'<polygon points="{points}" fill="{colour}"/>'
    )


def cache(c: Colours) -> str:
    """What a cache of 256 tokens holds, before and after: width is tokens, height bits a number."""
    tokens, left, wide, full, gap = 256, 16, 568, 104, 1
    columns = tokens // 8
    step, exact = wide / columns, WINDOW // 8
    parts = [text(left, 24, "Before: every token at 16 bits a number", c.ink, more=' font-weight="600"')]
    top = 38
    parts += [box(left + i * step, top, step - gap, full, c.exact) for i in range(columns)]
    top += full + 48
    parts.append(text(left, top, "After: 4 bits a number, where they count", c.ink, more=' font-weight="600"'))
    top += 14
    for i in range(columns - exact):
        y = top + full
        for colour, (bits, share) in zip(c.codes, WIDTHS.items(), strict=False):
            height = full * bits * share / 1600
            y -= height
            parts.append(box(left + i * step, y, step - gap, height - 0.5, colour))
    parts += [box(left + i * step, top, step - gap, full, c.exact) for i in range(columns - exact, columns)]
    middle = left + (columns - exact) * step / 2
    parts.append(text(middle, top + 40, "three quarters less", c.soft, "middle", ' font-size="18"'))
    y = top + full + 24
    edge = left + wide
    parts.append(text(left, y, "older tokens: the directions that", c.soft))
    parts.append(text(left, y + 20, "predictions depend on, in", c.soft))
    x = left + 214
    for colour, bits in zip(c.codes, WIDTHS, strict=False):
        parts += [box(x, y + 8, 14, 14, colour), text(x + 19, y + 20, str(bits), c.soft)]
        x += 40
    parts.append(text(x, y + 20, "or 0 bits", c.soft))
    parts.append(text(edge, y, f"the last {WINDOW}: exact", c.soft, "end"))
    return svg(600, int(y + 34), "A KV cache before and after compression, drawn to scale", parts)


def directions(c: Colours) -> str:
    """Two directions of a head: how widely keys vary, and how much their errors cost, are not the same."""
    parts: list[str] = []
    for left, title, under in (
        (0, "What keys are like", "They vary most along a."),
        (300, "What an error costs", "Queries look along b."),
    ):
        parts.append(text(left + 150, 26, title, c.ink, "middle", ' font-weight="600"'))
        parts.append(text(left + 150, 262, under, c.soft, "middle"))
    centre, turn = (150, 140), math.radians(-25)
    cosine, sine = math.cos(turn), math.sin(turn)

    def place(x: float, y: float, left: float) -> tuple[float, float]:
        return left + centre[0] + cosine * x - sine * y, centre[1] + sine * x + cosine * y

    # Points at even angles and radii: a cloud that is the same on every run.
    for i in range(110):
        radius, angle = math.sqrt((i + 0.5) / 110), i * 2.399963
        x, y = place(105 * radius * math.cos(angle), 34 * radius * math.sin(angle), 0)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{c.codes[1]}"/>')
    for step, size in enumerate((1.0, 0.66, 0.33)):
        x, y = place(0, 0, 300)
        parts.append(
            f'<ellipse cx="{x:.1f}" cy="{y:.1f}" rx="{110 * size:.1f}" ry="{36 * size:.1f}" '
            f'transform="rotate({math.degrees(turn):.0f} {x:.1f} {y:.1f})" fill="none" stroke="{c.other}" '
            f'stroke-width="{1.4 + 0.5 * step:.1f}"/>'
        )
    for left in (0, 300):
        for name, x, y in (("a", 122, 0), ("b", 0, -78)):
            start, end, label = place(0, 0, left), place(x, y, left), place(1.13 * x, 1.2 * y, left)
            parts.append(arrow(*start, *end, c.ink))
            parts.append(text(label[0], label[1] + 5, name, c.ink, "middle", ' font-style="italic"'))
    parts.append(
        text(
            300,
            292,
            "On each ring right an error costs the same: along b a small one costs what a",
            c.ink,
            "middle",
            ' font-size="15"',
        )
    )
    parts.append(
        text(
            300,
            314,
            "large one costs along a. Bits follow variance times cost, not variance.",
            c.ink,
            "middle",
            ' font-size="15"',
        )
    )
    return svg(600, 328, "Keys vary along one direction, and errors cost along another", parts)


def way(c: Colours) -> str:
    """How bases are made, once, and how a token passes, always."""
    parts: list[str] = []

    def station(x: float, y: float, width: float, lines: Sequence[str], colour: str) -> None:
        height = 20 + 20 * len(lines)
        parts.append(box(x, y, width, height, "none", f' rx="8" stroke="{colour}" stroke-width="2"'))
        for number, line in enumerate(lines):
            parts.append(text(x + width / 2, y + 26 + 20 * number, line, c.ink, "middle", ' font-size="14.5"'))

    parts.append(text(8, 24, "Once: eigenattn compress", c.soft, more=' font-weight="600"'))
    station(8, 38, 148, ("text of many kinds", "and the model"), c.codes[1])
    parts.append(arrow(158, 68, 178, 68, c.soft))
    station(181, 38, 200, ("what errors of keys and", "values cost predictions"), c.codes[1])
    parts.append(arrow(383, 68, 403, 68, c.soft))
    station(406, 38, 186, ("for every head a basis,", "bits for each direction"), c.codes[1])
    parts.append(arrow(499, 100, 499, 151, c.soft))
    parts.append(text(8, 140, "Always: a token passes", c.soft, more=' font-weight="600"'))
    station(8, 154, 148, ("query, key, value", "of a new token"), c.other)
    parts.append(arrow(158, 184, 178, 184, c.soft))
    station(181, 154, 200, ("window: the last 32", "keys and values, exact"), c.other)
    parts.append(arrow(383, 184, 403, 184, c.soft))
    station(406, 154, 186, ("older ones: coded", "in 0 to 8 bits a channel"), c.other)
    parts.append(arrow(281, 216, 281, 246, c.soft))
    parts.append(arrow(499, 216, 499, 246, c.soft))
    station(181, 249, 411, ("one softmax over both; codes are decoded on the fly",), c.other)
    return svg(600, 300, "How bases are made, once, and how a token passes, always", parts)


PICTURES = {"cache": cache, "directions": directions, "way": way}


def main() -> None:
    """Write every picture for every kind of page."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        for theme, colours in THEMES.items():
            (FOLDER / f"{name}-{theme}.svg").write_text(draw(colours), encoding="utf-8")


if __name__ == "__main__":
    main()
