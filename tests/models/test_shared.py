"""KV heads that share a latent: like latents of single heads, and the same with a cache, in batches, in files."""

import copy

import pytest
import torch
from test_families import close, generate, has_static, in_pieces, padded
from tiny import HEAD_DIM, quantised_basis, random_basis, tiny, tokens
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from eigenattn import EigenAttentionConfig, EigenAttnError, compress
from eigenattn.cache.packing import Widths
from eigenattn.cache.size import allocated_bytes, cache_bytes, kv_ratio
from eigenattn.compression.bases import Basis
from eigenattn.compression.folding import attach, compress_layer
from eigenattn.models.conversion import convert_attention, eigen_layers

# Grouped queries, rotary in part and scaled, norms, learned positions, ALiBi, fused projections, sliding windows.
NAMES = ["llama", "phi3-partial", "qwen3", "opt", "mpt", "bloom", "gpt_neox", "gemma3", "mistral-sliding"]
LENGTH, WINDOW = 30, 6
names = pytest.mark.parametrize("name", NAMES)
windows = pytest.mark.parametrize("window", [0, WINDOW])


def small(name, window, rank_k=14, rank_v=20, shared=2):
    model = tiny(name)
    convert_attention(model)
    for index, attention in enumerate(eigen_layers(model)):
        keys = random_basis(attention, rank_k, True, index, shared)
        compress_layer(attention, keys, random_basis(attention, rank_v, True, 100 + index, shared), window, shared)
    return model


def side_by_side(basis):
    """The bases of two neighbouring heads as one of both."""

    def blocks(x):
        return torch.stack([torch.block_diag(*pair) for pair in x.unflatten(0, (-1, 2))])

    return Basis(
        blocks(basis.encoder), blocks(basis.decoder), basis.spectrum, basis.mean.unflatten(0, (-1, 2)).flatten(1)
    )


@torch.no_grad()
@windows
@names
def test_latents_side_by_side_are_those_of_single_heads(name, window):
    single = tiny(name)
    convert_attention(single)
    shared = copy.deepcopy(single)
    for index, (one, two) in enumerate(zip(eigen_layers(single), eigen_layers(shared), strict=True)):
        pair = random_basis(one, 6, True, index), random_basis(one, 9, True, 100 + index)
        attach(one, *pair, window)
        attach(two, *map(side_by_side, pair), window, 2)
    ids = tokens(2, LENGTH)
    exact = single(ids).logits
    close(shared(ids).logits, exact)
    close(in_pieces(shared, ids, DynamicCache(config=single.config), [13] + [1] * 17), exact)
    assert kv_ratio(eigen_layers(shared)) == kv_ratio(eigen_layers(single)) == 15 / 32


@torch.no_grad()
@windows
@names
def test_full_rank_changes_nothing(name, window):
    model, ids = tiny(name), tokens(2, LENGTH)
    full = small(name, window, 2 * HEAD_DIM, 2 * HEAD_DIM)
    close(full(ids).logits, model(ids).logits)
    close(in_pieces(full, ids, DynamicCache(config=model.config), [13, 1, 16]), model(ids).logits)


@torch.no_grad()
def check_caches(model, name, window):
    """Through every kind of cache a model gives what it gives without one, and a cache takes the bytes planned."""
    ids = tokens(2, LENGTH)
    exact = model(ids, use_cache=False).logits
    assert (exact - tiny(name)(ids).logits).abs().max() > 1e-2
    close(in_pieces(model, ids, DynamicCache(config=model.config), [1] * LENGTH), exact)
    close(in_pieces(model, ids, DynamicCache(config=model.config), [13, 1, 16]), exact)
    if has_static(name, window):
        close(in_pieces(model, ids, StaticCache(config=model.config, max_cache_len=48), [20] + [1] * 10), exact)
    if name != "mistral-sliding":
        cache = DynamicCache(config=model.config)
        model(ids[:, :-1], past_key_values=cache, use_cache=True)
        model(ids[:, -1:], past_key_values=cache, use_cache=True)
        if name != "gemma3":  # whose sliding layers hold less
            assert allocated_bytes(cache) == 2 * cache_bytes(eigen_layers(model), 4, LENGTH, window)


@windows
@names
def test_cached_equals_uncached(name, window):
    check_caches(small(name, window), name, window)


@torch.no_grad()
def check_generation(model):
    """Greedy decoding and beams give the same with a cache and without one, and in padded batches."""
    short = tokens(1, 9)
    ids, mask = padded(short, 6)
    greedy = generate(model, short)
    assert torch.equal(generate(model, short, use_cache=False), greedy)
    assert torch.equal(generate(model, ids, mask)[:, 6:], greedy)
    assert torch.equal(generate(model, short, num_beams=3), generate(model, short, num_beams=3, use_cache=False))


@windows
@pytest.mark.parametrize("name", ["llama", "mpt"])
def test_left_padding_and_generation(name, window):
    check_generation(small(name, window))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_quantised(name):
    model, ids, widths = tiny(name), tokens(2, LENGTH), Widths(5, 9, 6)
    convert_attention(model)
    for index, attention in enumerate(eigen_layers(model)):
        pair = (quantised_basis(attention, widths, True, seed, 2) for seed in (index, 100 + index))
        compress_layer(attention, *pair, WINDOW, 2)
    model = model.double()
    exact = model(ids, use_cache=False).logits
    close(in_pieces(model, ids, DynamicCache(config=model.config), [13] + [1] * 17), exact)
    # What the bases were made for: codes of single heads would have twice as many channels.
    assert kv_ratio(eigen_layers(model)) == (5 + 5 + 2) / (2 * HEAD_DIM * 2)


@torch.no_grad()
@windows
@pytest.mark.parametrize(("target", "name"), [("kv_ratio", "llama"), ("kv_ratio", "mpt"), ("bits_per_element", "opt")])
def test_save_and_load(target, name, window, tmp_path):
    model, ids = tiny(name), tokens(2, 60)
    goal = {"kv_ratio": 0.5, "bits_per_element": 4}[target]
    report = compress(
        model, [ids], EigenAttentionConfig(**{target: goal}, rank_multiple=2, window=window, shared_heads=2)
    )
    model.save_pretrained(tmp_path)
    backend = model.config._attn_implementation
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", attn_implementation=backend)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert 0.2 < report.kv_ratio <= 0.5
    assert all(attention.shared_heads == 2 for attention in eigen_layers(loaded))


def test_what_cannot_be_shared():
    with pytest.raises(EigenAttnError, match="3 KV heads cannot share a latent where there are 2: choose 1, 2"):
        compress(tiny("llama"), [tokens(1, 60)], EigenAttentionConfig(shared_heads=3))
    with pytest.raises(EigenAttnError, match="eigen"):
        EigenAttentionConfig(shared_heads=2, basis="eigen")
    with pytest.raises(EigenAttnError, match="whole number"):
        EigenAttentionConfig(shared_heads=0)
