import pytest
import torch
from eigenattn.kernels.pairs import attend_one_in_pairs, paired
from eigenattn.kernels.windowed import attend_one

from eigenattn.models.rotary import rotate, turns_of

B, H, G, D, FAR, NEAR, RANK = 2, 6, 2, 16, 11, 4, 5


@pytest.mark.parametrize("decoded", ["mean", "no-mean", "full-rank"])
@pytest.mark.parametrize("width", [D, 8], ids=["whole", "partial"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_pairs_equal_rotating_as_models_do(interleaved, width, decoded):
    torch.manual_seed(0)
    q, near_keys, near_values = torch.randn(B, H, 1, D), torch.randn(B, G, NEAR, D), torch.randn(B, G, NEAR, D)
    far_keys, far_values = torch.randn(B, G, FAR, D if decoded == "full-rank" else RANK), torch.randn(B, G, FAR, 7)
    decoder = None if decoded == "full-rank" else torch.randn(G, RANK, D)
    mean = torch.randn(G, 1, D) if decoded == "mean" else None
    positions = torch.arange(FAR + NEAR) + torch.tensor([[100], [3]])
    angles = positions[..., None] * torch.rand(width // 2)  # [B, columns, width / 2]
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    cos, sin = 1.3 * angles.cos(), 1.3 * angles.sin()
    seen = torch.rand(B, 1, 1, FAR + NEAR) > 0.3
    options = {"seen": seen, "scale": 0.4, "softcap": 2.0}

    keys = far_keys if decoder is None else far_keys @ decoder + (0 if mean is None else mean)
    turned = rotate(q, cos[:, -1:], sin[:, -1:], interleaved)
    expected = attend_one(
        turned,
        turned,
        rotate(keys, cos[:, :FAR], sin[:, :FAR], interleaved),
        far_values,
        rotate(near_keys, cos[:, FAR:], sin[:, FAR:], interleaved),
        near_values,
        far_offset=None,
        **options,
    )
    held = far_keys.clone(), near_keys.clone()
    turns = turns_of(cos, sin, interleaved)
    found = attend_one_in_pairs(
        q,
        far_keys,
        far_values,
        near_keys,
        near_values,
        decoder=paired(decoder, width, interleaved),
        mean=paired(mean, width, interleaved),
        turns=torch.cat([turns, turns[:, :, -1:].expand(-1, -1, H // G, -1)], dim=2),
        room=torch.full((B, G, FAR + NEAR + H // G, D), float("nan")),
        interleaved=interleaved,
        **options,
    )
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(far_keys, held[0]) and torch.equal(near_keys, held[1])  # they belong to the cache
