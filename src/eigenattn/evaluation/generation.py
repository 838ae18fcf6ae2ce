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
from ..models.cache_names import CACHE
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
        model(piece.to(input_device(model)), use_cache=True, **{CACHE: cache})
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
    sampling = _sampling(temperature)
    if not is_text(prompt):
        raise EigenAttnError("the prompt is not UTF-8 text.")
    inputs = tokenizer(prompt, return_tensors="pt").to(input_device(model))
    length = inputs["input_ids"].shape[1]
    if not length:
        raise EigenAttnError("the prompt is empty, and this tokenizer begins with no token of its own: give a word.")
    check_length(model.config, length + max_new_tokens - 1)  # the last token is not read
    inputs.pop("token_type_ids", None)
    cache = EigenCache(model.config, evict=evict, budget=budget)
    torch.manual_seed(seed)
    output, seconds = _generated(model, tokenizer, cache, max_new_tokens=max_new_tokens, **inputs, **sampling)
    new = output[length:]
    return Continuation(
        prompt=prompt,
        text=tokenizer.decode(new, skip_special_tokens=True),
        tokens=len(new),
        tokens_per_second=len(new) / seconds,
        cache_bytes=allocated_bytes(cache),
        cached_tokens=int(cache.get_seq_length()),
        kept_tokens=cache.kept_tokens,
    )


def _sampling(temperature: float) -> dict[str, Any]:
    """How transformers is asked to sample.

    Raises:
        EigenAttnError: if the temperature is no number to divide by.
    """
    if temperature and not COLDEST <= temperature <= HOTTEST:
        raise EigenAttnError(f"the temperature must be 0, or lie in [{COLDEST:g}, {HOTTEST:g}], not {temperature:g}.")
    return {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}


def _generated(model: PreTrainedModel, tokenizer: Any, cache: EigenCache, **options: Any) -> tuple[Tensor, float]:
    """The prompt with what the model says to it [T], and the seconds it took."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    start = time.perf_counter()
    with checked(model):
        output = cast(Any, model).generate(use_cache=True, pad_token_id=pad, **{CACHE: cache}, **options)
    return output[0], time.perf_counter() - start


@dataclass(frozen=True)
class Turn:
    """One answer of a conversation; bytes are those that the cache has allocated by then, for so many tokens."""

    text: str
    tokens: int
    tokens_per_second: float
    cache_bytes: int
    cached_tokens: int


class Conversation:
    """Turns with one cache, which keeps what was said before.

    A model without a chat template continues the text as it is, its own words included.

    Args:
        temperature: 0 takes the likeliest token.
        evict, budget: as of `EigenCache`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        evict: str | None = None,
        budget: int | float | None = None,
    ) -> None:
        self.sampling = _sampling(temperature)
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self.eviction = {"evict": evict, "budget": budget}
        self.messages: list[dict[str, str]] = []
        torch.manual_seed(seed)
        self._renew()

    def _renew(self) -> None:
        self.cache, self.held = EigenCache(self.model.config, **self.eviction), []

    def _tokens(self) -> list[int]:
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(self.messages, tokenize=False, add_generation_prompt=True)
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.tokenizer("".join(each["content"] for each in self.messages))["input_ids"]

    @torch.no_grad()
    def answer(self, said: str, streamer: Any = None) -> Turn:
        """Say something, and hear the answer.

        Args:
            streamer: of transformers, which is given tokens as they come.

        Raises:
            EigenAttnError: if nothing is said, or more than the model has positions for.
        """
        if not is_text(said):
            raise EigenAttnError("what was said is not UTF-8 text.")
        self.messages.append({"role": "user", "content": said})
        ids = self._tokens()
        try:
            if not ids:
                raise EigenAttnError("nothing was said: give a word.")
            check_length(self.model.config, len(ids) + self.max_new_tokens - 1)
        except EigenAttnError:
            self.messages.pop()
            raise
        if ids[: len(self.held)] != self.held or len(ids) == len(self.held):
            self._renew()  # the template, or the tokenizer, has written what was said in another way
        prompt = torch.tensor([ids], device=input_device(self.model))
        output, seconds = _generated(
            self.model,
            self.tokenizer,
            self.cache,
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=self.max_new_tokens,
            streamer=streamer,
            **self.sampling,
        )
        new = output[len(ids) :]
        # The last token has not been read.
        self.held = output[: int(self.cache.get_seq_length())].tolist()
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": text})
        return Turn(
            text,
            tokens=len(new),
            tokens_per_second=len(new) / seconds,
            cache_bytes=allocated_bytes(self.cache),
            cached_tokens=int(self.cache.get_seq_length()),
        )
