"""Plain quantised caches: every one that is offered reads."""

import pytest
import torch
from helpers import skip_without
from tiny import tiny, tokens

from eigenattn.evaluation.reading import uncached
from eigenattn.evaluation.rivals import RIVALS, Rival
from eigenattn.models.conversion import convert_attention, eigen_layers


@torch.no_grad()
@pytest.mark.parametrize("name", RIVALS)
def test_every_rival_reads(name):
    skip_without(name.split("-")[0])
    model, ids = tiny("opt"), tokens(1, 48)
    rival = Rival.of(name)
    rival.check(model.config, 8)
    exact = uncached(model, ids, 48)
    convert_attention(model)
    with rival.reading(eigen_layers(model), 8) as logits_of:
        found = logits_of(model, ids, 48)
    assert found.shape == exact.shape
    error = (found - exact)[:, 8:].square().mean() / exact.square().mean()
    assert 0 < error < 2.0**-rival.bits
    assert torch.allclose(found[:, :8], exact[:, :8], atol=1e-4)
