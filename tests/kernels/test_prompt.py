"""Attention of a prompt by products of matrices, against PyTorch's operations in fp64."""

import math

import pytest
import torch

from eigenattn import kernels
from eigenattn.cache.sight import Near
from eigenattn.kernels.chunked import CHUNK, Parts, Scoring, attend, attend_far, attend_near, reach_of
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


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("hidden", [None, (0, 0), (3, 130), (149, 40)])
@pytest.mark.parametrize(("sees", "window", "query_first"), [(None, 16, 0), (40, 16, 100), (10, 16, 0), (64, 0, 0)])
def test_reach(hidden, sees, window, query_first, dtype):
    """What rows hide in front and what slides out of sight, said by row and by distance, is what a mask says."""
    torch.manual_seed(0)
    t, d = 150 - query_first, 32
    q, k, v = (torch.randn(2, n, size, d).to(dtype) for n, size in ((4, t), (2, 150), (2, 150)))
    m, n = torch.arange(query_first, 150).unsqueeze(-1), torch.arange(150)
    shown = ((n <= m) & (n > m - (sees or 150)))[None, None]
    if hidden is not None:
        shown = shown & (n >= torch.tensor(hidden).view(-1, 1, 1, 1))
    reach = reach_of(shown, query_first, sees)
    assert reach is not None and reach.is_all == (not (hidden and any(hidden)) and sees is None)
    assert reach_of(shown ^ (n == 9), query_first, sees) is None

    def attended(q, k, v):
        near = Near(k[:, :, max(query_first - 20, 0) :], v[:, :, max(query_first - 20, 0) :], max(query_first - 20, 0))
        return attend(
            q,
            q,
            lambda low, high: (k[:, :, low:high], v[:, :, low:high]),
            near if window else None,
            Scoring(lambda *at: shown[..., at[0] : at[1], at[2] : at[3]], d**-0.5, None, reach),
            size=d,
            tokens=150,
            window=window,
            query_first=query_first,
        )

    found, expected = attended(q, k, v), by_torch(attended, q, k, v)
    sight = shown.any(-1, keepdim=True).expand(2, 4, -1, 1)
    close = {"rtol": 2e-6, "atol": 6e-5} if dtype == torch.float32 else {"rtol": 1e-5, "atol": 2e-2}
    torch.testing.assert_close(found.out.double()[sight[..., 0]], expected.out[sight[..., 0]], **close)
    torch.testing.assert_close(found.lse.double()[sight], expected.lse[sight], **close)
    assert not found.out[~sight[..., 0]].any()


def compare(attended, q, k, v, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found = attended(q, k, v)
    torch.set_num_threads(before)
    expected = by_torch(attended, q, k, v)
    close = {"rtol": 2e-6, "atol": 6e-5} if q.dtype == torch.float32 else {"rtol": 1e-5, "atol": 2e-2}
    torch.testing.assert_close(found.out.double(), expected.out, **close)
    torch.testing.assert_close(found.lse.double(), expected.lse, rtol=close["rtol"], atol=close["atol"] / 100 + 1e-5)


def by_torch(attended, *vectors):
    backend = kernels.use("torch")
    try:
        return attended(*(x.double() for x in vectors))
    finally:
        kernels.use(backend)
