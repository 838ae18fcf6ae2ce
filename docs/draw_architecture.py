"""Write `architecture.md` beside this file: the way of a token, the way of a text, and the rooms, from the code itself.

Each step is named by its place; what it does is the first sentence of its docstring, so a picture cannot say what the
code does not.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).parents[1] / "src" / "eigenattn"
PAGE = Path(__file__).with_name("architecture.md")
WIDTH = 96


class Room(NamedTuple):
    """A folder, or files of the package's own, and what it may know."""

    name: str
    knows: str


# From the ground up: a room imports from those above it in this list, and from none below.
ROOMS = (
    Room("errors, version, config, files, journal, progress, resources", "no tensors: choices, files, words"),
    Room("cache", "what is stored: layouts, packed codes, positions, evicted tokens; no model"),
    Room("kernels", "tensors alone: attention by any backend, one step of decoding; no Hugging Face"),
    Room("models", "families, and how attention is put in their models' place; no calibration"),
    Room("calibration", "text, windows of tokens, sums over them"),
    Room("compression", "from sums to maps: bases, ranks, bits, folding; no files but the journal"),
    Room("finetuning", "training of maps"),
    Room("evaluation", "what a compressed model loses: readings, rivals, sweeps"),
    Room("benchmark", "how long it takes, and how much memory"),
    Room("report", "what people read: tables, pages, model cards, plans"),
    Room("workflows", "from names of models and texts to folders: what a command does"),
    Room("cli", "options and printing"),
    Room("vllm", "the engine's names; models, kernels and cache, and nothing else of ours"),
)


class Step(NamedTuple):
    """A place in the code that something passes, and what comes out of it."""

    place: str
    gives: str


TOKEN = (
    Step("models/attention.py:EigenAttention.forward", "this: what the pass sees"),
    Step("models/forward_pass.py:ForwardPass", "mask, positions, angles, backend"),
    Step("models/layer.py:AttentionLayer.project", "q [B, H, T, D]; k, v [B, G, T, D], before rotation"),
    Step("cache/layers.py:LatentLayer.update", "what left the window goes on:"),
    Step("models/maps.py:LatentMaps.stored", "rows of latents [B, G/N, n, R], or packed bytes"),
    Step("cache/context.py:CacheContext.write", "positions of all columns, for all layers"),
    Step("cache/sight.py:Sight", "far rows, near keys and values, columns, positions"),
    Step("models/attend.py:attend", "one of three ways:"),
    Step("models/attend.py:one_query", "T = 1, over a cache: kernels/decoding/ (reference, batched, fused, native)"),
    Step("models/attend.py:in_parts", "prompts: kernels/chunked.py, parts joined by their log-sum-exp"),
    Step("models/attend.py:all_at_once", "all else: kernels/blocks.py, with weights and gradients"),
    Step("models/eviction.py:evict", "rows that stay (cache/rules.py scores, cache/evicting.py gathers)"),
    Step("models/layer.py:AttentionLayer.finish", "the output [B, T, C]"),
)
TEXT = (
    Step("calibration/text.py:load_text", "a text and where it came from"),
    Step("calibration/text.py:draw_windows", "windows of tokens [samples, length], of all kinds of text"),
    Step("compression/recipe.py:Recipe", "each of these once, when it is asked for:"),
    Step("compression/methods.py:BasisMethod", "how moments, bases and quantisers are made; by default:"),
    Step("calibration/gradients.py:backward", "gradients of far keys and values, a layer at a time"),
    Step("calibration/fisher_moments.py:FisherMoments", "sums and samples of each layer"),
    Step("compression/fisher.py:fisher", "encoder, decoder, mean and spectrum, in nats, of each latent"),
    Step("compression/fisher.py:fisher_quantisers", "levels and costs of all widths"),
    Step("compression/quantise.py:quantise_bases", "ranks and bits as one choice; in 16 bits instead:"),
    Step("calibration/attention_moments.py:AttentionMoments", "sums of each layer, streamed in float64"),
    Step("compression/bases.py:attention", "encoder, decoder, mean and spectrum of each latent"),
    Step("compression/measure.py:Measurement", "what truncation costs, in nats"),
    Step("compression/sensitivity.py:sensitivity", "ranks; without a window, also:"),
    Step("compression/refit.py:refit", "value decoders fitted anew; and of either kind:"),
    Step("compression/folding.py:compress_layer", "parameters of the layer, folded where nothing stands between"),
    Step("models/checkpoint_format.py:EigenAttnCheckpointConfig", "`quantization_config` of `config.json`"),
    Step("workflows/compress.py:compress_checkpoint", "a checkpoint, or bases alone, with a model card"),
)

INTRODUCTION = """\
<!-- Written by docs/draw_architecture.py from the source: edit there. -->
# Architecture

Two ways lead through the house: that of a token, in every pass of a compressed model, and that of a text, when a model
is compressed. Each line below is a place in `src/eigenattn/`, what it does in the words of its own docstring, and what
comes out of it. Letters are those of the [glossary](glossary.md), the mathematics is in
[mathematics.md](mathematics.md).
"""

BELONGS = """\
## Where a new line belongs

| what is new | where it goes | how |
| --- | --- | --- |
| a model family | `models/families.py` | a row |
| a basis, a rank rule | `compression/methods.py`, `compression/ranks.py` | a function and an entry |
| an eviction rule | `cache/rules.py` | a function of `Held` and an entry |
| a width of codes | `cache/packing.py` | an entry: the parts that its codes lie in |
| a rival to compare with | `evaluation/rounding.py`, `evaluation/rivals.py` | a code and an entry |
| a way that latents are laid out | `cache/layout.py` | a property; who asks for it gets it |
| something that a pass sees | `models/forward_pass.py` | an attribute, made of transformers' arguments |
| a backend of decoding | `kernels/decoding/` | a function of `Step` and an entry |
| a step from text to maps | `compression/recipe.py` | a property, made once when it is asked for |
| what a command does | `workflows/` | a function; its options go to `cli/` |

[CONTRIBUTING.md](../CONTRIBUTING.md) has the steps of each. Everything that can be registered can be registered by
another package too, before a model is loaded.
"""


def definition(place: str) -> ast.AST:
    """The class or function at `file.py:Name.name`."""
    path, _, name = place.partition(":")
    node: ast.AST = ast.parse((SOURCE / path).read_text(encoding="utf-8"))
    for part in name.split("."):
        kinds = ast.ClassDef, ast.FunctionDef
        node = next(child for child in ast.walk(node) if isinstance(child, kinds) and child.name == part)
    return node


def says(place: str) -> str:
    """The first sentence of what a place says of itself."""
    text = " ".join((ast.get_docstring(definition(place)) or "").split())
    # A product `a . b` ends no sentence.
    return re.split(r"(?<=\S)[.:] ", text)[0].rstrip(".:")


def drawn(steps: tuple[Step, ...], begins: str) -> str:
    """A picture of a way: places from top to bottom, with what passes between them."""
    lines = [begins]
    for number, step in enumerate(steps):
        bar = " " if number == len(steps) - 1 else "│"
        lines += ["│", f"{'└' if number == len(steps) - 1 else '├'}─ {step.place}"]
        lines += [f"{bar}    {line}" for line in textwrap.wrap(says(step.place), WIDTH - 6)]
        lines.append(f"{bar}    → {step.gives}")
    return "```\n" + "\n".join(lines) + "\n```"


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the package, and the room it is in."""
    for path in sorted(SOURCE.rglob("*.py")):
        first = path.relative_to(SOURCE).parts[0]
        yield first.removesuffix(".py"), path


def rank(room: str) -> int | None:
    """How high a room lies; None for the package's own `__init__`, which knows all."""
    return next((i for i, each in enumerate(ROOMS) if room in each.name.split(", ")), None)


def imports(path: Path) -> Iterator[str]:
    """The rooms that a module imports from, its own not among them."""
    depth = len(path.relative_to(SOURCE).parts) - 1
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.level != depth + 1:
            continue
        names = [node.module] if node.module else [alias.name for alias in node.names]
        yield from (name.split(".")[0] for name in names)


def rooms() -> str:
    """The table of rooms, with what each imports, measured."""
    found: dict[int, set[int]] = {i: set() for i in range(len(ROOMS))}
    for room, path in modules():
        own = rank(room)
        if own is None:
            continue
        found[own] |= {other for name in imports(path) if (other := rank(name)) not in (None, own)}
    table = ["| room | what it may know | imports from |", "| --- | --- | --- |"]
    for i, room in enumerate(ROOMS):
        above = [f"`{ROOMS[j].name}`" if j else "the first" for j in sorted(found[i])]
        names = ", ".join(f"`{name}`" for name in room.name.split(", "))
        table.append(f"| {names} | {room.knows} | {', '.join(above) or 'none'} |")
    return "\n".join(table)


def page() -> str:
    """The text of `architecture.md`."""
    sections = [
        INTRODUCTION,
        "## The way of a token\n\nThe first, the fourth, the eighth and the ninth are its whole path in decoding.\n",
        drawn(TOKEN, "hidden states [B, T, C]"),
        "## The way of a text",
        drawn(TEXT, "a name: mixture, a file, self"),
        "## Rooms\n\nA room imports from rooms above it, never from below, and no module imports itself by a detour:\n"
        "`tests/test_architecture.py` holds the code to it.",
        rooms(),
        BELONGS,
    ]
    return "\n\n".join(section.strip() for section in sections) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
