"""The exact window: its definition by loops, and what it does to caches."""

import pytest
import torch
from helpers import windows
from tiny import HEAD_DIM, compressed, tiny, tokens
from transformers import DynamicCache, StaticCache

from eigenattn import EigenAttnError
from eigenattn.cache.layers import LatentLayer
from eigenattn.kernels import blocks, chunked
from eigenattn.models.conversion import eigen_layers
from eigenattn.models.rotary import rotate

WINDOW, RANK_K, RANK_V = 5, 6, 4


def small(name="llama", window=WINDOW, **overrides):
    return compressed(name, window, sizes=(RANK_K, RANK_V), **overrides)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_against_the_definition(name):
    """One layer, one head and query at a time, from the words: what is near is exact, what is far is decoded."""
    model, length = small(name), 14
    attention = eigen_layers(model)[0]
    hidden = torch.randn(1, length, 64, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(length)[None]
    kwargs = {"position_ids": positions, "attention_mask": None}
    if attention.rotates:
        kwargs["position_embeddings"] = attention.angles(hidden, positions)
    out, _ = attention(hidden, **kwargs)

    q, k, v = attention.project(hidden)
    z_k, z_v = attention.encode(k, v)
    k_hat, v_hat = attention.decode(z_k, "key"), attention.decode(z_v, "value")
    if attention.rotates:
        q, k, k_hat = (rotate(x, *kwargs["position_embeddings"]) for x in (q, k, k_hat))
    rows = []
    for m in range(length):
        heads = []
        for h in range(4):
            g = h // attention.num_key_value_groups
            near = [m - n < WINDOW for n in range(m + 1)]
            keys = torch.stack([(k if near[n] else k_hat)[0, g, n] for n in range(m + 1)])
            values = torch.stack([(v if near[n] else v_hat)[0, g, n] for n in range(m + 1)])
            heads.append((keys @ q[0, h, m] * attention.scaling).softmax(0) @ values)
        rows.append(torch.cat(heads))
    torch.testing.assert_close(out[0], attention.output_projection(torch.stack(rows)), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "opt", "mpt", "mistral-sliding"])
def test_blocks_of_queries_change_nothing(name, monkeypatch):
    model, ids = small(name), tokens(2, 30)
    whole = model(ids).logits
    for module in (blocks, chunked):
        monkeypatch.setattr(module, "QUERY_BLOCK", 7)
    monkeypatch.setattr(chunked, "BAND", 3)
    torch.testing.assert_close(model(ids).logits, whole, rtol=0, atol=1e-4)
    cache = DynamicCache(config=model.config)
    pieces = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 11), (11, 12), (12, 30))]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-4)


@torch.no_grad()
def test_what_the_cache_holds():
    model, cache = small(), None
    cache = DynamicCache(config=model.config)
    model(tokens(2, 20), past_key_values=cache)
    for step in range(3):
        model(tokens(2, 1, seed=step), past_key_values=cache)
    for layer in cache.layers:
        assert isinstance(layer, LatentLayer)
        assert layer.keys.shape == (2, 2, 23 - WINDOW, RANK_K)
        assert layer.values.shape == (2, 2, 23 - WINDOW, RANK_V)
        # The current token can still be taken back without loss, so its neighbour at the far end stays too.
        assert layer.window_keys.shape == layer.window_values.shape == (2, 2, WINDOW + 1, HEAD_DIM)
        assert layer.window_keys.untyped_storage().nbytes() == layer.window_keys.numel() * 4
    assert cache.get_seq_length() == 23


@torch.no_grad()
def test_a_sliding_layer_forgets():
    model = small("mistral-sliding")
    cache = DynamicCache(config=model.config)
    model(tokens(1, 40), past_key_values=cache)
    layer = cache.layers[0]
    assert layer.keys.shape[-2] + WINDOW == 11
    assert cache.get_seq_length() == 40


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "opt", "mpt"])
def test_cropping_what_the_last_update_brought_is_exact(name):
    model, ids = small(name), tokens(1, 40)
    exact = model(ids).logits
    for kept in (1, 3, 8, 16, 17):
        cache = DynamicCache(config=model.config)
        model(ids[:, :20], past_key_values=cache)
        model(tokens(1, 18, seed=5), past_key_values=cache)
        cache.crop(kept - 18)
        cache.crop(-kept)  # what stays of the wrong continuation is taken back as well
        assert cache.get_seq_length() == 20
        again = model(ids[:, 20:], past_key_values=cache).logits
        torch.testing.assert_close(again, exact[:, 20:], rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "opt", "mpt"])
def test_cropping_further_falls_back_on_latents(name):
    """The window of the n-th token afterwards is one of n tokens, until it is full of new ones again."""
    ids, kept = tokens(1, 60), 30
    model = small(name, num_hidden_layers=1)  # what a second one held would have seen the whole window
    cache = DynamicCache(config=model.config)
    for token in ids.split(1, dim=1):
        model(token, past_key_values=cache)
    cache.crop(kept - 60)
    assert cache.get_seq_length() == kept
    found = model(ids[:, kept:], past_key_values=cache).logits
    whole = model(ids).logits[:, kept:]
    torch.testing.assert_close(found[:, WINDOW - 1 :], whole[:, WINDOW - 1 :], rtol=0, atol=1e-4)
    for n in range(1, WINDOW):
        expected = small(name, n, num_hidden_layers=1)(ids).logits[:, kept + n - 1]
        torch.testing.assert_close(found[:, n - 1], expected, rtol=0, atol=1e-4)
    assert (found - whole)[:, 0].abs().max() > 0.1  # latents are not the vectors they stand for


@windows
def test_static_caches_that_only_slide_are_refused(window):
    model = small("mistral-sliding", window)
    cache = StaticCache(config=model.config, max_cache_len=40)
    with pytest.raises(EigenAttnError, match="dynamic cache"):
        model(tokens(1, 8), past_key_values=cache)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # transformers still passes a flag that PyTorch retires
def test_other_attention_is_refused():
    model = small()
    model.set_attn_implementation("flex_attention")
    with pytest.raises(EigenAttnError, match="sdpa"):
        model(tokens(1, 8))


@torch.no_grad()
def test_a_cache_of_the_original_is_refused():
    original, model = tiny("llama"), small()
    cache = DynamicCache(config=model.config)
    original(tokens(1, 8), past_key_values=cache)
    with pytest.raises(EigenAttnError, match="another model"):
        model(tokens(1, 1), past_key_values=cache)


@torch.no_grad()
def test_what_slid_out_of_sight_cannot_be_brought_back():
    model = small("mistral-sliding")
    cache = DynamicCache(config=model.config)
    model(tokens(1, 10), past_key_values=cache)
    cache.crop(-2)
    model(tokens(1, 10), past_key_values=cache)
    with pytest.raises(EigenAttnError, match="out of this layer's sight"):
        cache.crop(-2)
