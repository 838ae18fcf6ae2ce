"""Attention of a prompt by products of matrices, against PyTorch's operations in fp64."""

import math

import pytest
import torch

from eigenattn import kernels
from eigenattn.cache.sight import Near
from eigenattn.kernels.chunked import CHUNK, Parts, Scoring, attend_far, attend_near
from eigenattn.kernels.native_library import multiplies
from eigenattn.kernels.prompt import joins_natively

pytestmark = pytest.mark.skipif(not multiplies(), reason="this machine multiplies no matrices of bf16")


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "threads"), [(torch.bfloat16, 1), (torch.bfloat16, 3), (torch.float32, 3)], ids=str)
@pytest.mark.parametrize(
    ("heads", "queries", "keys", "sizes", "window", "columns"),
    [
        ((9, 3), 600, 600, (64, 64), 32, (0, 0)),
        ((4, 2), 70, 101, (24, 20), 32, (40, 9)),
        ((4, 1), 300, 340, (80, 96), 7, (100, 60)),
        ((2, 2), 33, 70, (64, 64), 32, (10, -27)),
        ((3, 3), 1, 32, (33, 1), 32, (90, 59)),
        ((6, 2), 520, 600, (128, 128), 100, (80, 0)),
    ],
)
def test_window_of_a_prompt(heads, queries, keys, sizes, window, columns, dtype, threads):
    """Keys that no query sees are NaN, and so are those in slots that are empty."""
    torch.manual_seed(0)
    (h, g), (size, size_out), (first_query, first_key) = heads, sizes, columns
    q = torch.randn(2, queries, h, size).transpose(1, 2).to(dtype)
    k, v = torch.randn(2, g, keys, size).to(dtype), torch.randn(2, g, keys, size_out).to(dtype)
    unseen = max(first_query - window + 1, 0) - first_key
    for x in (k, v):
        x[:, :, :unseen] = torch.nan
    assert joins_natively(q, k, v)
    scoring = Scoring(None, size**-0.5, None)

    def attended(q, k, v):
        return attend_near(q, Near(k, v, first_key), scoring, window, first_query)

    compare(attended, q, k, v, threads)


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "threads"), [(torch.bfloat16, 1), (torch.bfloat16, 3), (torch.float32, 3)], ids=str)
@pytest.mark.parametrize(
    ("heads", "queries", "keys", "sizes", "first", "by_all", "spread"),
    [
        ((9, 3), 300, 300, (64, 64), -32, 0, 1),
        ((4, 2), 70, 131, (24, 20), 60, 61, 30),
        ((4, 1), 33, 97, (80, 96), -5, 40, 1),
        ((2, 2), 50, CHUNK + 100, (40, 33), CHUNK + 20, CHUNK + 21, 5),
        ((3, 3), 1, 32, (33, 1), 31, 32, 1),
        ((6, 2), 520, 600, (128, 128), 80, 81, 20),
    ],
)
def test_far_keys_of_a_prompt(heads, queries, keys, sizes, first, by_all, spread, dtype, threads):
    """Joined to what the first of two passes found; scores of a wide spread, of which later ones are the higher."""
    torch.manual_seed(0)
    (h, g), (size, size_out) = heads, sizes
    q = torch.randn(2, queries, h, size).transpose(1, 2).to(dtype)
    k, v = torch.randn(2, g, keys, size).to(dtype), torch.randn(2, g, keys, size_out).to(dtype)
    k = (k + q.mean((1, 2)).view(2, 1, 1, size) * torch.linspace(0, 1, keys).unsqueeze(-1)).to(dtype)
    scoring = Scoring(None, spread * size**-0.5, None)

    def attended(q, k, v):
        parts = Parts(q, size_out)
        sees = {"keys": max(min(queries + first, keys), 0), "seen_by_all": by_all, "first": first}
        attend_far(parts, q, lambda low, high: (k[:, :, low:high], v[:, :, low:high]), scoring, **sees)
        once = parts.lse.clone()
        attend_far(parts, q, lambda low, high: (k[:, :, low:high], -v[:, :, low:high]), scoring, **sees)
        seen = once > float("-inf")
        torch.testing.assert_close(parts.lse[seen], once[seen] + math.log(2), rtol=1e-6, atol=1e-3)
        torch.testing.assert_close(parts.out, torch.zeros_like(parts.out), rtol=0, atol=1e-2)
        parts = Parts(q, size_out)
        attend_far(parts, q, lambda low, high: (k[:, :, low:high], v[:, :, low:high]), scoring, **sees)
        return parts

    compare(attended, q, k, v, threads)


def compare(attended, q, k, v, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found = attended(q, k, v)
    torch.set_num_threads(before)
    backend = kernels.use("torch")
    try:
        expected = attended(q.double(), k.double(), v.double())
    finally:
        kernels.use(backend)
    close = {"rtol": 2e-6, "atol": 6e-5} if q.dtype == torch.float32 else {"rtol": 1e-5, "atol": 2e-2}
    torch.testing.assert_close(found.out.double(), expected.out, **close)
    torch.testing.assert_close(found.lse.double(), expected.lse, rtol=close["rtol"], atol=close["atol"] / 100 + 1e-5)
