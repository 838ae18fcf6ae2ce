"""`eigenattn chat`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import typer
from rich.console import Console
from transformers import TextStreamer

from ..errors import EigenAttnError
from ..evaluation.generation import Conversation, Turn
from ..models.loading import Source, load_model, load_tokenizer
from ..report.inspection import inspect_checkpoint
from .common import COMMON, Model, command, say
from .options import EvictionOptions, LoadingOptions, SamplingOptions

NEW, QUIT = "/new", "/quit"
KIB = 2**10


@command(
    "eigenattn chat smollm2-4-bits",
    "eigenattn chat smollm2 --temperature 0.7",
    "eigenattn chat llama-4-bits --evict snapkv --budget 4096",
    panel=COMMON,
    max_new_tokens=typer.Option(min=1, help="How many tokens an answer has at most."),
)
def chat(
    model: Model,
    *,
    max_new_tokens: int = 256,
    sampling: SamplingOptions,
    eviction: EvictionOptions,
    loading: LoadingOptions,
) -> None:
    """Talk with a model, original or compressed; after each answer, what its cache takes beside the original's.

    Ends with an empty end of input (Ctrl-D) or `/quit`; `/new` forgets what was said. A model without a chat template
    continues what is said, as text.
    """
    source, found = Source.of(model), inspect_checkpoint(model)
    tokenizer, loaded = load_tokenizer(source), load_model(source, **vars(loading))
    original = found.baseline_bytes_per_token // found.element_size * loaded.dtype.itemsize
    options = {"max_new_tokens": max_new_tokens, **vars(sampling), **eviction.arguments()}
    console = Console(highlight=False)
    talk = Conversation(loaded, tokenizer, **options)
    for said in _lines():
        if said == NEW:
            talk = Conversation(loaded, tokenizer, **options)
            continue
        try:
            turn = talk.answer(said, TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
        except EigenAttnError as error:
            say(console, f"{error} {NEW} begins anew.")
            continue
        say(console, size_in_words(turn, original), style="dim")


def _lines() -> Iterator[str]:
    """What is said: typed after a prompt, or piped in, a line each."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip() == QUIT:
            return
        if line.strip():
            yield line.strip() if line.strip() == NEW else line


def size_in_words(turn: Turn, original: int) -> str:
    """What the cache takes, beside an original's of `original` bytes a token."""
    whole = turn.cached_tokens * original
    return (
        f"{turn.tokens} tokens, {turn.tokens_per_second:.1f} a second; cache of {turn.cached_tokens:,} tokens: "
        f"{turn.cache_bytes / KIB:,.0f} KiB, the original's {whole / KIB:,.0f} KiB ({turn.cache_bytes / whole:.0%})"
    )
