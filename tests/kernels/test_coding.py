"""What a prompt is read with on a CPU, codes, levels and rotations by the native library, against PyTorch's."""

import pytest
import torch

from eigenattn import kernels
from eigenattn.cache.codebook import Codebook
from eigenattn.cache.packing import Widths
from eigenattn.kernels.coding import Encoder, codes_of, codes_of_vectors, levels_of
from eigenattn.kernels.decoding import Rotary
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


@pytest.mark.parametrize("counts", [{8: 3, 6: 5, 5: 3, 4: 9, 2: 7}, {4: 8}, {3: 5, 2: 6, 1: 3}, {8: 1}], ids=str)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 13, 70])
@pytest.mark.parametrize(("shared", "sides"), [(1, 1), (3, 1), (2, 2)])
def test_codes_of_vectors(dtype, tokens, shared, sides):
    """Of whole numbers, with which arithmetic is exact in any order."""
    torch.manual_seed(0)
    widths, size = Widths.of({8: 3, 5: 9, 3: 7}, scaled=sides == 1), 10
    codebook = Codebook.of(torch.rand(G, widths.channels, 1) * torch.tensor([0.1, 0.4, 0, 1e-5]), widths)

    def whole(*shape):
        return torch.randint(-3, 4, shape).to(dtype)

    vectors = [whole(2, tokens + 2, G * shared, size).transpose(1, 2)[:, :, 1:-1] for _ in range(sides)]
    matrices = [whole(G, widths.channels, shared * size) for _ in range(sides)]
    means = [whole(G, 1, shared * size) for _ in range(sides)]
    encoders = [Encoder.of(matrix, mean) for matrix, mean in zip(matrices, [None, *means[1:]], strict=True)]
    means[0].zero_()
    joined = [x.float().unflatten(1, (G, shared)).transpose(2, 3).flatten(3) for x in vectors]
    z = sum((x - mean) @ matrix.float().mT for x, matrix, mean in zip(joined, matrices, means, strict=True))
    assert torch.equal(codes_of_vectors(vectors, encoders, codebook), codebook.encode(z))
    assert by_torch(codes_of_vectors, vectors, encoders, codebook) is None


@pytest.mark.parametrize("exact", [False, True])
def test_codes_of_vectors_by_matrices(exact):
    """In bf16 next to nothing has another code than in fp64, also if vectors are far from zero."""
    torch.manual_seed(0)
    widths = Widths.of({8: 20, 6: 20}, scaled=True)
    codebook = Codebook.of(torch.rand(G, widths.channels, 1) * torch.tensor([0, 1e-2, 0, 0]) + 1e-9, widths)
    mean = 100 * torch.randn(G, 1, 64).bfloat16().float()
    matrix = torch.randn(G, widths.channels, 64) / 8
    matrix = matrix.bfloat16() if exact else matrix
    x = (torch.randn(2, G, 100, 64) + mean).bfloat16()
    expected = codebook.encode(((x.double() - mean) @ matrix.double().mT).float())
    found = codes_of_vectors([x], [Encoder.of(matrix, mean)], codebook)
    assert (found != expected).float().mean() < 2e-3


@torch.no_grad()
@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "size", "width", "rows"),
    [(1, 9, 70, 64, 64, 1), (2, 3, 65, 20, 12, 2), (2, 3, 5, 16, 16, 1), (1, 2, 9, 80, 80, 1)],
)
def test_rotations(batch, heads, tokens, size, width, rows):
    torch.manual_seed(0)
    x = torch.randn(batch, tokens + 1, heads, size).transpose(1, 2)
    cos, sin = torch.randn(2, rows, tokens + 1, width)
    for given in ((x, cos, sin), (x[:, :, 1:].contiguous(), cos[:, 1:], sin[:, 1:])):
        torch.testing.assert_close(rotate(*given), by_torch(rotate, *given), rtol=0, atol=1e-5)
        rounded = [each.bfloat16() for each in given]
        assert torch.equal(rotate(*rounded), by_torch(rotate, *rounded))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotations_to_positions_in_a_row(dtype, interleaved):
    torch.manual_seed(0)
    rotary = Rotary(100.0 ** -(torch.arange(0, 12, 2) / 12), 1.3, interleaved)
    x = torch.randn(1, 70, 3, 20).to(dtype).transpose(1, 2)
    expected = rotary.rotate(x.float(), torch.arange(1000, 1070)).to(dtype)
    close = {"rtol": 1e-2 if dtype == torch.bfloat16 else 0, "atol": 1e-5}
    for found in (rotary.rotate_between(x, 1000, 1070), by_torch(rotary.rotate_between, x, 1000, 1070)):
        torch.testing.assert_close(found, expected, **close)
