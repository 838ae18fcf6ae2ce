"""Tokens a second of whole models in transformers' `generate`."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from ..cache.size import kv_ratio
from ..errors import EigenAttnError
from ..models.conversion import eigen_layers
from ..models.loading import Source, load_model
from ..models.placement import input_device
from .timing import machine

CACHES = ("dynamic", "static")


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
def step_seconds(model: nn.Module, ids: Tensor, new_tokens: int, cache: str) -> list[float]:
    """Seconds of each step of decoding that follows a prompt [B, T]; reading the prompt is not among them."""
    clock = StepTimes()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        cache_implementation=cache,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]


def benchmark_decode(
    name: str,
    *,
    against: str,
    batch: int,
    length: int,
    new_tokens: int,
    rounds: int,
    caches: tuple[str, ...] = CACHES,
    dtype: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Decode with a model and a baseline in turns, on the same random tokens.

    Args:
        name, against: a model and its baseline: folder, hub id, `.gguf` file or `smollm2`.
        length: tokens of the prompt.
        new_tokens: tokens decoded in a round, at least 2.
        rounds: rounds; the median step of all rounds counts. One round before them warms up.

    Returns:
        The machine, and for each cache the tokens a second of both and their ratio.

    Raises:
        EigenAttnError: on a model that cannot be loaded, or another vocabulary.
    """
    if new_tokens < 2:
        raise EigenAttnError("at least 2 new tokens are needed: the first comes from reading the prompt.")
    models = {each: load_model(Source.of(each), dtype, device) for each in dict.fromkeys((against, name))}
    sizes = {model.config.get_text_config().vocab_size for model in models.values()}
    if len(sizes) > 1:
        raise EigenAttnError(f"{name} and {against} have different vocabularies: they cannot be compared.")
    where = input_device(models[name])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, sizes.pop(), (batch, length), generator=generator).to(where)
    rows = []
    for cache in caches:
        steps: dict[str, list[float]] = {each: [] for each in models}
        for turn in range(rounds + 1):
            for each, model in models.items():
                taken = step_seconds(model, ids, new_tokens, cache)
                steps[each] += taken if turn else []
        medians = {each: statistics.median(found) for each, found in steps.items()}
        rows.append(
            {
                "cache": cache,
                "tokens_per_second": batch / medians[name],
                "baseline_tokens_per_second": batch / medians[against],
                "ratio": medians[against] / medians[name],
            }
        )
    return {
        "kind": "decode",
        **machine(where),
        "model": name,
        "against": against,
        "kv_ratio": kv_ratio(eigen_layers(models[name])),
        "dtype": str(models[name].dtype).removeprefix("torch."),
        "batch": batch,
        "length": length,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "rows": rows,
    }
