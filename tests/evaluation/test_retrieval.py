"""Needles and copying, with models that look back in known ways."""

from types import SimpleNamespace

import pytest
import torch
from tiny import character_tokenizer
from torch import nn

from eigenattn.errors import EigenAttnError
from eigenattn.evaluation.retrieval import DEPTHS, Needles, copying, find_needles, hide

TOKENIZER = character_tokenizer()
HAYSTACK = torch.tensor(TOKENIZER("It was the best of times, it was the worst of times. " * 30)["input_ids"])


class LookingBack(nn.Module):
    """Foresees what followed the last occurrence of the last `suffix` tokens, among the last `reach`."""

    def __init__(self, suffix: int, reach: int = 10**9) -> None:
        super().__init__()
        self.suffix, self.reach = suffix, reach
        self.embedding = nn.Embedding(1, 1)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, ids: torch.Tensor, use_cache: bool, logits_to_keep: int) -> SimpleNamespace:
        row, n = ids[0].tolist(), self.suffix
        logits = torch.zeros(1, logits_to_keep, 128)
        for i in range(logits_to_keep):
            end = len(row) - logits_to_keep + i + 1
            for start in range(end - 1 - n, max(end - self.reach, 0) - 1, -1):
                if row[start : start + n] == row[end - n : end]:
                    logits[0, i, row[start + n]] = 1
                    break
        return SimpleNamespace(logits=logits)


def accuracy(model: nn.Module, depths=DEPTHS) -> list[float]:
    found = find_needles(model, TOKENIZER, HAYSTACK, Needles([600], depths))
    return [sum(hits) / len(hits) for hits in found.values()]


def test_a_model_that_remembers_finds_every_needle():
    assert accuracy(LookingBack(suffix=14)) == [1.0] * 5


def test_a_model_that_forgets_finds_near_needles_alone():
    assert accuracy(LookingBack(suffix=14, reach=300)) == [0.0, 0.0, 0.0, 1.0, 1.0]


def test_decoys_mislead_a_model_that_takes_any_number():
    assert accuracy(LookingBack(suffix=4), (0.0, 0.5)) == [0.0, 0.0]


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_sequence_has_its_length_and_its_needle_at_its_depth(depth):
    ids, answer = hide(TOKENIZER, HAYSTACK, 500, depth, seed=3)
    text = TOKENIZER.decode(ids)
    assert ids.shape == (500,)
    question, code = text[:-answer].rsplit("\n", 1)[1], text[-answer:]
    assert code.strip().isdigit() and len(code.strip()) == 5
    assert text.count(code) == 2
    needle = text.index(question + code)
    others = 4 * len("\nThe access code of Vienna is 12345.\n")
    assert depth * (500 - others) * 0.85 - 1 <= needle <= depth * 500 + 1
    assert text.count("The access code of") == 5


def test_needles_need_room_and_text():
    with pytest.raises(EigenAttnError, match="no room"):
        hide(TOKENIZER, HAYSTACK, 100, 0.5, 0)
    with pytest.raises(EigenAttnError, match="too few"):
        hide(TOKENIZER, HAYSTACK[:100], 600, 0.5, 0)
    with pytest.raises(EigenAttnError, match="depths"):
        Needles([600], [1.5])


def test_copying():
    windows = torch.randperm(100, generator=torch.Generator().manual_seed(0))[None, :80]
    assert copying(LookingBack(suffix=1), windows) == [1.0]
    assert copying(LookingBack(suffix=1, reach=20), windows) == [0.0]
    with pytest.raises(EigenAttnError, match="copying needs"):
        copying(LookingBack(suffix=1), windows[:, :32])
