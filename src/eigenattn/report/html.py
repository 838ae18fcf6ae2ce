"""One page that holds everything it shows: style, pictures, text, and a short script that moves its sliders."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence

from ..cache.layout import SIDES, Layout
from .tables import TextTable, sides_in_words

# A slider chooses one of the steps that stand in its page, and shows the figures of that one.
SCRIPT = """
for (const each of document.querySelectorAll(".slider")) {
  const steps = JSON.parse(each.querySelector("script").textContent);
  const range = each.querySelector("input");
  const show = () => {
    const step = steps[range.value];
    range.setAttribute("aria-valuetext", Object.values(step).join(", "));
    each.querySelectorAll("[data-of]").forEach((place) => { place.textContent = step[place.dataset.of]; });
  };
  range.addEventListener("input", show);
  range.disabled = false;
  show();
}
"""
SCRIPT_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
# Nothing may be loaded from anywhere: a browser would say so. Of scripts the one above may run.
HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{hash}'">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
:root {{ --back: #fff; --ink: #1c1e21; --soft: #5c6167; --line: #d9dce0; --card: #f5f6f8;
  --keys: #2f6fbb; --values: #c2571a; }}
@media (prefers-color-scheme: dark) {{
:root {{ --back: #15171a; --ink: #e6e8ea; --soft: #a0a6ad; --line: #34383d; --card: #1e2125;
  --keys: #6ea8ea; --values: #f09a5e; }}
}}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--back); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.5rem; line-height: 1.25; }}
h2 {{ font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }}
h3 {{ font-size: 1rem; margin-bottom: .25rem; }}
p.note, figcaption {{ color: var(--soft); font-size: .875rem; }}
.facts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; }}
.facts div, .said {{ background: var(--card); border-radius: .5rem; padding: .75rem; }}
.facts b {{ display: block; font-size: 1.35rem; }}
.scroll {{ overflow-x: auto; margin: 1rem 0; }}
table {{ border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }}
th, td {{ text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); }}
th:first-child, td:first-child {{ text-align: left; }}
figure {{ margin: 1rem 0; overflow-x: auto; }}
svg {{ display: block; width: 100%; height: auto; }}
.keys {{ fill: var(--keys); }}
.values {{ fill: var(--values); }}
.pair {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: .75rem; }}
.said {{ white-space: pre-wrap; }}
.said i {{ color: var(--soft); font-style: normal; }}
.slider {{ margin: 1rem 0; }}
.slider input {{ width: 100%; height: 2.5rem; accent-color: var(--keys); }}
.slider .facts b {{ font-variant-numeric: tabular-nums; }}
pre {{ background: var(--card); border-radius: .5rem; padding: .75rem; overflow-x: auto; font-size: .875rem; }}
</style>
</head>
<body>
"""
TAIL = f"<script>{SCRIPT}</script>\n</body>\n</html>\n"


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page of HTML from parts that are HTML already."""
    return HEAD.format(title=escape(title), hash=SCRIPT_HASH) + "\n".join(parts) + "\n" + TAIL


def escape(text: object) -> str:
    """Text as it stands inside an element."""
    return html.escape(str(text))


def heading(text: str, level: int = 2) -> str:
    """A heading."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, note: bool = False) -> str:
    """A paragraph, or a note in small letters."""
    kind = ' class="note"' if note else ""
    return f"<p{kind}>{escape(text)}</p>"


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """A few figures that stand out, each with what it is."""
    return '<div class="facts">' + "".join(f"<div><b>{escape(b)}</b>{escape(a)}</div>" for a, b in pairs) + "</div>"


def slider(label: str, steps: Sequence[Mapping[str, str]], first: int = 0) -> str:
    """Steps to slide over, each with the same facts; without scripts the first one stands.

    Args:
        label: what is chosen, in words.
        steps: of each the facts, by what they are.
        first: the one that is shown at the beginning.
    """
    # Of JSON only "<" could end the element that holds it.
    held = json.dumps([dict(step) for step in steps], ensure_ascii=True).replace("<", "\\u003c")
    boxes = "".join(
        f'<div><b data-of="{escape(name)}">{escape(value)}</b>{escape(name)}</div>'
        for name, value in steps[first].items()
    )
    return (
        f'<div class="slider"><label>{escape(label)}<input type="range" min="0" max="{len(steps) - 1}" '
        f'value="{first}" disabled></label><div class="facts">{boxes}</div>'
        f'<script type="application/json">{held}</script></div>'
    )


def table(shown: TextTable) -> str:
    """A table that scrolls by itself where the screen is narrow."""

    def line(cells: Sequence[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in shown.rows)
    return f'<div class="scroll"><table>\n{line(shown.headings, "th")}\n{body}\n</table></div>'


def figure(svg: str, caption: str) -> str:
    """A picture with what it shows."""
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def code(lines: Sequence[str]) -> str:
    """Lines as they are typed."""
    return "<pre>" + escape("\n".join(lines)) + "</pre>"


def rank_map(layers: Sequence[Layout]) -> str:
    """Ranks by layer as SVG, of full rank, at which there is a frame: keys upwards, values downwards, or both ways."""
    step, half, left = 20, 100, 34
    width = left + step * len(layers) + 6
    parts = [
        f'<svg role="img" aria-label="ranks by layer" viewBox="0 0 {width} {2 * half + 44}" '
        f'style="min-width: {width // 2}px; max-width: {2 * width}px" font-size="10" fill="currentColor">'
    ]
    for label, y in (("100%", 20), ("0", 16 + half + 4), ("100%", 16 + 2 * half)):
        parts.append(f'<text x="{left - 6}" y="{y}" text-anchor="end">{label}</text>')
    for index, layer in enumerate(layers):
        x = left + step * index
        for side in SIDES:
            latent = layer.of(side)
            size = half * latent.rank / latent.full_rank
            top = 16 + half - size if side == "key" else 16 + half
            parts.append(
                f'<rect class="{side}s" x="{x + 2}" y="{top:.1f}" width="{step - 4}" height="{size:.1f}">'
                f"<title>layer {index}, {sides_in_words(layer, latent)}: rank {latent.rank} of {latent.full_rank}"
                "</title></rect>"
            )
        if index % 5 == 0:
            parts.append(f'<text x="{x + step / 2}" y="{2 * half + 30}" text-anchor="middle">{index}</text>')
    frame = f'x="{left}" y="16" width="{step * len(layers)}" height="{2 * half}"'
    parts.append(f'<rect {frame} fill="none" stroke="currentColor" stroke-opacity="0.4"/>')
    middle = f'x1="{left}" x2="{left + step * len(layers)}" y1="{16 + half}" y2="{16 + half}"'
    parts.append(f'<line {middle} stroke="currentColor" stroke-opacity="0.6"/>')
    return "".join(parts) + "</svg>"
