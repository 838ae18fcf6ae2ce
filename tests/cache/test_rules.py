"""Rules of eviction on made-up scores, and what they refuse."""

import pytest
import torch

from eigenattn import EigenAttnError, EigenCache
from eigenattn.cache.rules import EVICTION_RULES, OBSERVED, SINKS, Eviction, Held


def held(columns, votes=None, first=0, seen=100):
    rows = torch.tensor(columns, dtype=torch.int32).expand(1, 1, -1)
    votes = None if votes is None else torch.tensor(votes).view(1, 1, -1)
    return Held(rows, torch.tensor([[[first]]]), seen, votes)


def kept(rule, state, count):
    return state.columns[0, 0][Eviction(rule, 50).choose(state, count)[0, 0]].tolist()


def test_streaming_keeps_sinks_and_the_last():
    assert kept("streaming", held(range(50)), 7) == [0, 1, 2, 3, 47, 48, 49]
    assert kept("streaming", held([0, 1, 2, 3, 20, 31, 32]), 5) == [0, 1, 2, 3, 32]


def test_padding_goes_first_and_is_no_sink():
    assert kept("streaming", held(range(20), first=9), 6) == [9, 10, 11, 12, 18, 19]
    assert kept("streaming", held(range(20), first=17), 5) == [0, 1, 17, 18, 19]  # of padding the first
    assert kept("snapkv", held(range(20), [1.0] * 9 + [0.1] * 11, first=9), 11) == list(range(9, 20))


def test_snapkv_keeps_what_is_attended_to_with_its_neighbours():
    votes = [0.0] * 60
    votes[20], votes[50] = 0.5, 0.25
    assert kept("snapkv", held(range(60), votes), 7) == list(range(17, 24))
    assert kept("snapkv", held(range(60), votes), 14) == [*range(17, 24), *range(47, 54)]


def test_snapkv_keeps_the_tokens_whose_queries_vote():
    votes = [1.0] * 10 + [0.0] * 90
    assert kept("snapkv", held(range(100), votes), OBSERVED) == list(range(100 - OBSERVED, 100))


def test_budgets():
    assert Eviction("streaming", 64).kept(1000) == 64
    assert Eviction("snapkv", 0.25).kept(1001) == 251
    assert Eviction("snapkv", 0.25).kept(40) == OBSERVED
    assert Eviction("streaming", 0.01).kept(40) == SINKS + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evict": "h2o", "budget": 64}, f"choose from {', '.join(EVICTION_RULES)}"),
        ({"evict": "snapkv"}, "both"),
        ({"budget": 64}, "both"),
        ({"evict": "snapkv", "budget": 31}, "32 tokens at least"),
        ({"evict": "streaming", "budget": 0}, "5 tokens at least"),
        ({"evict": "snapkv", "budget": 1.5}, "fraction between 0 and 1"),
        ({"evict": "snapkv", "budget": True}, "fraction between 0 and 1"),
        ({"evict": "snapkv", "budget": "many"}, "fraction between 0 and 1"),
    ],
)
def test_bad_choices_are_refused(options, message):
    with pytest.raises(EigenAttnError, match=message):
        EigenCache(**options)
