"""Groups of options that several commands have, and what is said of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from ..cache.rules import EVICTION_RULES
from ..calibration.text import SOURCES, Text
from ..compression.methods import BASES
from ..compression.ranks import RANK_RULES
from ..config import DEFAULT_CODED_RATIO, DEFAULT_KV_RATIO, EigenAttentionConfig
from ..errors import EigenAttnError
from ..evaluation.measuring import EvaluationPlan
from ..evaluation.retrieval import Needles
from ..evaluation.tasks import PAPER_TASKS, load_tasks, task_names
from ..files import JSON_ROWS
from ..workflows.calibrate import CalibrationText
from ..workflows.compress import BoundedLoss
from .common import WORDS, memory_limits, several

TEXT_HELP = (
    f"a file of text, or of JSON ({', '.join(JSON_ROWS)}: a text or a conversation a line, or an array), or one of "
    f"{', '.join(SOURCES)}"
)
NO_TEXT_HELP = "Without a text: `random` tokens, `self`, which the model writes, or `none`, half each. May be repeated."
CALIBRATION_HELP = f"{TEXT_HELP}. {NO_TEXT_HELP}"
SHARE_HELP = (
    "Which latents are shared. 1: every KV head has its own. 3: three neighbouring KV heads have one together. 1-3: "
    "they share that of their values alone. 3kv: keys and values of the three are one latent. The cache takes the same "
    "bytes and loses less. Decoding takes more arithmetic, but hardly any more for 1-3. The number of KV heads must be "
    "divisible."
)
SHARE_DEFAULT = "By default 1kv for coded latents where positions do not turn keys (OPT, MPT, BLOOM), and 1 else"
CODED_HELP = (
    "Code each channel of a latent in a few bits, from 0 to 8, chosen channel by channel, or keep all in 16. The KV "
    "ratio counts these bits: 0.25 is 4 bits for each element of the original cache."
)
WINDOW_HELP = "How many of the last tokens are kept exactly, beside the latents of all earlier ones"


def seed_of(what: str) -> Any:
    """The option for a seed: what torch takes for one, and what a seed is multiplied into."""
    return typer.Option(min=0, max=2**32 - 1, help=f"The seed of {what}.")


def coded_or_not(more: str = "") -> Any:
    """The option for whether latents are coded, which the configuration chooses if nothing is said."""
    help = (
        f"{CODED_HELP} By default they are coded, unless a KV ratio above 0.5, another target, a basis or a rank rule "
        f"is asked for.{more}"
    )
    return typer.Option("--coded/--uncoded", help=help, show_default=False)


def sources(help: str, *names: str) -> Any:
    """The option for texts."""
    return typer.Option(*names, help=help, metavar="SOURCE")


@dataclass(frozen=True)
class LoadingOptions:
    """How models are loaded."""

    dtype: str | None = None
    device: str | None = None


@dataclass(frozen=True)
class PlacementOptions(LoadingOptions):
    """How models are loaded that may not fit on one device."""

    max_memory: str | None = None
    offload_folder: Path | None = None

    def arguments(self) -> dict[str, Any]:
        """As workflows take them.

        Raises:
            EigenAttnError: if memory is written otherwise.
        """
        return vars(self) | {"max_memory": memory_limits(self.max_memory)}


WORDS[LoadingOptions] = {
    "dtype": "Load weights as float32, bfloat16 or float16. By default as the checkpoint has them.",
    "device": typer.Option(
        "--device",
        "--device-map",
        help="Where the model runs: cpu, cuda, cuda:1 ..., or a device map: auto, balanced, sequential or a .json "
        "file that says where each module goes. By default on a GPU if there is one.",
        metavar="DEVICE",
    ),
}
WORDS[PlacementOptions] = WORDS[LoadingOptions] | {
    "max_memory": "With --device-map auto, balanced or sequential: the most memory to use of each GPU, by its number, "
    "and of the CPU, such as 0=70GiB,cpu=100GiB.",
    "offload_folder": "The folder for weights that are put on disk. By default they go into OUT.partial.",
}
WORDS[EigenAttentionConfig] = {
    "kv_ratio": "Compress the cache to this share of its bytes, in (0, 1]. By default "
    f"{DEFAULT_CODED_RATIO}, and {DEFAULT_KV_RATIO} where latents are not coded.",
    "error_budget": "Instead of a KV ratio: the relative error that is allowed at each layer's output.",
    "energy": "Instead of a KV ratio: the share of squared singular values to keep in each head, in (0, 1].",
    "coded": coded_or_not(),
    "basis": f"How subspaces are found, one of {', '.join(BASES)}: fisher minimises what the model's predictions lose, "
    "attention the error of attention, eigen is the paper's. By default fisher for coded latents, and attention for "
    "others.",
    "ranks": f"How ranks are shared out over the layers, one of {', '.join(RANK_RULES)}. By default by sensitivity "
    "for a KV ratio, and for the other targets by the rule of the same name.",
    "rank_multiple": "Ranks are multiples of this number.",
    "window": f"{WINDOW_HELP}; 0 for none. By default 32, or as statistics have it.",
    "share": f"{SHARE_HELP} {SHARE_DEFAULT}; or as statistics have it.",
    "shrinkage": "Take this share of the statistics, in [0, 1), from the weights and not from the text. It helps where "
    "texts to come are of another kind.",
    "refit": "Fit the decoders of values anew, layer by layer, once ranks are chosen. By default only without a "
    "window.",
}
WORDS[BoundedLoss] = {
    "max_divergence": "Instead of a KV ratio: how far predictions may diverge from the original's, in nats a token, "
    "such as 0.005. The smallest cache that keeps to it on all held-out texts is found.",
    "held_out": sources("What --max-divergence is measured on, other than what is calibrated on."),
}
WORDS[CalibrationText] = {
    "text": sources(f"What to calibrate on: {CALIBRATION_HELP}"),
    "samples": typer.Option(min=1, help="How many windows to draw from the text."),
    "length": typer.Option(min=2, help="How many tokens a window has."),
    "seed": seed_of("the draw"),
}


@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured of a model."""

    tokens: int = 16384
    length: int = 1024
    tasks: list[str] = field(default_factory=list)
    limit: int | None = None
    needles: str = ""
    copies: int = 4

    def plan(self, texts: list[Text], trials: int = 4, **others: Any) -> EvaluationPlan:
        """The plan of an evaluation on these texts.

        Raises:
            EigenAttnError: if needles or tasks are none, or two texts have one name.
        """
        lengths = several("--needles", self.needles, int)
        return EvaluationPlan(
            texts,
            tokens=self.tokens,
            length=self.length,
            copies=self.copies,
            needles=Needles(lengths, trials=trials) if lengths else None,
            tasks=load_tasks(task_names(self.tasks)),
            limit=self.limit,
            **others,
        )


WORDS[EvaluationOptions] = {
    "tokens": typer.Option(min=2, help="How many tokens of each text to read."),
    "length": typer.Option(min=2, help="How many tokens a window of text has."),
    "tasks": f"Zero-shot multiple choice: `paper` ({', '.join(PAPER_TASKS)}), other names that lm-eval knows, or "
    ".jsonl files of `query`, `choices` and `gold`. Separated by commas, or repeated.",
    "limit": typer.Option(min=1, help="How many items of each task to answer; all by default."),
    "needles": "Hide needles in texts of these lengths in tokens, separated by commas, and ask for them.",
    "copies": typer.Option(min=0, help="How many windows to measure copying on."),
}


@dataclass(frozen=True)
class SamplingOptions:
    """How answers are sampled."""

    temperature: float = 0.0
    seed: int = 0


WORDS[SamplingOptions] = {
    "temperature": typer.Option(min=0, help="The temperature of the sampling; at 0 the likeliest token is taken."),
    "seed": seed_of("the sampling"),
}


@dataclass(frozen=True)
class EvictionOptions:
    """Whether tokens are evicted from the cache."""

    evict: str | None = None
    budget: str | None = None

    def arguments(self) -> dict[str, Any]:
        """As `EigenCache` takes them.

        Raises:
            EigenAttnError: if the budget is no number.
        """
        text, budget = self.budget, None
        try:
            if text is not None:
                budget = float(text) if "." in text else int(text)
            return {"evict": self.evict, "budget": budget}
        except ValueError:
            raise EigenAttnError(f"--budget takes a number of tokens, or a fraction below 1, not {text!r}.") from None


WORDS[EvictionOptions] = {
    "evict": typer.Option(
        help=f"Evict tokens from the cache by a rule: {' or '.join(EVICTION_RULES)}. Needs --budget.", metavar="RULE"
    ),
    "budget": typer.Option(
        help="How many tokens to keep of a sequence, such as 1024, or which share of those seen, such as 0.25.",
        metavar="TOKENS",
    ),
}
