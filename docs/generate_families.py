"""Write `families.md` beside this file from the table in `eigenattn.models.families`."""

from __future__ import annotations

import inspect
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from eigenattn.models.families import FAMILIES
from eigenattn.models.family import Family

PAGE = Path(__file__).with_name("families.md")
WRAPPER = " (wrapper)"
VERDICTS = json.loads(Path(__file__).with_name("every_type.json").read_text(encoding="utf-8"))

INTRODUCTION = """\
<!-- Written by docs/generate_families.py from eigenattn/models/families.py: edit there. -->
# Families

One attention module serves all the model types below. What sets them apart is a row each in
`eigenattn/models/families.py`, from which this page is written. A type without a row of its own is served by another's
where its attention runs the same code, and is then held to the original's predictions whenever a model is converted.

Encoders and decoders are folded into the projections where nothing stands between, and cost nothing then. What stands
between are norms and clipping (the encoder follows them at run time), rotary positions (the key decoder forms the keys
before they are rotated), and sinks, gates and norms behind attention (the value decoder precedes them). With the exact
window nothing is folded, in any family: the full projections stay, and encoders and decoders run beside them. The table
holds for `window=0`. It shows what a family can have; notes say what is optional.
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

LATENT = """\
## Multi-head latent attention

Types whose projections are `latent` in the table cache one vector a token (DeepSeek V2, arXiv 2405.04434): a latent
`c` that keys and values of all heads are made of, and the rotated part of the keys, which all heads share. Here it is
attention of one KV head whose values are its keys: what makes keys of `c` is absorbed into the queries, and what makes
values of it follows attention (see [mathematics.md](mathematics.md#multi-head-latent-attention)). So what is coded is
`c` and the shared part of the keys, together, before rotation.

- *The original* that all ratios and sizes compare with is that vector in 16 bits, as transformers and serving engines
  cache it: 576 elements a layer of DeepSeek V3, and not the 40,960 that its 128 heads' keys and values would be.
- They go with the basis `fisher`, the default of coded latents. Others weigh keys and values apart, and are refused, as
  is sharing: there is one KV head. Without codes, take `basis="fisher"` too.
- Prompts are read in the absorbed form, by heads of 576 dimensions in the place of 192 and 128: some three times the
  arithmetic of attention. In decoding it is the other way round, for transformers makes keys and values of all heads of
  all cached latents in each step. One layer of DeepSeek V2 Lite's sizes, on one core in fp32 at the default options:
  1,024 tokens are read in 0.71 s (the original 0.51), 4,096 in 5.3 s (6.8); a step then takes 9 ms (49) and 17 ms
  (271).
- `kv_b_proj` that is quantised, or has an adapter, is asked for its matrix, which is then held in the model's dtype.
- On GPUs steps of decoding run by PyTorch's own operations where that vector has more than 512 dimensions: the fused
  kernel was not tried with more.
- Tensor parallelism and vLLM are refused: there is one KV head to share out, and vLLM has other layers for it.
"""

ADDING = """\
## Adding a family

A type whose attention runs the code of a known one needs nothing: `python tests/every_type.py TYPE` says whether it
works. Else:

1. Add a `Family` to `FAMILIES` under the `model_type` of its configuration. Its columns default to Llama's, so a row
   names only the differences.
2. Add a tiny configuration of it to `tests/tiny.py`, and one for each option that changes its attention. The shared
   suite (`pytest tests/models/test_families.py`) then compares it with the original: exact at full rank, cached as
   uncached, folded as at run time, padded, generated, saved, in half precision.
3. Run `python docs/generate_families.py`.

The columns of a row:
"""


def positions(family: Family) -> str:
    """Where positions enter."""
    found = family.positions if isinstance(family.positions, str) else "by configuration"
    if isinstance(family.rotary_switch, str):
        return f"{found}, in layers with `{family.rotary_switch}`"
    return found if family.rotary_switch is None else f"{found}, in some layers"


def projections(family: Family) -> str:
    """How queries, keys and values are projected."""
    orders = {None: "separate", "blocks": "fused, [q, k, v]", "grouped": "fused, by KV head"}
    how = "fused" if callable(family.fused) else orders[family.fused]
    how = how if family.absorbed is None else "latent"
    others = {
        "norms": family.norms,
        "a norm on values": family.value_norm,
        "clipped": family.clip,
        "sinks": family.sinks,
        "gated": family.gate,
        "a norm on the output": family.output_norm,
    }
    return "; ".join([how, *(name for name, has in others.items() if has)])


class Traits(NamedTuple):
    """What stands between projections and attention.

    Args:
        apart: whether something stands between attention and the output projection.
        tied: whether values are keys, of multi-head latent attention.
    """

    rotates: bool
    normalises: bool
    clips: bool
    normalises_values: bool = False
    apart: bool = False
    tied: bool = False


def folded(traits: Traits) -> list[str]:
    """The projections into which encoders and decoders are folded."""
    if traits.tied:
        return []
    plain = not traits.normalises and not traits.clips
    values = not traits.clips and not traits.normalises_values
    found = {"queries": plain and not traits.rotates, "keys": plain, "values": values, "output": not traits.apart}
    return [name for name, folds in found.items() if folds]


def at_run_time(traits: Traits) -> list[str]:
    """The maps that are left."""
    if traits.tied:
        return ["key encoder", "key decoder"]
    found = {
        "key encoder": traits.normalises or traits.clips,
        "key decoder": traits.normalises or traits.clips or traits.rotates,
        "value encoder": traits.clips or traits.normalises_values,
        "value decoder": traits.apart,
    }
    return [name for name, runs in found.items() if runs]


def row(model_type: str, family: Family) -> str:
    """A line of the page's table."""
    where = positions(family)
    traits = Traits(
        where.startswith(("rotary", "by")),
        family.norms is not None,
        family.clip is not None,
        family.value_norm is not None,
        any((family.gate, family.sinks, family.output_norm)),
        family.absorbed is not None,
    )
    cells = [
        f"`{model_type}`",
        family.title,
        f"`{family.attention}`",
        where,
        projections(family),
        ", ".join(folded(traits)) or "nothing",
        ", ".join(at_run_time(traits)) or "nothing",
    ]
    return f"| {' | '.join(cells)} |"


def verdicts() -> str:
    """What becomes of every type that transformers has."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for model_type, found in VERDICTS["types"].items():
        verdict, why = found["verdict"], found["why"]
        if verdict == "refused":
            why = "refused: " + (why.partition("not supported: ")[2] or why).rstrip(".")
            why = "refused: no family's attention runs the same code" if "has no row" in why else why
        elif verdict == "not built":
            why = "not built: its default configuration, made small, is not consistent or needs another package"
        else:
            why = f"works as {why.removeprefix('as ').rpartition(', as ')[2]}"
        by_reason[why].append(model_type)
    working = sum(found["verdict"] == "works" for found in VERDICTS["types"].values())
    seeing = sum(found["verdict"] == "works" for name, found in VERDICTS["types"].items() if WRAPPER in name)
    lines = [
        "## Every causal type",
        "",
        f"Found by `python tests/every_type.py --write` with transformers {VERDICTS['transformers']}: of "
        f"{len(VERDICTS['types'])} types, wrappers of vision and speech included, {working} work. On tiny random "
        "models they compute the same at full rank, and with a cache what they compute without one, truncated and "
        "coded; they are compressed, saved and loaded, whole and as bases beside the original.",
        "",
        f"{seeing} of them are wrappers, vision models around a language model, and are given an image besides "
        "(random pixels, through the model's own vision tower; Gemma 3n's, which is timm's and large, has a "
        "stand-in): in the prompt, alone and in a batch beside a text that is padded in front. At full rank their "
        "predictions and generated tokens are the original's; coded, they generate the same with a cache, dynamic or "
        "static, as without one. Positions of images in rows, masks in which an image's tokens see each other, and "
        "prompts that are read in both directions are among them. Qwen 2.5 VL and Qwen 3 VL are given a video too, "
        "and Gemma 3n a sound. Calibration is on text.",
        "",
        "| types | verdict |",
        "| --- | --- |",
        *(
            f"| {', '.join(f'`{name}`' for name in types)} | {why} |"
            for why, types in sorted(by_reason.items(), key=lambda each: (not each[0].startswith("works"), each[0]))
        ),
    ]
    return "\n".join(lines)


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
    sections = [INTRODUCTION, "\n".join(table), "\n".join(notes), verdicts(), LATENT, RESTRICTIONS, ADDING, columns()]
    return "\n\n".join(section.strip() for section in sections) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
