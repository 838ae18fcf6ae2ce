"""Tokens a second of whole models in transformers' `generate`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from transformers import CompileConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from ..errors import EigenAttnError
from ..models.placement import input_device
from .shapes import Contest
from .timing import machine

# Compiling takes a compiler, and minutes: without a GPU the first two are measured unless others are asked for.
CACHES = ("dynamic", "static", "static-compiled", "dynamic-compiled")


class StepTimes(StoppingCriteria):
    """Never stops, and notes when each token is there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def step_seconds(model: Any, ids: Tensor, new_tokens: int, cache: str) -> list[float]:
    """Seconds of each step of decoding that follows a prompt [B, T]; reading the prompt is not among them."""
    clock = StepTimes()
    kind, _, compiled = cache.partition("-")
    options: dict[str, Any] = {"disable_compile": True}
    if compiled and kind == "static":
        options = {"compile_config": CompileConfig()}
        options["compile_config"]._compile_all_devices = True  # transformers does it on GPUs alone
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        cache_implementation=kind,
        **options,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]


@contextmanager
def _compiled(model: PreTrainedModel, cache: str) -> Iterator[None]:
    """With a dynamic cache, generate leaves compiling to who wants it."""
    plain = model.forward
    if cache == "dynamic-compiled":
        model.forward = torch.compile(plain, dynamic=True)
    try:
        yield
    finally:
        model.forward = plain
        torch._dynamo.reset()


def benchmark_decode(
    contest: Contest,
    *,
    batch: int,
    length: int,
    new_tokens: int,
    rounds: int,
    caches: tuple[str, ...] | None = None,
) -> dict[str, Any]:
    """Decode with a model and a baseline in turns, on the same random tokens.

    Args:
        contest: what is compared.
        length: tokens of the prompt.
        new_tokens: tokens decoded in a round, at least 2.
        rounds: rounds; the median step of all rounds counts. One round before them warms up.
        caches: some of `CACHES`.

    Returns:
        The machine, and for each cache the tokens a second of both and their ratio.

    Raises:
        EigenAttnError: on a model that cannot be loaded, or another vocabulary.
    """
    if new_tokens < 2:
        raise EigenAttnError("at least 2 new tokens are needed: the first comes from reading the prompt.")
    name, against = contest.name, contest.baseline
    models = contest.models(length + new_tokens - 1)
    sizes = {model.config.get_text_config().vocab_size for model in models.values()}
    if len(sizes) > 1:
        raise EigenAttnError(f"{name} and {against} have different vocabularies: they cannot be compared.")
    where = input_device(models[name])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, sizes.pop(), (batch, length), generator=generator).to(where)
    rows, failed = [], []
    for cache in caches or (CACHES if where.type == "cuda" else CACHES[:2]):
        steps: dict[str, list[float]] = {each: [] for each in models}
        try:
            with ExitStack() as stack:
                for model in models.values():
                    stack.enter_context(_compiled(model, cache))
                for turn in range(rounds + 1):
                    for each, model in models.items():
                        taken = step_seconds(model, ids, new_tokens, cache)
                        steps[each] += taken if turn else []
        except (TorchDynamoException, NotImplementedError) as error:
            failed.append({"cache": cache, "reason": str(error).strip().splitlines()[0]})
            continue
        medians = {each: statistics.median(found) for each, found in steps.items()}
        rows.append({"cache": cache, **contest.speeds(batch, medians)})
    return {
        "kind": "decode",
        **machine(where),
        **contest.facts(models[name]),
        "batch": batch,
        "length": length,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "rows": rows,
        "failed": failed,
    }
