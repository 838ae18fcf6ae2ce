"""Packing and quantising against the same thing done by loops, one channel at a time."""

import pytest
import torch

from eigenattn.cache.packing import BITS, Widths, dequantise, pack, quantise, unpack

WIDTHS = [
    Widths(3, 5, 7),
    Widths(8, 8, 8),
    Widths(0, 0, 1),
    Widths(0, 1, 0),
    Widths(1, 0, 0),
    Widths(0, 2, 6),
    Widths(2, 0, 3),
    Widths(1, 3, 0),
    Widths(64, 0, 0),
]
every = pytest.mark.parametrize("widths", WIDTHS, ids=str)


def bits_of(widths):
    return [bits for bits, count in zip(BITS, widths, strict=True) for _ in range(count)]


def some_codes(widths, *lead):
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randint(0, 2**bits, lead, generator=generator) for bits in bits_of(widths)], dim=-1).to(
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
        size = -(-count * bits // 8)
        for j in range(size):
            channels = range(j, count, size)
            expected.append(sum(int(codes[first + c]) << bits * i for i, c in enumerate(channels)))
        first += count
    assert pack(codes, widths).tolist() == expected


def test_padding_is_counted():
    assert Widths(3, 5, 7).bytes == 3 + 3 + 2
    assert Widths(3, 5, 7).channels == 15
    assert Widths(0, 0, 1).bytes == 1


@every
def test_codes_are_the_nearest_levels(widths):
    generator = torch.Generator().manual_seed(1)
    rank = widths.channels
    offset, step = torch.randn(2, 1, rank, generator=generator), 0.1 + torch.rand(2, 1, rank, generator=generator)
    z = 30 * torch.randn(4, 2, 9, rank, generator=generator)
    codes = quantise(z, offset, step, widths)
    restored = dequantise(codes, offset, step)
    for channel, bits in enumerate(bits_of(widths)):
        levels = offset[..., channel] + step[..., channel] * torch.arange(2**bits)  # [2, levels]
        distances = (z[..., channel].unsqueeze(-1) - levels[:, None]).abs()  # [4, 2, 9, levels]
        found = (z[..., channel] - restored[..., channel]).abs()
        torch.testing.assert_close(found, distances.amin(-1))


def test_half_precision_latents_are_quantised_in_fp32():
    widths = Widths(2, 0, 0)
    offset, step = torch.tensor([-1.0, 100.0]), torch.tensor([1 / 128, 1 / 128])
    z = (offset + step * torch.tensor([200, 3])).bfloat16()
    # 200 steps of 1/128 above -1 is 0.5625, and 100 + 3/128 rounds to 100 in bf16.
    assert quantise(z, offset, step, widths).tolist() == [200, 0]
