"""Everything that is measured of one model, and how two models compare. `evaluate` and `sweep` share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..calibration.checks import check_length, checked
from ..calibration.text import Text, tokenize
from ..errors import EigenAttnError
from ..progress import TASK, TokenProgress
from .paired import Estimate, difference, exponential, mean
from .reading import Logits, Predictions, Reading, read, scored_tokens, uncached, windows_of
from .retrieval import UNJUDGED, Needles, copying, find_needles
from .tasks import TaskResult, run_tasks


@dataclass(frozen=True)
class Items:
    """What a model is to read.

    Args:
        windows: [N, T] of every text, by its name.
        haystack: [N], the first text, of a long one the beginning.
    """

    windows: dict[str, Tensor]
    haystack: Tensor | None


@dataclass(frozen=True)
class EvaluationPlan:
    """What to measure.

    Args:
        texts: texts to predict; the first one gives the text for copying, and hides the needles.
        tokens, length, stride: how much of each text, in windows of how many tokens, one every how many.
        copies: windows that copying is measured on.
        needles: where needles are hidden, or None for none.
        tasks: from `load_tasks`; of each the first `limit` items, `batch_size` at a time.
    """

    texts: Sequence[Text] = ()
    tokens: int = 16384
    length: int = 1024
    stride: int | None = None
    copies: int = 0
    needles: Needles | None = None
    tasks: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        names = [text.source for text in self.texts]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise EigenAttnError(f"two texts are called {twice[0]!r}: rename one of the files.")
        if self.needles is not None and not names:
            raise EigenAttnError("needles need a text to be hidden in.")

    def items(self, tokenizer: Any) -> Items:
        """The texts in tokens.

        Raises:
            EigenAttnError: if a text is too short.
        """
        most = max(self.tokens, *(self.needles.lengths if self.needles else ()), 0)
        tokens = {text.source: tokenize(tokenizer, text, most) for text in self.texts}
        windows = {name: windows_of(each, self.tokens, self.length, self.stride) for name, each in tokens.items()}
        return Items(windows, next(iter(tokens.values()), None))

    def protocol(self, dtype: str, reading: str) -> dict[str, Any]:
        """The plan in plain values, for results to state."""
        return {
            "length": self.length,
            "stride": self.stride or self.length,
            "tokens_read": self.tokens,
            "dtype": dtype,
            "reading": reading,
            "task_limit": self.limit,
        }


@dataclass(frozen=True)
class Measured:
    """What was measured of one model, item by item."""

    texts: dict[str, Reading]
    copying: list[float] | None
    needles: dict[tuple[int, float], list[float]]
    tasks: dict[str, TaskResult]

    @property
    def predictions(self) -> dict[str, Predictions]:
        """Predictions kept, by text."""
        return {name: reading.predictions for name, reading in self.texts.items() if reading.predictions is not None}


def measure(
    model: PreTrainedModel,
    tokenizer: Any,
    plan: EvaluationPlan,
    items: Items,
    *,
    title: str,
    bars: TokenProgress,
    logits_of: Logits = uncached,
    original: dict[str, Predictions] | None = None,
    keep: bool = False,
) -> Measured:
    """Measure one model.

    Args:
        items: the plan's, in this tokenizer's tokens.
        title: what progress bars call it.
        logits_of: how the model reads; tasks are always read at once, for that is lm-eval's way.
        original: predictions of the original model, by text, to be compared with.
        keep: keep this model's predictions.

    Raises:
        EigenAttnError: if the model does not know the tokens, or its predictions are no numbers.
    """
    windows = items.windows
    first = next(iter(windows.values()), None)
    copies = plan.copies if first is not None and plan.length // 2 > UNJUDGED else 0
    needles = plan.needles
    steps = sum(map(len, windows.values())) + min(copies, 0 if first is None else len(first))
    check_length(model.config, max(needles.lengths, default=0) if needles else 0)
    steps += len(needles.lengths) * len(needles.depths) * needles.trials if needles else 0
    with checked(model), bars.bar(f"Reading with {title}", steps) as bar:

        def advance() -> None:
            bar.advance(TASK)

        readings = {
            name: read(
                model,
                each,
                scored=scored_tokens(plan.length, plan.stride),
                logits_of=logits_of,
                original=(original or {}).get(name),
                keep=keep,
                advance=advance,
            )
            for name, each in windows.items()
        }
        copied = copying(model, first[:copies], logits_of, advance) if copies and first is not None else None
        found = {}
        if needles is not None and items.haystack is not None:
            found = find_needles(model, tokenizer, items.haystack, needles, logits_of, advance)
    with checked(model):
        tasks = run_tasks(model, tokenizer, plan.tasks, limit=plan.limit, batch_size=plan.batch_size)
    return Measured(readings, copied, found, tasks)


def report(measured: Measured, baseline: Measured | None = None) -> dict[str, Any]:
    """Figures with standard errors in plain JSON values; with a baseline also its own, and paired differences."""
    base = baseline
    result: dict[str, Any] = {
        "texts": [_text(name, r, base.texts[name] if base else None) for name, r in measured.texts.items()]
    }
    if measured.copying is not None:
        result["copying"] = _accuracy(measured.copying, base.copying if base else None)
    result["needles"] = [
        {"length": length, "depth": depth} | _accuracy(hits, base.needles[length, depth] if base else None)
        for (length, depth), hits in measured.needles.items()
    ]
    result["tasks"] = [_task(name, task, base.tasks[name] if base else None) for name, task in measured.tasks.items()]
    return result


def _with_error(name: str, estimate: Estimate) -> dict[str, float | None]:
    return {name: estimate.value, f"{name}_error": estimate.error}


def _text(name: str, reading: Reading, baseline: Reading | None) -> dict[str, Any]:
    row: dict[str, Any] = {"text": name, "windows": len(reading.nll), "tokens": reading.tokens}
    row |= _with_error("perplexity", reading.perplexity)
    if baseline is not None:
        ratio = exponential(difference(reading.nll, baseline.nll))
        row["baseline_perplexity"] = baseline.perplexity.value
        row |= _with_error("relative_increase", Estimate(ratio.value - 1, ratio.error))
    if reading.divergence is not None and reading.agreement is not None:
        row |= _with_error("divergence", mean(reading.divergence))
        row |= _with_error("top1_agreement", mean(reading.agreement))
    return row


def _accuracy(values: Sequence[float], baseline: Sequence[float] | None) -> dict[str, Any]:
    row: dict[str, Any] = {"items": len(values)} | _with_error("accuracy", mean(values))
    if baseline is not None:
        row["baseline_accuracy"] = mean(baseline).value
        row |= _with_error("difference", difference(values, baseline))
    return row


def _task(name: str, task: TaskResult, baseline: TaskResult | None) -> dict[str, Any]:
    row = {"task": name} | _accuracy(task.correct, baseline.correct if baseline else None)
    if task.correct_normalised is not None:
        row["normalised"] = _accuracy(task.correct_normalised, baseline.correct_normalised if baseline else None)
    return row | {"mean_tokens": task.mean_tokens}
