"""Groups of options that belong together: each is a dataclass, and a command takes it as one argument."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ..cache.rules import EVICTION_RULES
from ..calibration.statistics_file import StatisticsFile
from ..calibration.text import DEFAULT_SOURCE, SOURCES, Text
from ..compression.methods import BASES
from ..compression.ranks import RANK_RULES
from ..config import DEFAULT_CODED_RATIO, DEFAULT_KV_RATIO, EigenAttentionConfig
from ..errors import EigenAttnError
from ..evaluation.measuring import EvaluationPlan
from ..evaluation.retrieval import Needles
from ..evaluation.tasks import PAPER_TASKS, load_tasks, task_names
from ..files import JSON_ROWS
from ..workflows.calibrate import CalibrationText
from .common import SEEDS


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Have typer see, in place of an argument that is a dataclass, the fields of it as options of the command."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            parameters += _options(groups[name])
        else:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def flat(**options: Any) -> None:
        for name, kind in groups.items():
            options[name] = kind(**{each.name: options.pop(each.name) for each in dataclasses.fields(kind)})
        command(**options)

    del flat.__wrapped__  # typer would look behind this function
    setattr(flat, "__signature__", inspect.Signature(parameters))  # noqa: B010 (no function is known to have one)
    flat.__annotations__ = {each.name: each.annotation for each in parameters}
    return flat


def _options(group: Any) -> list[inspect.Parameter]:
    """The fields of a dataclass, all of which have defaults, as parameters."""
    hints, defaults = get_type_hints(group, include_extras=True), group()
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=getattr(defaults, name), annotation=hints[name])
        for name in (each.name for each in dataclasses.fields(group))
    ]


@dataclass(frozen=True)
class LoadingOptions:
    """How models are loaded."""

    dtype: Annotated[
        str | None,
        typer.Option(help="Load weights as float32, bfloat16 or float16. By default as the checkpoint has them."),
    ] = None
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            "--device-map",
            help="Where the model runs: cpu, cuda, cuda:1 ..., or a device map: auto, balanced, sequential or a .json "
            "file that says where each module goes. By default on a GPU if there is one.",
            metavar="DEVICE",
        ),
    ] = None


@dataclass(frozen=True)
class MemoryOptions:
    """How much of each device a model takes that does not fit on one."""

    max_memory: Annotated[
        str | None,
        typer.Option(
            help="With --device-map auto, balanced or sequential: the most memory to use of each GPU, by its number, "
            "and of the CPU, such as 0=70GiB,cpu=100GiB."
        ),
    ] = None
    offload_folder: Annotated[
        Path | None,
        typer.Option(help="The folder for weights that are put on disk. By default they go into OUT.partial."),
    ] = None


TEXT_HELP = (
    f"a file of text, or of JSON ({', '.join(JSON_ROWS)}: a text or a conversation a line, or an array), or one of "
    f"{', '.join(SOURCES)}"
)
NO_TEXT_HELP = "Without a text: `random` tokens, `self`, which the model writes, or `none`, half each. May be repeated."
CalibrationSources = Annotated[
    list[str],
    typer.Option(
        "--text",
        help=f"What to calibrate on: {TEXT_HELP}. {NO_TEXT_HELP}",
        metavar="SOURCE",
    ),
]
SHARE_HELP = (
    "Which latents are shared. 1: every KV head has its own. 3: three neighbouring KV heads have one together. 1-3: "
    "they share that of their values alone. 3kv: keys and values of the three are one latent. The cache takes the same "
    "bytes and loses less. Decoding takes more arithmetic, but hardly any more for 1-3. The number of KV heads must be "
    "divisible."
)
CODED_HELP = (
    "Code each channel of a latent in a few bits, from 0 to 8, chosen channel by channel, or keep all in 16. The KV "
    "ratio counts these bits: 0.25 is 4 bits for each element of the original cache."
)
CODED_BY_DEFAULT_HELP = (
    f"{CODED_HELP} By default they are coded, unless a KV ratio above 0.5, another target, a basis or a rank rule is "
    "asked for."
)
WINDOW_HELP = "How many of the last tokens are kept exactly, beside the latents of all earlier ones"


@dataclass(frozen=True)
class CompressionOptions:
    """What a model is compressed to."""

    kv_ratio: Annotated[
        float | None,
        typer.Option(
            help="Compress the cache to this share of its bytes, in (0, 1]. By default "
            f"{DEFAULT_CODED_RATIO}, and {DEFAULT_KV_RATIO} where latents are not coded."
        ),
    ] = None
    error_budget: Annotated[
        float | None,
        typer.Option(help="Instead of a KV ratio: the relative error that is allowed at each layer's output."),
    ] = None
    energy: Annotated[
        float | None,
        typer.Option(
            help="Instead of a KV ratio: the share of squared singular values to keep in each head, in (0, 1]."
        ),
    ] = None
    coded: Annotated[bool | None, typer.Option("--coded/--uncoded", help=CODED_BY_DEFAULT_HELP, show_default=False)] = (
        None
    )
    basis: Annotated[
        str | None,
        typer.Option(
            help=f"How subspaces are found, one of {', '.join(BASES)}: fisher minimises what the model's predictions "
            "lose, attention the error of attention, eigen is the paper's. By default fisher for coded latents, and "
            "attention for others."
        ),
    ] = None
    ranks: Annotated[
        str | None,
        typer.Option(
            help=f"How ranks are shared out over the layers, one of {', '.join(RANK_RULES)}. By default by sensitivity "
            "for a KV ratio, and for the other targets by the rule of the same name."
        ),
    ] = None
    rank_multiple: Annotated[int, typer.Option(help="Ranks are multiples of this number.")] = 8
    window: Annotated[
        int | None, typer.Option(help=f"{WINDOW_HELP}; 0 for none. By default 32, or as statistics have it.")
    ] = None
    share: Annotated[str | None, typer.Option(help=f"{SHARE_HELP} By default 1, or as statistics have it.")] = None
    shrinkage: Annotated[
        float,
        typer.Option(
            help="Take this share of the statistics, in [0, 1), from the weights and not from the text. It helps where "
            "texts to come are of another kind."
        ),
    ] = 0.0
    refit: Annotated[
        bool | None,
        typer.Option(
            "--refit/--no-refit",
            help="Fit the decoders of values anew, layer by layer, once ranks are chosen. By default only without a "
            "window.",
        ),
    ] = None

    def config(self, statistics: Sequence[StatisticsFile] = ()) -> EigenAttentionConfig:
        """The configuration asked for.

        Args:
            statistics: by which latents are chosen where that is left open.

        Raises:
            EigenAttnError: if it is none.
        """
        given = {name: value for name, value in vars(self).items() if value is not None}
        return EigenAttentionConfig(**(statistics[0].latents if statistics else {}) | given)


@dataclass(frozen=True)
class CalibrationOptions:
    """What a model is calibrated on."""

    text: CalibrationSources = field(default_factory=lambda: [DEFAULT_SOURCE])
    samples: Annotated[int, typer.Option(min=1, help="How many windows to draw from the text.")] = 32
    length: Annotated[int, typer.Option(min=2, help="How many tokens a window has.")] = 1024
    seed: Annotated[int, typer.Option(**SEEDS, help="The seed of the draw.")] = 0

    def windows(self) -> CalibrationText:
        """The windows asked for."""
        return CalibrationText(self.text, self.samples, self.length, self.seed)


@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured of a model."""

    tokens: Annotated[int, typer.Option(min=2, help="How many tokens of each text to read.")] = 16384
    length: Annotated[int, typer.Option(min=2, help="How many tokens a window of text has.")] = 1024
    tasks: Annotated[
        list[str],
        typer.Option(
            help=f"Zero-shot multiple choice: `paper` ({', '.join(PAPER_TASKS)}), other names that lm-eval knows, or "
            ".jsonl files of `query`, `choices` and `gold`. Separated by commas, or repeated."
        ),
    ] = field(default_factory=list)
    limit: Annotated[int | None, typer.Option(min=1, help="How many items of each task to answer; all by default.")] = (
        None
    )
    needles: Annotated[
        str,
        typer.Option(help="Hide needles in texts of these lengths in tokens, separated by commas, and ask for them."),
    ] = ""
    copies: Annotated[int, typer.Option(min=0, help="How many windows to measure copying on.")] = 4

    def plan(self, texts: list[Text], trials: int = 4, **others: Any) -> EvaluationPlan:
        """The plan of an evaluation on these texts.

        Raises:
            EigenAttnError: if needles or tasks are none, or two texts have one name.
        """
        lengths = numbers("--needles", self.needles, int)
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


@dataclass(frozen=True)
class EvictionOptions:
    """Whether tokens are evicted from the cache."""

    evict: Annotated[
        str | None,
        typer.Option(
            help=f"Evict tokens from the cache by a rule: {' or '.join(EVICTION_RULES)}. Needs --budget.",
            metavar="RULE",
        ),
    ] = None
    budget: Annotated[
        str | None,
        typer.Option(
            help="How many tokens to keep of a sequence, such as 1024, or which share of those seen, such as 0.25.",
            metavar="TOKENS",
        ),
    ] = None

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


def numbers(option: str, text: str, kind: type) -> list[Any]:
    """The numbers of an option that takes several.

    Raises:
        EigenAttnError: if they are none.
    """
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise EigenAttnError(f"{option} takes numbers with commas between them, not {text!r}.") from None


def names(text: str) -> list[str]:
    """The names of an option that takes several."""
    return [part.strip() for part in text.split(",") if part.strip()]
