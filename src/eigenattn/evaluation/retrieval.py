"""Does the model still find what lies far back? Copying, and a needle in a haystack. Both are made in code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import EigenAttnError
from ..models.placement import input_device
from .reading import Logits, uncached

# The first tokens of a copy are not judged: where a copy begins cannot be foreseen.
UNJUDGED = 16
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Needles of the same form that are not asked for: without them any number in the text would be the right one.
DECOYS = 3
PLACES = (
    *("Lisbon", "Nairobi", "Oslo", "Lima", "Hanoi", "Quito", "Dublin", "Cairo", "Vienna", "Seoul"),
    *("Prague", "Athens", "Havana", "Madrid", "Ottawa", "Riga"),
)
DIGITS = 5


@torch.no_grad()
def copying(
    model: PreTrainedModel, windows: Tensor, logits_of: Logits = uncached, advance: Callable[[], None] = lambda: None
) -> list[float]:
    """Share of tokens guessed in the second copy of half of each window [N, T], repeated.

    Raises:
        EigenAttnError: if half a window has no token to judge.
    """
    half = windows.shape[1] // 2
    if half <= UNJUDGED:
        raise EigenAttnError(f"copying needs windows of more than {2 * UNJUDGED} tokens, not {windows.shape[1]}.")
    device = input_device(model)
    shares = []
    for window in windows[:, :half]:
        ids = torch.cat([window, window]).unsqueeze(0).to(device)
        judged = half - UNJUDGED
        guesses = logits_of(model, ids, judged + 1)[0, :-1].argmax(-1)
        shares.append((guesses == ids[0, -judged:].to(guesses.device)).float().mean().item())
        advance()
    return shares


@dataclass(frozen=True)
class Needles:
    """Where needles are hidden.

    Args:
        lengths: tokens of a whole sequence, question and answer included.
        depths: 0 puts the needle at the beginning, 1 just before the question.
        trials: sequences for each length and depth; each has another text, place and code.
    """

    lengths: Sequence[int]
    depths: Sequence[float] = DEPTHS
    trials: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if not all(0 <= depth <= 1 for depth in self.depths) or self.trials < 1:
            raise EigenAttnError("needles need depths in [0, 1] and at least one trial.")


def hide(tokenizer: Any, haystack: Tensor, length: int, depth: float, seed: int) -> tuple[Tensor, int]:
    """One sequence [length] that ends in a question and its answer, and how many tokens the answer has.

    Args:
        haystack: [N], tokens of the text that the needle is hidden in.

    Raises:
        EigenAttnError: if the length has no room for needle and decoys, or the text is shorter than it.
    """
    draw = torch.Generator().manual_seed(seed)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def number() -> str:
        return "".join(str(int(d)) for d in torch.randint(10, (DIGITS,), generator=draw))

    places = [PLACES[i] for i in torch.randperm(len(PLACES), generator=draw)[: DECOYS + 1].tolist()]
    # Question and answer are encoded apart, so that the answer has the same tokens both times.
    questions = [encode(f"\nThe access code of {place} is") for place in places]
    answers = [encode(f" {number()}") for _ in places]
    full_stop = encode(".\n")
    needles = [question + answer + full_stop for question, answer in zip(questions, answers, strict=True)]
    room = length - sum(map(len, needles)) - len(questions[0]) - len(answers[0])
    if room <= 0:
        raise EigenAttnError(f"{length} tokens have no room for a needle and its decoys: ask for longer sequences.")
    if len(haystack) < room:
        raise EigenAttnError(
            f"the text has {len(haystack)} tokens, too few to hide a needle in {length}: give a longer text."
        )
    start = int(torch.randint(len(haystack) - room + 1, (), generator=draw))
    filler = haystack[start : start + room].tolist()
    # Decoys lie evenly spread; the needle goes where it was asked to.
    spots = [depth, *((i + 0.5) / DECOYS for i in range(DECOYS))]
    hidden, previous = [], 0
    for spot, needle in sorted(zip(spots, needles, strict=True), key=lambda pair: pair[0]):
        cut = round(spot * room)
        hidden += filler[previous:cut] + needle
        previous = cut
    hidden += filler[previous:] + questions[0] + answers[0]
    return torch.tensor(hidden), len(answers[0])


@torch.no_grad()
def find_needles(
    model: PreTrainedModel,
    tokenizer: Any,
    haystack: Tensor,
    needles: Needles,
    logits_of: Logits = uncached,
    advance: Callable[[], None] = lambda: None,
) -> dict[tuple[int, float], list[float]]:
    """Whether each needle is found, 1 or 0, by length and depth.

    It is found if every token of the answer is the likeliest one, which is what greedy decoding would write.
    """
    device = input_device(model)
    found: dict[tuple[int, float], list[float]] = {}
    for length in needles.lengths:
        for depth in needles.depths:
            hits = []
            for trial in range(needles.trials):
                sequence, answer = hide(tokenizer, haystack, length, depth, needles.seed + trial)
                ids = sequence.unsqueeze(0).to(device)
                guesses = logits_of(model, ids, answer + 1)[0, :-1].argmax(-1)
                hits.append(float((guesses == ids[0, -answer:].to(guesses.device)).all()))
                advance()
            found[length, depth] = hits
    return found
