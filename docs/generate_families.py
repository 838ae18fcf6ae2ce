"""Write `families.md` beside this file from the table in `eigenattn.models.families`."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from transformers import AutoConfig

from eigenattn.models.families import FAMILIES, Family

PAGE = Path(__file__).with_name("families.md")

INTRODUCTION = """\
<!-- Written by docs/generate_families.py from eigenattn/models/families.py: edit there. -->
# Families

One attention module serves all the model types below. What sets them apart is a row each in
`eigenattn/models/families.py`, from which this page is written.

Encoders and decoders are folded into the projections where nothing stands between, and cost nothing then. What stands
between are norms and clipping (the encoder follows them at run time) and rotary positions (the key decoder forms the
keys before they are rotated). With the exact window nothing is folded, in any family: the full projections stay, and
encoders and decoders run beside them. The table holds for `window=0`. It shows norms and clipping where a family can
have them; notes say where they are optional.
"""

RESTRICTIONS = """\
## What holds for all

- A cap on the scores raises an error in sdpa: load with `attn_implementation="eager"`.
- With the rope types `dynamic` and `longrope`, all cached keys take the new frequencies once the text passes the length
  where these change. The original keeps the old ones for keys it has rotated already, so from there on cached logits
  differ from its. Without a cache both compute the same, and so do they below that length.
- Positions are stored with the cached tokens, as the model was given them. So padding before, behind or inside a text,
  `position_ids` that jump, and rows of several packed texts are right with a cache as without one. Who sees whom is the
  mask's to say: transformers tells packed texts apart by their positions only where there is neither a mask nor a
  cache. With one, pass a mask over columns, [B, 1, T, columns].
- The exact window is the last `W` columns, hidden ones included: of a text with padding inside or behind it, fewer
  tokens than `W` are exact until as many more have come.
- Masks that show what comes later, as images in a prompt have them, are honoured with a window and without: what comes
  later is near, and exact. Only tokens of the same pass can be shown.
- With the exact window, and where tokens are evicted, FlashAttention and FlexAttention raise an error: load with
  `attn_implementation="sdpa"`.
- A static cache in which every layer slides raises an error, with a window and without: it has no room for latents of
  all tokens. Use a dynamic one.
- Continuous batching (`generate_batch`) keeps a paged cache of full-rank heads. With a compressed model each request
  ends with an error.
"""

ADDING = """\
## Adding a family

1. Add a `Family` to `FAMILIES` under the `model_type` of its configuration. Its columns default to Llama's, so a row
   names only the differences.
2. Add a tiny configuration of it to `tests/tiny.py`, and one for each option that changes its attention. The shared
   suite (`pytest tests/models/test_families.py`) then compares it with the original: exact at full rank, cached as
   uncached, folded as at run time, padded, generated, saved, in half precision.
3. Run `python docs/generate_families.py`.

The columns of a row:
"""


def positions(model_type: str, family: Family) -> str:
    """Where positions enter, in the default configuration."""
    found = family.positions_of(AutoConfig.for_model(model_type))
    if family.rotary_switch:
        return f"{found}, in layers with `{family.rotary_switch}`"
    return found if isinstance(family.positions, str) else f"{found} by default"


def projections(family: Family) -> str:
    """How queries, keys and values are projected."""
    how = {None: "separate", "blocks": "fused, [q, k, v]", "grouped": "fused, by KV head"}[family.fused]
    return f"{how}; norms" if family.norms else f"{how}; clipped" if family.clip else how


def folded(rotates: bool, normalises: bool, clips: bool) -> list[str]:
    """The projections into which encoders and decoders are folded."""
    plain = not normalises and not clips
    found = {"queries": plain and not rotates, "keys": plain, "values": not clips, "output": True}
    return [name for name, folds in found.items() if folds]


def at_run_time(rotates: bool, normalises: bool, clips: bool) -> list[str]:
    """The maps that are left."""
    apart = normalises or clips
    found = {"key encoder": apart, "key decoder": apart or rotates, "value encoder": clips}
    return [name for name, runs in found.items() if runs]


def row(model_type: str, family: Family) -> str:
    """A line of the page's table."""
    where = positions(model_type, family)
    traits = (where.startswith("rotary"), family.norms is not None, family.clip is not None)
    cells = [
        f"`{model_type}`",
        family.title,
        f"`{family.attention}`",
        where,
        projections(family),
        ", ".join(folded(*traits)),
        ", ".join(at_run_time(*traits)) or "nothing",
    ]
    return f"| {' | '.join(cells)} |"


def columns() -> str:
    """The columns of `FAMILIES`, from the docstring of `Family`."""
    arguments = inspect.getdoc(Family).partition("Args:\n")[2]
    found = re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", arguments, re.MULTILINE)
    return "\n".join(f"- `{name}`: {' '.join(text.split())}" for name, text in found)


def page() -> str:
    """The text of `families.md`."""
    rows = sorted(FAMILIES.items())
    table = [
        "| `model_type` | models | attention class | positions | projections | folded | at run time |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(row(model_type, family) for model_type, family in rows),
    ]
    notes = ["## Notes", "", *(f"- `{model_type}`: {family.note}" for model_type, family in rows if family.note)]
    sections = [INTRODUCTION, "\n".join(table), "\n".join(notes), RESTRICTIONS, ADDING, columns()]
    return "\n\n".join(section.strip() for section in sections) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
