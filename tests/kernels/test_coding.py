"""What a prompt is read with on a CPU, codes, levels and rotations by the native library, against PyTorch's."""

import pytest
import torch

from eigenattn import kernels
from eigenattn.cache.codebook import Codebook
from eigenattn.cache.packing import Widths
from eigenattn.kernels.coding import codes_of, levels_of
from eigenattn.kernels.native_library import unavailable
from eigenattn.models.rotary import rotate

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no native kernels: {unavailable()}")
G = 3


def by_torch(function, *arguments):
    before = kernels.use("torch")
    try:
        return function(*arguments)
    finally:
        kernels.use(before)


@pytest.mark.parametrize("counts", [{8: 3, 6: 5, 4: 9, 2: 7}, {4: 8}, {3: 5, 2: 6, 1: 3}, {8: 1}], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 64, 200])
@pytest.mark.parametrize("scaled", [False, True])
def test_codes_and_levels(counts, tokens, scaled):
    torch.manual_seed(0)
    widths = Widths.of(counts, scaled)
    codebook = Codebook.of(torch.rand(G, widths.channels, 1) * torch.tensor([0.1, 1, 0, 1e-5]), widths)
    z = 5 * torch.randn(2, G, tokens, widths.channels)
    if not scaled:
        z[0, 0, 0, 0] = float("nan")
    codes = codes_of(z, codebook)
    assert torch.equal(codes, codebook.encode(z))
    assert torch.equal(codes, by_torch(codes_of, z, codebook))
    room = torch.full((2, G, tokens + 9, widths.bytes), 255, dtype=torch.uint8)  # as a cache holds them
    room[:, :, 4 : 4 + tokens] = codes
    rows = room[:, :, 4 : 4 + tokens]
    expected = by_torch(levels_of, rows, codebook)
    torch.testing.assert_close(levels_of(rows, codebook), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "size", "width", "rows"),
    [(1, 9, 70, 64, 64, 1), (2, 3, 65, 20, 12, 2), (2, 3, 5, 16, 16, 1)],
)
def test_rotations(batch, heads, tokens, size, width, rows):
    torch.manual_seed(0)
    x = torch.randn(batch, tokens + 1, heads, size).transpose(1, 2)
    cos, sin = torch.randn(2, rows, tokens + 1, width)
    for given in ((x, cos, sin), (x[:, :, 1:].contiguous(), cos[:, 1:], sin[:, 1:])):
        torch.testing.assert_close(rotate(*given), by_torch(rotate, *given), rtol=0, atol=1e-5)
