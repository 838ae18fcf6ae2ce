"""Continuing a prompt, with its speed and the cache it took."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..cache.evicting import EigenCache
from ..cache.size import allocated_bytes
from ..calibration.checks import check_length, checked
from ..errors import EigenAttnError
from ..files import is_text
from ..models.placement import input_device

# Temperatures between them leave logits in the range of half precision (chosen: far beyond any that people sample at).
COLDEST, HOTTEST = 1e-3, 1e3


@dataclass(frozen=True)
class Continuation:
    """A prompt's continuation. Speed is of whole generation, prefill included; bytes are those the cache allocated.

    `cached_tokens` went through the cache, and it still holds `kept_tokens`.
    """

    prompt: str
    text: str
    tokens: int
    tokens_per_second: float
    cache_bytes: int
    cached_tokens: int
    kept_tokens: int


@torch.no_grad()
def cache_bytes_used(model: PreTrainedModel, ids: Tensor) -> int:
    """Bytes that the cache holds after reading tokens [B, T], the last of them in a step of its own as in decoding."""
    cache = DynamicCache(config=model.config)
    for piece in (ids[:, :-1], ids[:, -1:]):
        model(piece.to(input_device(model)), past_key_values=cache, use_cache=True)
    return allocated_bytes(cache)


@torch.no_grad()
def continue_prompt(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    evict: str | None = None,
    budget: int | float | None = None,
) -> Continuation:
    """Generate up to `max_new_tokens` tokens, greedily at temperature 0.

    Args:
        evict, budget: as of `EigenCache`.

    Raises:
        EigenAttnError: if the prompt is empty or no text, it has tokens or a length that the model cannot read, the
            temperature is no number to divide by, or the model's predictions are no numbers.
    """
    if temperature and not COLDEST <= temperature <= HOTTEST:
        raise EigenAttnError(f"the temperature must be 0, or lie in [{COLDEST:g}, {HOTTEST:g}], not {temperature:g}.")
    if not is_text(prompt):
        raise EigenAttnError("the prompt is not UTF-8 text.")
    inputs = tokenizer(prompt, return_tensors="pt").to(input_device(model))
    length = inputs["input_ids"].shape[1]
    if not length:
        raise EigenAttnError("the prompt is empty, and this tokenizer begins with no token of its own: give a word.")
    check_length(model.config, length + max_new_tokens - 1)  # the last token is not read
    inputs.pop("token_type_ids", None)
    cache = EigenCache(model.config, evict=evict, budget=budget)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    torch.manual_seed(seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    start = time.perf_counter()
    with checked(model):
        output = cast(Any, model).generate(
            **inputs, max_new_tokens=max_new_tokens, past_key_values=cache, use_cache=True, pad_token_id=pad, **sampling
        )
    seconds = time.perf_counter() - start
    new = output[0, length:]
    return Continuation(
        prompt=prompt,
        text=tokenizer.decode(new, skip_special_tokens=True),
        tokens=len(new),
        tokens_per_second=len(new) / seconds,
        cache_bytes=allocated_bytes(cache),
        cached_tokens=int(cache.get_seq_length()),
        kept_tokens=cache.kept_tokens,
    )
