"""From the names of models to figures that compare them."""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass
from typing import Any

from ..cache.rules import Eviction
from ..cache.size import kv_ratio
from ..errors import EigenAttnError
from ..evaluation.measuring import EvaluationPlan, Measured, measure, report
from ..evaluation.reading import Logits, Predictions, through_cache, through_eviction, uncached
from ..models.conversion import layouts_of
from ..models.loading import Source, load_model, load_tokenizer
from ..progress import TokenProgress
from ..version import versions


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a model and, if there is a baseline, of that on the same items.

    `results` is what `eigenattn.evaluation.measuring.report` gives. Keys ending in `_error` are standard errors; with a
    baseline, those of `relative_increase` and `difference` are of paired differences.
    """

    model: str
    baseline: str | None
    kv_ratio: float
    window: int
    protocol: dict[str, Any]
    results: dict[str, Any]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The evaluation as plain JSON values, its results beside the other names."""
        values = asdict(self)
        return values | values.pop("results")


def evaluate_checkpoint(
    name: str,
    plan: EvaluationPlan,
    *,
    baseline: str | None = None,
    cached: bool = False,
    eviction: Eviction | None = None,
    dtype: str | None = None,
    device: str | None = None,
    progress: bool = False,
) -> Evaluation:
    """Measure a model, and its baseline before it; one of them is in memory at a time.

    Args:
        name, baseline: folder, hub id, `.gguf` file or `smollm2`.
        cached: read texts and needles through the cache: half a sequence at once, then token by token.
        eviction: evict tokens of the model, before those that are judged: `eigenattn.evaluation.reading`.

    Raises:
        EigenAttnError: on a model or text that cannot be read, or a baseline with another tokenizer.
    """
    bars = TokenProgress(progress)
    source = Source.of(name)
    tokenizer = load_tokenizer(source)
    items = plan.items(tokenizer)  # so that a text which is too short ends it before any model is loaded
    if baseline is not None and any(
        not (theirs.shape == items.windows[text].shape and (theirs == items.windows[text]).all())
        for text, theirs in plan.items(load_tokenizer(Source.of(baseline))).windows.items()
    ):
        raise EigenAttnError(f"{baseline} splits text into other tokens than {name}: they cannot be compared.")

    plainly = through_cache if cached else uncached

    def run(
        which: str, logits_of: Logits, original: dict[str, Predictions] | None, keep: bool
    ) -> tuple[Measured, Any, float, int]:
        model = load_model(Source.of(which), dtype, device)
        layouts = layouts_of(model)
        found = measure(
            model,
            tokenizer,
            plan,
            items,
            title=which,
            bars=bars,
            logits_of=logits_of,
            original=original,
            keep=keep,
        )
        facts = (
            str(model.dtype).removeprefix("torch."),
            kv_ratio(layouts),
            max((layout.window for layout in layouts), default=0),
        )
        del model
        gc.collect()
        return found, *facts

    base = run(baseline, plainly, None, True)[0] if baseline is not None else None
    own, reading, evicted = plainly, "cached" if cached else "uncached", {}
    if eviction is not None:
        own = through_eviction(eviction.name, eviction.budget)
        reading = f"cached, {eviction.name} keeping {eviction.budget} tokens"
        evicted = {"evict": eviction.name, "budget": eviction.budget}
    measured, used_dtype, ratio, window = run(name, own, base.predictions if base else None, False)
    return Evaluation(
        model=name,
        baseline=baseline,
        kv_ratio=ratio,
        window=window,
        protocol=plan.protocol(used_dtype, reading) | evicted,
        results=report(measured, base),
        versions=versions(),
    )
