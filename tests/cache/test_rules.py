"""Rules of eviction on made-up scores, and what they refuse."""

import pytest
import torch

from eigenattn import EigenAttnError, EigenCache
from eigenattn.cache.rules import EVICTION_RULES, OBSERVED, SINKS, Eviction, Held


def held(columns, kept, votes=None, first=0, seen=100, keys=None, tally=None):
    """One head's rows: the votes are attention weights of any number of queries, keys are [F, D]."""
    columns = torch.tensor(columns, dtype=torch.int32).expand(1, 1, -1)
    votes, keys, tally = (None if x is None else torch.tensor(x)[None, None] for x in (votes, keys, tally))
    return Held(
        columns=columns,
        first=torch.tensor([[[first]]]),
        seen=seen,
        queries=seen,
        kept=kept,
        keys=lambda: keys,
        values=lambda: pytest.fail("no rule here looks at values"),
        attention=lambda queries: votes.unsqueeze(2).expand(-1, -1, queries, -1),
        tally=tally,
    )


def kept(rule, state):
    return state.columns[0, 0][Eviction(rule, 50).choose(state)[0, 0]].tolist()


def test_streaming_keeps_sinks_and_the_last():
    assert kept("streaming", held(range(50), 7)) == [0, 1, 2, 3, 47, 48, 49]
    assert kept("streaming", held([0, 1, 2, 3, 20, 31, 32], 5)) == [0, 1, 2, 3, 32]


def test_padding_goes_first_and_is_no_sink():
    assert kept("streaming", held(range(20), 6, first=9)) == [9, 10, 11, 12, 18, 19]
    assert kept("streaming", held(range(20), 5, first=17)) == [0, 1, 17, 18, 19]  # of padding the first
    assert kept("snapkv", held(range(20), 11, [1.0] * 9 + [0.1] * 11, first=9)) == list(range(9, 20))


def test_snapkv_keeps_what_is_attended_to_with_its_neighbours():
    votes = [0.0] * 60
    votes[20], votes[50] = 0.5, 0.25
    assert kept("snapkv", held(range(60), 7, votes)) == list(range(17, 24))
    assert kept("snapkv", held(range(60), 14, votes)) == [*range(17, 24), *range(47, 54)]


def test_snapkv_keeps_the_tokens_whose_queries_vote():
    votes = [1.0] * 10 + [0.0] * 90
    assert kept("snapkv", held(range(100), OBSERVED, votes)) == list(range(100 - OBSERVED, 100))


def test_tova_keeps_what_is_attended_to():
    assert kept("tova", held(range(6), 3, [0.1, 0.3, 0.0, 0.2, 0.05, 0.15])) == [1, 3, 5]
    assert kept("tova", held(range(6), 3, [0.1, 0.3, 0.0, 0.2, 0.05, 0.15], first=2)) == [3, 4, 5]


def test_h2o_keeps_half_by_attention_so_far_and_half_for_being_recent():
    tally = [0.5, 0.1, 0.9, 0.2, 0.0, 0.0]
    assert kept("h2o", held(range(6), 4, tally=tally)) == [0, 2, 4, 5]
    assert kept("h2o", held(range(6), 3, tally=tally)) == [0, 2, 5]


def test_knorm_keeps_small_keys():
    assert kept("knorm", held(range(4), 2, keys=[[3.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-2.0, 0.0]])) == [1, 2]


def test_keydiff_keeps_keys_unlike_the_others():
    keys = [[9.0, 0.1], [1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [-1.0, 0.2]]
    assert kept("keydiff", held(range(5), 2, keys=keys)) == [2, 4]
    # Padding is none of the others: without it the first and the last two lie apart.
    padding = [[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]
    alone = [[1.0, 0.0], [1.0, 0.2], [0.0, 1.0]]
    assert kept("keydiff", held(range(6), 1, keys=padding + alone, first=3)) == [5]


def test_budgets():
    assert Eviction("streaming", 64).kept(1000) == 64
    assert Eviction("snapkv", 0.25).kept(1001) == 251
    assert Eviction("snapkv", 0.25).kept(40) == OBSERVED
    assert Eviction("streaming", 0.01).kept(40) == SINKS + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evict": "oldest", "budget": 64}, f"choose from {', '.join(EVICTION_RULES)}"),
        ({"evict": "snapkv"}, "both"),
        ({"budget": 64}, "both"),
        ({"evict": "snapkv", "budget": 31}, "32 tokens at least"),
        ({"evict": "streaming", "budget": 0}, "5 tokens at least"),
        ({"evict": "h2o", "budget": 1}, "2 tokens at least"),
        ({"evict": "tova", "budget": 0}, "1 tokens at least"),
        ({"evict": "snapkv", "budget": 1.5}, "fraction between 0 and 1"),
        ({"evict": "snapkv", "budget": True}, "fraction between 0 and 1"),
        ({"evict": "snapkv", "budget": "many"}, "fraction between 0 and 1"),
    ],
)
def test_bad_choices_are_refused(options, message):
    with pytest.raises(EigenAttnError, match=message):
        EigenCache(**options)
