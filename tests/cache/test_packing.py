"""Packing against the same thing done by loops, one channel at a time."""

import pytest
import torch

from eigenattn.cache.packing import BITS, Widths, pack, unpack

WIDTHS = [
    Widths(3, 0, 5, 7),
    Widths(8, 0, 8, 8),
    Widths(0, 0, 0, 1),
    Widths(0, 0, 1, 0),
    Widths(1, 0, 0, 0),
    Widths(0, 0, 2, 6),
    Widths(2, 0, 0, 3),
    Widths(1, 0, 3, 0),
    Widths(64, 0, 0, 0),
    Widths(0, 1, 0, 0),
    Widths(1, 5, 2, 1),
    Widths(0, 8, 4, 4),
]
every = pytest.mark.parametrize("widths", WIDTHS, ids=str)


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
    for bits, count in zip(BITS, widths, strict=True):
        plane = codes[first : first + count].tolist()
        for part, below in [(4, 2), (2, 0)] if bits == 6 else [(bits, 0)]:
            size = -(-count * part // 8)
            for j in range(size):
                held = [plane[c] >> below & 2**part - 1 for c in range(j, count, size)]
                expected.append(sum(code << part * i for i, code in enumerate(held)))
        first += count
    assert pack(codes, widths).tolist() == expected


def test_padding_is_counted():
    assert Widths(3, 0, 5, 7).bytes == 3 + 3 + 2
    assert Widths(3, 5, 5, 7).bytes == 3 + (3 + 2) + 3 + 2
    assert Widths(0, 8, 0, 0).bytes == 6
    assert Widths(3, 0, 5, 7).channels == 15
    assert Widths(0, 0, 0, 1).bytes == 1
