"""Quantised caches: every one that is offered reads, and keeps and counts what it says."""

import pytest
import torch
from helpers import close, skip_without
from tiny import converted, tiny, tokens

from eigenattn.errors import EigenAttnError
from eigenattn.evaluation.reading import uncached
from eigenattn.evaluation.rivals import RIVALS, SINKS, Rival
from eigenattn.evaluation.sweep import rival_sizes
from eigenattn.models.conversion import convert_attention, eigen_layers
from eigenattn.models.rotary import rotate


@torch.no_grad()
@pytest.mark.parametrize("name", RIVALS)
def test_every_rival_reads(name):
    skip_without(name.split("-")[0])
    rival = Rival.of(name)
    model, ids = tiny("gpt_neox" if getattr(rival, "after_rotary", False) else "opt"), tokens(1, 48)
    rival.check(model.config, 8)
    exact = uncached(model, ids, 48)
    convert_attention(model)
    with rival.reading(eigen_layers(model), 8) as logits_of:
        found = logits_of(model, ids, 48)
    assert found.shape == exact.shape
    error = (found - exact)[:, 8:].square().mean() / exact.square().mean()
    assert 0 < error < 2.0**-rival.bits
    assert torch.allclose(found[:, :8], exact[:, :8], atol=1e-4)
    close(uncached(model, ids, 48), exact)  # it leaves nothing behind


def test_sinks_are_exact_and_means_are_taken_out():
    keys, values = torch.randn(2, 3, 20, 16), torch.randn(2, 3, 20, 16)
    bias = 50 * torch.randn(3, 1, 16)
    plain, centred, sinks, both = (
        Rival.of(name) for name in ("turboquant-3", "turboquant-3-centred", "turboquant-3-sinks", "e8-3-centred-sinks")
    )
    for rival in (sinks, both):
        for found, exact in zip(rival.round(keys + bias, values), (keys + bias, values), strict=True):
            assert torch.equal(found[:, :, :SINKS], exact[:, :, :SINKS])
            assert not torch.isclose(found[:, :, SINKS:], exact[:, :, SINKS:]).all(-1).any()
        few = rival.round(keys[:, :, :3], values[:, :, :3])
        assert torch.equal(few[0], keys[:, :, :3]) and torch.equal(few[1], values[:, :, :3])

    def error(rival):
        return (rival.round(keys + bias, values)[0] - keys - bias).square().mean()

    assert error(centred) < 0.1 < 10 < error(plain)
    assert torch.equal(centred.round(keys, values)[1], plain.round(keys, values)[1])  # of keys alone
    # What is coded is what is left of the mean, in 16 bits.
    mean = (keys + bias).mean(2, keepdim=True).half().float()
    close(centred.round(keys + bias, values)[0], plain.code.rounded(keys + bias - mean) + mean)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "llama-yarn", "cohere", "mpt"])
def test_keys_are_coded_where_they_are_said_to_be(name):
    """Behind rotary positions and before: of all layers the first one sees the same either way."""
    model, layers = converted(name)
    ids, window, seen = tokens(1, 30), 6, []

    class Looking:
        def __init__(self, attention):
            self.attention, self.rounded = attention, attention.rounded

        def __call__(self, keys, values):
            seen.append((keys, self.rounded(keys, values)[0]))
            return seen[-1][1], values

    def look(rival):
        seen.clear()
        with rival.reading(layers, window) as logits_of:
            layers[0].rounded = Looking(layers[0])
            logits_of(model, ids, 30)
        return seen[0]

    keys, found = look(Rival.of("kivi-2" if layers[0].rotates else "plain-2"))
    if not layers[0].rotates:
        for rotated in ("kivi-2", "turboquant-4-rotated"):
            with pytest.raises(EigenAttnError, match="this model has none to rotate by"):
                Rival.of(rotated).check(model.config, window)
        close(found, RIVALS["plain-2"].round(keys, keys)[0])
        return
    cos, sin = (x[:, :24] for x in layers[0].angles(keys, torch.arange(30)[None]))
    turn = layers[0].family.interleaved
    close(rotate(found, cos, sin, turn), RIVALS["kivi-2"].round(rotate(keys, cos, sin, turn), keys)[0])
    assert look(Rival.of("plain-2"))[1].equal(RIVALS["plain-2"].round(keys, keys)[0])
    assert not torch.allclose(found, look(Rival.of("plain-2"))[1], atol=1e-2)


def test_what_is_stored_once_a_sequence_is_counted():
    """3 layers of 2 heads of 16, keys and values: 384 bytes a token in 16 bits."""
    layouts = [attention.layout for attention in converted("llama")[1]]
    window, length = 8, 108
    plain, beside = (
        rival_sizes(layouts, Rival.of(name), window, length) for name in ("turboquant-4", "turboquant-4-centred-sinks")
    )
    token = 384 * (4 + 16 / 16) / 16
    assert plain["bytes_per_token"] == token
    assert plain["cache_bytes"] == 100 * token + 8 * 384
    assert beside["cache_bytes"] == pytest.approx(96 * token + (4 + 8) * 384 + 192)  # the means are half a token
    assert beside["kv_ratio"] == pytest.approx((96 * token + 4 * 384 + 192) / (100 * 384))


def test_vectors_that_have_no_eights_are_refused():
    model = tiny("llama", head_dim=12)
    with pytest.raises(EigenAttnError, match="12 elements cannot be cut"):
        Rival.of("e8-4").check(model.config, 8)
    Rival.of("turboquant-4").check(model.config, 8)
