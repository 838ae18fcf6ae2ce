"""The layout of a layer's latents: written and read, counted, and shared out."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import HEAD_DIM, converted, some_bases

from eigenattn import EigenAttnError
from eigenattn.cache.layout import SIDES, Latent, Layout
from eigenattn.cache.packing import PARTS, Widths
from eigenattn.cache.size import baseline_bytes_per_token, bytes_per_token, cache_bytes, kv_ratio, ratio_at
from eigenattn.cache.store import room_for
from eigenattn.compression.folding import attach, detach

D, G = 16, 4
CODED = Widths.of({8: 3, 6: 2, 4: 5, 3: 2, 2: 7, 1: 1})


def key(rank, heads=1, widths=None):
    return Latent(("key",), heads, rank, D, widths)


def value(rank, heads=1, widths=None):
    return Latent(("value",), heads, rank, D, widths)


def both(rank, heads=1, widths=None):
    return Latent(SIDES, heads, rank, D, widths)


LAYOUTS = {
    "full": Layout.full(G, D),
    "plain": Layout(G, (key(12), value(8)), 6),
    "keys alone": Layout(G, (key(3), value(D))),
    "shared": Layout(G, (key(20, 2), value(14, 4))),
    "coded": Layout(G, (key(20, 2, CODED), value(20, 4, CODED)), 32),
    "one side coded": Layout(G, (key(12), value(8, 1, Widths.of({1: 8})))),
    "beside": Layout(G, (key(12), value(8)), beside=True),
    "both": Layout(G, (both(17),), 1),
    "both shared and coded": Layout(G, (both(20, 4, CODED),)),
    "tied": Layout(G, (key(12),), 6, tied=True),
    "tied and full": Layout.full(G, D, tied=True),
}
ORIGINAL = {name: (1 if layout.tied else 2) * G * D for name, layout in LAYOUTS.items()}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))


@layouts
def test_reading_gives_back_what_was_written(layout):
    written, original = json.loads(json.dumps(layout.to_dict())), Layout.full(G, D, layout.tied)
    assert Layout.from_dict(written, original, layout.window) == layout


widths = st.dictionaries(st.sampled_from(sorted(PARTS)), st.integers(0, 9), min_size=1).map(Widths.of)
latents = st.builds(
    lambda sides, heads, rank, coded: Latent(sides, heads, coded.channels if coded else rank, 2 * D, coded or None),
    st.sampled_from([(side,) for side in SIDES] + [SIDES]),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 2 * D),
    st.one_of(st.none(), widths.filter(lambda x: 0 < x.channels <= 2 * D)),
)


@given(latents)
@settings(max_examples=80, deadline=None)
def test_any_latent(latent):
    assert Latent.from_dict(json.loads(json.dumps(latent.to_dict())), 2 * D) == latent
    assert latent.bytes(4) == (4 * latent.rank if latent.widths is None else latent.widths.bytes)
    assert latent.full_rank == len(latent.sides) * latent.heads * 2 * D >= latent.rank


GOOD = {"sides": ["key"], "heads": 2, "rank": 8}
REST = {"sides": ["value"], "heads": 1, "rank": D}


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ({"sides": ["key"], "heads": 2}, "heads and rank"),
        ({**GOOD, "rank": 0}, "heads and rank"),
        ({**GOOD, "rank": 8.0}, "heads and rank"),
        ({**GOOD, "heads": True}, "heads and rank"),
        ({**GOOD, "heads": -2}, "heads and rank"),
        ({**GOOD, "rank": 33}, "above full rank, 32"),
        ({**GOOD, "heads": 3}, "3 KV heads share a latent, and the model has 4"),
        ({**GOOD, "sides": "key"}, "no sides"),
        ({**GOOD, "sides": ["value", "key"]}, "no sides"),
        ({**GOOD, "sides": []}, "no sides"),
        ({**GOOD, "sides": ["value"]}, "each in one latent"),
        ({**GOOD, "sides": ["key", "value"]}, "each in one latent"),
        ({**GOOD, "window": 6}, "no latent"),
        ({**GOOD, "widths": {"8": 7}}, "7 channels and rank 8"),
        ({**GOOD, "widths": {"8": 9, "4": -1}}, "no widths"),
        ({**GOOD, "widths": {"7": 8}}, "no widths"),
        ({**GOOD, "scaled": "yes"}, "no scale"),
        ({**GOOD, "widths": {8: 8}}, "no widths"),
        ({**GOOD, "widths": {"8": 8.0}}, "no widths"),
        ({**GOOD, "widths": [8, 0, 0, 0]}, "no widths"),
        ({**GOOD, "widths": {}}, "0 channels and rank 8"),
        ([2, 8], "no latent"),
        (None, "no latent"),
    ],
)
def test_malformed_latents_are_refused(first, message):
    Layout.from_dict({"latents": [GOOD, REST]}, Layout.full(G, D), 0)
    with pytest.raises(ValueError, match=message):
        Layout.from_dict({"latents": [first, REST]}, Layout.full(G, D), 0)


@pytest.mark.parametrize(
    "values",
    [None, [], {}, {"latents": None}, {"latents": GOOD}, "latents", {"latents": [GOOD, REST], "beside": 1}],
)
def test_malformed_layouts_are_refused(values):
    with pytest.raises(ValueError, match="no latents"):
        Layout.from_dict(values, Layout.full(G, D), 0)


@pytest.mark.parametrize("values", [[], [GOOD], [REST], [GOOD, GOOD, REST], [REST, GOOD]])
def test_each_side_lies_in_one_latent_keys_first(values):
    with pytest.raises(ValueError, match="each in one latent"):
        Layout.from_dict({"latents": values}, Layout.full(G, D), 0)


@pytest.mark.parametrize("values", [[], [GOOD, REST], [REST], [{**GOOD, "sides": ["key", "value"]}]])
def test_values_that_are_keys_lie_in_no_latent(values):
    assert Layout.from_dict({"latents": [GOOD]}, Layout.full(G, D, tied=True), 0).tied
    with pytest.raises(ValueError, match="keys are not each in one latent"):
        Layout.from_dict({"latents": values}, Layout.full(G, D, tied=True), 0)


def test_bytes():
    expected = {
        "full": 2 * G * D * 2,
        "plain": G * (12 + 8) * 2,
        "keys alone": G * (3 + D) * 2,
        "shared": (2 * 20 + 14) * 2,
        # Planes are filled up to whole bytes: 3; 1 and 1; 3; 1 and 1; 2; 1.
        "coded": (2 + 1) * (3 + 2 + 3 + 2 + 2 + 1),
        "one side coded": G * (12 * 2 + 1),
        "beside": G * (12 + 8) * 2,
        "both": G * 17 * 2,
        "both shared and coded": 3 + 2 + 3 + 2 + 2 + 1,
        "tied": G * 12 * 2,
        "tied and full": G * D * 2,
    }
    for name, layout in LAYOUTS.items():
        assert layout.bytes_per_token(2) == expected[name], name
        assert kv_ratio([layout]) == expected[name] / (ORIGINAL[name] * 2), name
    assert bytes_per_token(LAYOUTS.values(), 2) == sum(expected.values())
    assert baseline_bytes_per_token(LAYOUTS.values(), 2) == sum(ORIGINAL.values()) * 2
    assert kv_ratio([]) == 1


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("length", [1, 6, 7, 500])
def test_bytes_of_a_cache(name, length):
    layout, original = LAYOUTS[name], ORIGINAL[name]
    exact = min(length, layout.window + 1) if layout.window else 0
    rows = max(length - layout.window, 0)
    held = rows if layout.uncompressed and not layout.window else room_for(rows)
    expected = held * layout.bytes_per_token(4) + exact * original * 4
    assert cache_bytes([layout], 4, length) == expected
    if length == 500:
        kept = room_for(100 - layout.window) * (layout.bytes_per_token(4) + 4 * G // layout.together)
        assert cache_bytes([layout], 4, length, kept=100) == kept + exact * original * 4
        assert ratio_at([layout])[1024] == cache_bytes([layout], 2, 1024) / (1024 * original * 2)


@pytest.mark.parametrize(
    ("name", "joint", "coded", "uncompressed", "together", "at_run_time"),
    [
        ("full", False, False, True, 1, False),
        ("plain", False, False, False, 1, True),
        ("keys alone", False, False, False, 1, False),
        ("shared", False, False, False, 4, True),
        ("coded", False, True, False, 4, True),
        ("one side coded", False, True, False, 1, False),
        ("beside", False, False, False, 1, True),
        ("both", True, False, False, 1, True),
        ("both shared and coded", True, True, False, 4, True),
        ("tied", True, False, False, 1, True),
        ("tied and full", True, False, True, 1, True),
    ],
)
def test_what_follows_from_it(name, joint, coded, uncompressed, together, at_run_time):
    layout = LAYOUTS[name]
    found = layout.joint, layout.coded, layout.uncompressed, layout.together, layout.at_run_time
    assert found == (joint, coded, uncompressed, together, at_run_time)
    assert replace(layout, window=6).at_run_time
    for side in SIDES:
        assert layout.side_of(side) in layout.of(side).sides
        assert layout.latents[layout.index(side)] is layout.of(side)
        assert layout.count(layout.of(side)) * layout.of(side).heads == G


def test_a_vector_as_it_is():
    assert key(D).verbatim
    assert not any(latent.verbatim for latent in (key(D - 1), key(2 * D, 2), both(2 * D), key(D, 1, Widths.of({8: D}))))


@layouts
def test_devices_share_the_heads(layout):
    for size in (1, 2, 4):
        if G // layout.together % size:
            with pytest.raises(EigenAttnError, match=f"4 KV heads, {layout.together} to a latent, cannot be split"):
                layout.split(size)
        else:
            part = layout.split(size)
            assert (part.kv_heads, part.latents, part.window) == (G // size, layout.latents, layout.window)
            assert size * part.bytes_per_token(2) == layout.bytes_per_token(2)
    with pytest.raises(EigenAttnError, match="cannot be split evenly over 3 devices"):
        layout.split(3)


def test_sides_in_no_latent_stay_as_they_are():
    full = Layout.full(G, D)
    assert full.holding([], 0) == full
    assert full.holding([value(8)], 6) == Layout(G, (key(D), value(8)), 6)
    assert full.holding([key(8, 2)], 0) == Layout(G, (key(8, 2), value(D)))
    assert full.holding([both(8)], 0) == Layout(G, (both(8),))
    assert full.holding([value(8), key(12)], 0) == full.holding([key(12), value(8)], 0)
    assert Layout.full(G, D, tied=True).holding([], 6).latents == (key(D),)


@pytest.mark.parametrize("share", ["1", "2", "1-2", "1kv", "2kv"])
def test_a_layer_has_that_of_its_bases(share):
    _, (attention, *_) = converted("llama")
    full = attention.layout
    assert full == Layout.full(2, HEAD_DIM)
    bases = some_bases(attention, share)
    attach(attention, bases, 6)
    assert attention.layout.latents == tuple(basis.latent for basis in bases)
    assert attention.layout.window == 6
    detach(attention)
    assert attention.layout == full
