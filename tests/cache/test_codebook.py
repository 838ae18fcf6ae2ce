"""Quantising against a search over all levels of each channel."""

import pytest
import torch
from tiny import levels_between

from eigenattn.cache.codebook import OCTAVE, Codebook, level_table, scales
from eigenattn.cache.packing import Widths

COUNTS = {8: 3, 6: 2, 4: 5, 2: 7}, {2: 1}, {8: 4, 2: 2}, {8: 1, 3: 4, 2: 1, 1: 3}, {1: 2}
every = pytest.mark.parametrize("widths", [Widths.of(x) for x in COUNTS], ids=str)


def some(widths, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    low, width = (
        torch.randn(2, widths.channels, generator=generator),
        torch.rand(2, widths.channels, generator=generator),
    )
    return Codebook.of(levels_between(low, low + 0.1 + width, widths).to(dtype), widths)


def all_levels(codebook):
    """Of each channel [2, levels], written out."""
    for channel, bits in enumerate(codebook.widths.each()):
        a, b, c, d = codebook.levels[:, channel].float().unbind(-1)
        codes = range(2**bits)
        yield torch.stack([a + b * u + c * u**2 + d * u**3 for u in (code - 2 ** (bits - 1) for code in codes)], dim=-1)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_the_nearest_levels(widths, dtype):
    codebook = some(widths, dtype)
    z = 3 * torch.randn(4, 2, 9, widths.channels, generator=torch.Generator().manual_seed(2))
    restored = codebook.dequantise(codebook.quantise(z))
    assert restored.dtype == torch.float32
    for channel, levels in enumerate(all_levels(codebook)):
        distances = (z[..., channel].unsqueeze(-1) - levels[:, None]).abs()  # [4, 2, 9, levels]
        found = (z[..., channel] - restored[..., channel]).abs()
        torch.testing.assert_close(found, distances.amin(-1))


@every
def test_levels_come_back_as_their_codes(widths):
    codebook = some(widths)
    for channel, (bits, levels) in enumerate(zip(widths.each(), all_levels(codebook), strict=True)):
        z = torch.zeros(1, 2, 2**bits, widths.channels)
        z[0, :, :, channel] = levels
        codes = codebook.quantise(z)[0, :, :, channel]
        assert torch.equal(codes, torch.arange(2**bits, dtype=torch.uint8).expand(2, -1))
        torch.testing.assert_close(level_table(codebook.levels[:, channel], bits), levels)


def test_half_precision_latents_are_quantised_in_fp32():
    """From -1 up in steps of 1/128, and about 100, where bf16 has steps of 1/2."""
    levels = torch.tensor([[[0.0, 1 / 128, 0, 0], [101.0, 1 / 128, 0, 0]]])
    codebook = Codebook.of(levels, Widths.of({8: 2}))
    z = torch.tensor([0.5625, 100 + 3 / 128]).bfloat16()
    assert codebook.quantise(z.view(1, 1, 1, 2)).flatten().tolist() == [200, 0]


def test_levels_that_rounding_put_out_of_order_are_in_no_way():
    codebook = Codebook.of(torch.tensor([[[0.0, 0.2, 0.0, -0.04]]]), Widths.of({2: 1}))
    found = level_table(codebook.levels[0, 0], 2)
    assert (found.diff() < 0).any()
    z = torch.linspace(-1, 1, 21).view(1, 1, -1, 1)
    assert (codebook.quantise(z).diff(dim=2).int() >= 0).all()


@every
def test_a_scaled_latent_is_as_good_at_any_size(widths):
    codebook = some(Widths(widths.counts, scaled=True))
    z = torch.randn(3, 2, 50, widths.channels, generator=torch.Generator().manual_seed(3))
    rows = codebook.encode(z)
    assert rows.shape == (3, 2, 50, widths.bytes + 1) and rows.dtype == torch.uint8
    for octaves in (-20, 0, 7):
        torch.testing.assert_close(
            codebook.decode(codebook.encode(z * 2.0**octaves)), codebook.decode(rows) * 2.0**octaves
        )
    # The unscaled codebook takes latents over their scales, which lie within an eighth of an octave of their norms.
    scale = scales(rows[..., -1:])
    assert ((z.norm(dim=-1, keepdim=True) / scale).log2().abs() <= 1 / (2 * OCTAVE) + 1e-4).all()
    torch.testing.assert_close(codebook.decode(rows), some(widths).decode(some(widths).encode(z / scale)) * scale)
    assert torch.equal(codebook.encode(torch.zeros(1, 2, 1, widths.channels))[..., -1], torch.zeros(1, 2, 1).byte())
