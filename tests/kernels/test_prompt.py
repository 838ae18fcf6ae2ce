"""The exact window of a prompt by products of matrices, against PyTorch's operations in fp32."""

import pytest
import torch

from eigenattn import kernels
from eigenattn.cache.sight import Near
from eigenattn.kernels.prompt import joins_natively
from eigenattn.kernels.chunked import Scoring, attend_near
from eigenattn.kernels.native_library import multiplies

pytestmark = pytest.mark.skipif(not multiplies(), reason="this machine multiplies no matrices of bf16")


@torch.inference_mode()
@pytest.mark.parametrize("threads", [1, 3])
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
def test_window_of_a_prompt(heads, queries, keys, sizes, window, columns, threads):
    """Keys that no query sees are NaN, and so are those in slots that are empty."""
    torch.manual_seed(0)
    (h, g), (size, size_out), (first_query, first_key) = heads, sizes, columns
    q = torch.randn(2, queries, h, size, dtype=torch.bfloat16).transpose(1, 2)
    k, v = torch.randn(2, g, keys, size, dtype=torch.bfloat16), torch.randn(2, g, keys, size_out, dtype=torch.bfloat16)
    unseen = max(first_query - window + 1, 0) - first_key
    for x in (k, v):
        x[:, :, :unseen] = torch.nan
    assert joins_natively(q, k, v)
    scoring = Scoring(None, size**-0.5, None)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found = attend_near(q, Near(k, v, first_key), scoring, window, first_query)
    torch.set_num_threads(before)
    backend = kernels.use("torch")
    try:
        expected = attend_near(q.float(), Near(k.float(), v.float(), first_key), scoring, window, first_query)
    finally:
        kernels.use(backend)
    torch.testing.assert_close(found.out, expected.out, rtol=0, atol=2e-2)
    torch.testing.assert_close(found.lse, expected.lse, rtol=0, atol=1e-4)
