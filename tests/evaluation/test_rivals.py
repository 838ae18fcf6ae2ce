"""Plain quantised caches: every one that is offered reads."""

import pytest
import torch
from tiny import tiny, tokens

from eigenattn.errors import EigenAttnError
from eigenattn.evaluation.reading import uncached
from eigenattn.evaluation.rivals import NAMES, Rival
from eigenattn.models.conversion import convert_attention, eigen_layers


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES.split(", "))
def test_every_rival_reads(name):
    """Skipped where its package is absent, or this transformers has no such cache."""
    model, ids = tiny("opt"), tokens(1, 48)
    try:
        rival = Rival.of(name)
        rival.check(model.config, 8)
    except EigenAttnError as error:
        pytest.skip(str(error))
    exact = uncached(model, ids, 48)
    convert_attention(model)
    with rival.reading(eigen_layers(model), 8) as logits_of:
        found = logits_of(model, ids, 48)
    assert found.shape == exact.shape
    error = (found - exact)[:, 8:].square().mean() / exact.square().mean()
    assert 0 < error < 2.0**-rival.bits
    assert torch.allclose(found[:, :8], exact[:, :8], atol=1e-4)
