"""ALiBi in half precision: what it adds to scores of far columns."""

import pytest
import torch
from tiny import random_basis, tiny

from eigenattn.compression.folding import compress_layer
from eigenattn.models.conversion import convert_attention, eigen_layers


@torch.no_grad()
@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("name", ["mpt", "bloom"])
def test_alibi_of_far_columns_keeps_its_digits_in_half_precision(name, window):
    """In bf16 biases of neighbouring columns would be the same, or a whole step apart."""
    ids = torch.arange(500)[None] * 7 % 90
    model = tiny(name).bfloat16()
    exact = model(ids, use_cache=False).logits[:, 8:250].float().log_softmax(-1)
    convert_attention(model)
    for attention in eigen_layers(model):
        basis = [random_basis(attention, attention.head_dim, True, 1, (side,)) for side in ("key", "value")]
        compress_layer(attention, tuple(basis) if window else (), window)
    found = model(ids, use_cache=False).logits[:, 8:250].float().log_softmax(-1)
    divergence = float((exact.exp() * (exact - found)).sum(-1).mean())
    assert divergence < 2e-3
