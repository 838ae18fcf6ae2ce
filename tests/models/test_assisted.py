"""Drafts that are taken back, mixed precision, and gradients through a cached prefix."""

import pytest
import torch
from helpers import close, in_pieces
from tiny import compressed, tokens
from transformers import DynamicCache

from eigenattn.cache.layers import LatentLayer


def generate(model, ids, **options):
    """Greedy tokens after a prompt."""
    settings = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings, **options)


@torch.no_grad()
@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("drafts", [3, 50])
@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gemma3", "opt"])
def test_assisted_decoding_gives_greedy_tokens(name, drafts, window, coded):
    model = compressed(name, window, coded).double()
    for ids in (tokens(1, 9).repeat(1, 5), tokens(1, 30)):
        greedy = generate(model, ids)
        assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=drafts), greedy)


@torch.no_grad()
@pytest.mark.parametrize("window", [0, 6])
def test_what_slid_stays_while_the_past_is_recorded(window):
    model, ids = compressed("mistral-sliding", window), tokens(1, 60)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    exact = model(ids, use_cache=False).logits
    model(ids[:, :30], past_key_values=cache)
    cache.crop(0)
    assert all(isinstance(layer, LatentLayer) for layer in cache.layers)
    held = cache.layers[0].stores[0].rows.shape[-2] + window
    assert held == 11  # what a sliding window of 12 still sees
    model(tokens(1, 20, seed=5), past_key_values=cache)
    cache.crop(-20)
    assert cache.get_seq_length() == 30
    close(in_pieces(model, ids[:, 30:], cache, [10, 1, 19]), exact[:, 30:])


@torch.no_grad()
@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("name", ["llama", "qwen3", "opt", "mpt"])
def test_mixed_precision(name, window, coded):
    """Under autocast norms give another dtype than projections."""
    model, ids = compressed(name, window, coded), tokens(2, 30)
    exact = model(ids, use_cache=False).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = in_pieces(model, ids, DynamicCache(config=model.config), [13, *[1] * 17])
        uncached = model(ids, use_cache=False).logits
    error = (uncached.float() - exact).norm() / exact.norm()
    assert error < 0.2
    assert (found.float() - exact).norm() / exact.norm() < 2 * error + 0.02


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_gradients_through_a_cached_prefix(name, window):
    model, ids = compressed(name, window), tokens(1, 16)
    embed = model.get_input_embeddings()

    def gradient(pieces):
        model.zero_grad()
        cache, start, loss = DynamicCache(config=model.config), 0, 0.0
        for size in pieces:
            out = model(ids[:, start : start + size], past_key_values=cache, use_cache=True).logits
            loss, start = loss + out.float().log_softmax(-1)[..., 5].sum(), start + size
        loss.backward()
        return embed.weight.grad.clone()

    whole = gradient([16])
    torch.testing.assert_close(gradient([6] + [1] * 10), whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is embed.weight)  # as an adapter on something before the maps
    torch.testing.assert_close(gradient([6] + [1] * 10), whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))
