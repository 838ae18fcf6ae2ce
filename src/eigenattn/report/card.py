"""The model card of a compressed checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..cache.layout import Layout
from ..compression.pipeline import CompressionReport
from ..config import TARGETS
from ..errors import EigenAttnError
from ..files import check_name, read_text, to_json, whole
from ..models.checkpoint_format import TAGS, EigenAttnCheckpointConfig
from .tables import evaluation_tables, latents_in_words, layout_table, notes, windows_in_words

LOAD = """\
# pip install eigenattn, which transformers then finds by itself
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")"""


def model_card(
    checkpoint: EigenAttnCheckpointConfig,
    report: CompressionReport,
    layers: Sequence[Layout],
    whole: bool,
) -> str:
    """Markdown that says what was compressed, how far, on what, and how to load it; a hub reads what stands above.

    Args:
        whole: whether the folder holds a checkpoint, and not bases alone.
    """
    facts, method = checkpoint.provenance, checkpoint.method
    target = next(f"`{name}={method[name]}`" for name in TARGETS if method[name] is not None)
    held = "low-rank keys and values, coded in few bits" if method["coded"] else "low-rank keys and values"
    at_lengths = ", ".join(f"{ratio:.3f} at {length:,} tokens" for length, ratio in report.ratio_at.items())
    base = facts["base_model"]
    # Of a folder on the machine that made it a hub knows nothing.
    named = f"base_model: {base}\n" if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else ""
    held_here = "" if whole else f" This folder holds the bases alone, and {base} is loaded with them."
    calibrated = "\n".join(f"- calibrated on {windows_in_words(each)}" for each in facts.get("statistics", [facts]))
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    tags = "\n".join(f"- {tag}" for tag in TAGS)
    return f"""---
library_name: transformers
{named}tags:
{tags}
---

# {base}, KV cache at {report.kv_ratio:.1%}

This is {base} with Eigen Attention (arXiv 2408.05646): it caches {held}.{held_here}

| | this model | original |
| --- | --- | --- |
| cache bytes a token ({facts["dtype"]}) | {report.bytes_per_token:,} | {report.baseline_bytes_per_token:,} |
| ratio | {report.kv_ratio:.3f} | 1 |
| ratio of the whole cache, its window of {report.window} exact tokens included | {at_lengths} | 1 |

```python
{LOAD}
```

## How it was made

- target {target}, window {method["window"]}, basis `{method["basis"]}`, {latents_in_words(layers)}
- ranks by `{method["ranks"]}` in multiples of {method["rank_multiple"]}
{calibrated}
- {versions}

{layout_table(layers, getattr(torch, facts["dtype"]).itemsize).markdown()}
"""


def finetuning_section(facts: dict[str, Any]) -> str:
    """Markdown that says how a checkpoint was trained after compression."""
    goal = f"the predictions of {facts['distil']}" if facts["distil"] else "the text's next tokens"
    texts = ", ".join(f"{text['source']} (SHA-256 {text['sha256']})" for text in facts["text"])
    return f"""
## Fine-tuning

- toward {goal}: {facts["steps"]} steps of {facts["batch_size"]} windows of {facts["length"]} tokens of {texts}
- learning rate {facts["map_learning_rate"]} of maps, {facts["learning_rate"]} of LoRA, seed {facts["seed"]}
- {facts["measure"]} on held-out windows of that text: {facts["before"]:.5g} before, {facts["after"]:.5g} after
"""


EVALUATION = "evaluation.json"
# Between these the card shows what the last `evaluate --save` found.
BEGIN, END = "<!-- evaluation -->", "<!-- end of evaluation -->"


def check_savable(folder: Path) -> None:
    """Raise an `EigenAttnError` if a result cannot be kept with a model: it is not a compressed checkpoint's folder."""
    check_name(folder)
    if not (folder / "README.md").is_file():
        raise EigenAttnError(
            f"{folder} is no folder with a model card: --save keeps results in a compressed checkpoint."
        )
    read_text(folder / "README.md")


def save_evaluation(folder: Path, result: Mapping[str, Any]) -> None:
    """Keep what `eigenattn evaluate` found in a checkpoint's folder, and show it in the model card.

    Raises:
        EigenAttnError: if there is no model card, or it cannot be written.
    """
    check_savable(folder)
    card = read_text(folder / "README.md")
    card = re.sub(rf"\n*{BEGIN}.*{END}\n*", "\n", card, flags=re.DOTALL).rstrip()
    with whole(folder / EVALUATION) as values, whole(folder / "README.md") as readme:
        values.write_text(to_json(result, indent=2), encoding="utf-8")
        readme.write_text(f"{card}\n\n{BEGIN}\n{evaluation_section(result)}\n{END}\n", encoding="utf-8")


def evaluation_section(result: Mapping[str, Any]) -> str:
    """Markdown: the tables, and how they were measured."""
    against = "" if result["baseline"] is None else f", against {result['baseline']}"
    parts = [f"## Evaluation{against}", *(table.markdown() for table in evaluation_tables(result)), *notes(result)]
    return "\n\n".join(parts)
