"""Packing against the same thing done by loops, one channel at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eigenattn.cache.packing import PARTS, Widths, pack, unpack

# What codes of a width are stored as, from the layout that the format documents.
PLANES = {8: [8], 6: [4, 2], 5: [4, 1], 4: [4], 3: [2, 1], 2: [2], 1: [1]}
WIDTHS = [
    {8: 3, 4: 5, 2: 7},
    {8: 8, 4: 8, 2: 8},
    {2: 1},
    {4: 1},
    {8: 1},
    {4: 2, 2: 6},
    {8: 2, 2: 3},
    {8: 1, 4: 3},
    {8: 64},
    {6: 1},
    {8: 1, 6: 5, 4: 2, 2: 1},
    {6: 8, 4: 4, 2: 4},
    {3: 1},
    {1: 1},
    {1: 9},
    {3: 9, 1: 7},
    {8: 2, 6: 3, 4: 1, 3: 5, 2: 2, 1: 11},
]
every = pytest.mark.parametrize("widths", [Widths.of(counts) for counts in WIDTHS], ids=str)


def some_codes(widths, *lead):
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randint(0, 2**bits, lead, generator=generator) for bits in widths.each()], dim=-1).to(
        torch.uint8
    )


@every
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_unpacking_gives_back_what_was_packed(widths, tokens):
    codes = some_codes(widths, 2, 3, tokens)
    packed = pack(codes, widths)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 3, tokens, widths.bytes)
    assert torch.equal(unpack(packed, widths), codes)


@every
def test_bytes_hold_what_the_layout_says(widths):
    codes = some_codes(widths)
    expected, first = [], 0
    for bits, count in widths.counts:
        plane, below = codes[first : first + count].tolist(), bits
        for part in PLANES[bits]:
            below -= part
            size = -(-count * part // 8)
            for j in range(size):
                held = [plane[c] >> below & 2**part - 1 for c in range(j, count, size)]
                expected.append(sum(code << part * i for i, code in enumerate(held)))
        first += count
    assert pack(codes, widths).tolist() == expected


def test_padding_is_counted():
    assert Widths.of({8: 3, 4: 5, 2: 7}).bytes == 3 + 3 + 2
    assert Widths.of({8: 3, 6: 5, 4: 5, 2: 7}).bytes == 3 + (3 + 2) + 3 + 2
    assert Widths.of({6: 8}).bytes == 6
    assert Widths.of({8: 3, 4: 5, 2: 7}).channels == 15
    assert Widths.of({2: 1}).bytes == Widths.of({1: 8}).bytes == 1
    assert Widths.of({3: 8}).bytes == 3
    assert Widths.of({3: 1}).bytes == Widths.of({1: 9}).bytes == 2


def test_a_scale_takes_a_byte():
    counts = {8: 3, 4: 5}
    assert Widths.of(counts, scaled=True).bytes == Widths.of(counts).bytes + 1 == Widths.of(counts).of_codes + 1
    assert Widths.of(counts, scaled=True) != Widths.of(counts)


def test_the_table_of_planes_is_complete():
    assert {bits: list(parts) for bits, parts in PARTS.items()} == PLANES
    assert list(PARTS) == sorted(PARTS, reverse=True)


counts = st.dictionaries(st.sampled_from(sorted(PARTS)), st.integers(0, 40), min_size=1)


@given(counts, st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_any_mapping_of_bits_to_channels(counts, seed):
    widths = Widths.of(counts)
    assert widths == Widths.of(dict(reversed(counts.items())))
    assert widths.channels == sum(counts.values()) == len(widths.each())
    assert widths.each() == sorted(widths.each(), reverse=True)
    assert widths.to_dict() == {str(bits): n for bits, n in sorted(counts.items(), reverse=True) if n}
    if not widths.channels:
        return
    drawn = torch.rand(2, 1, 3, widths.channels, generator=torch.Generator().manual_seed(seed))
    codes = (drawn * 2 ** torch.tensor(widths.each())).to(torch.uint8)
    packed = pack(codes, widths)
    assert packed.shape[-1] == widths.bytes <= sum(2 + bits * n // 8 for bits, n in counts.items())
    assert torch.equal(unpack(packed, widths), codes)
    parts = list(widths.split(codes))
    assert [(bits, part.shape[-1]) for bits, part in parts] == list(widths.counts)
    assert torch.equal(torch.cat([part for _, part in parts], dim=-1), codes)


@pytest.mark.parametrize("counts", [{7: 1}, {16: 1}, {0: 1}, {8: -1}, {"8": 1}])
def test_what_is_no_width_is_refused(counts):
    with pytest.raises(ValueError, match="no widths"):
        Widths.of(counts)
