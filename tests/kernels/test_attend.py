import pytest
import torch

from eigenattn import EigenAttnError
from eigenattn.kernels import reference_attend, sdpa_attend


@pytest.mark.parametrize("sizes", [(16, 16), (16, 9), (5, 11)], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("lengths", [(1, 7), (7, 7), (3, 10), (5, 12)], ids=str)
@pytest.mark.parametrize("masked", ["none", "boolean", "additive", "by-head"])
def test_sdpa_equals_the_reference(sizes, heads, lengths, masked):
    (d, e), (h, g), (t, s) = sizes, heads, lengths
    torch.manual_seed(0)
    q, k, v = torch.randn(2, h, t, d), torch.randn(2, g, s, d), torch.randn(2, g, s, e)
    mask = {
        "none": None,
        "boolean": torch.rand(2, 1, t, s) > 0.3,
        "additive": torch.randn(2, 1, t, s),
        "by-head": torch.randn(2, h, t, s),
    }[masked]
    if masked == "boolean":
        mask[..., 0] = True
    expected, weights = reference_attend(q, k, v, mask=mask, scale=0.3)
    out, _ = sdpa_attend(q, k, v, mask=mask, scale=0.3)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, h, t))


def test_reference_against_a_loop():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 3, 4), torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 5)
    out, _ = reference_attend(q, k, v, mask=None, scale=0.5, softcap=2.0)
    for head in range(2):
        for m in range(3):
            scores = torch.stack([2 * torch.tanh(0.5 * q[0, head, m] @ k[0, 0, n] / 2) for n in range(m + 1)])
            expected = scores.softmax(0) @ v[0, 0, : m + 1]
            torch.testing.assert_close(out[0, head, m], expected)


def test_sdpa_refuses_soft_caps():
    x = torch.randn(1, 1, 2, 4)
    with pytest.raises(EigenAttnError, match="eager"):
        sdpa_attend(x, x, x, mask=None, scale=1.0, softcap=30.0)
