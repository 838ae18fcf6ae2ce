"""Keys and values that share a latent: like latents apart, and the same with a cache, in batches, in files."""

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers import LENGTH, WINDOW, check_caches, check_generation, close, in_pieces, names, windows
from tiny import HEAD_DIM, quantised_basis, random_basis, tiny, tokens
from transformers import AutoModelForCausalLM, DynamicCache

import eigenattn
from eigenattn import EigenAttentionConfig, EigenAttnError, compress
from eigenattn.cache.layers import prepare
from eigenattn.cache.packing import Widths
from eigenattn.cache.size import kv_ratio
from eigenattn.compression.bases import Basis
from eigenattn.compression.folding import attach, compress_layer
from eigenattn.compression.ranks import RANK_RULES
from eigenattn.config import Sharing
from eigenattn.models.bases_file import save_bases
from eigenattn.models.conversion import convert_attention, eigen_layers

sharing = pytest.mark.parametrize("shared", [1, 2])


def small(name, window, shared, rank=10, widths=None):
    model = tiny(name)
    convert_attention(model)
    for index, attention in enumerate(eigen_layers(model)):
        if widths is None:
            basis = random_basis(attention, rank * shared, True, index, shared, joint=True)
        else:
            basis = quantised_basis(attention, widths, True, index, shared, joint=True)
        compress_layer(attention, basis, None, window, Sharing(shared, shared))
    return model


def side_by_side(keys, values):
    """Bases of keys and of values as a joint one."""

    def blocks(x, y):
        return torch.stack([torch.block_diag(*pair) for pair in zip(x, y, strict=True)])

    mean = torch.cat([keys.mean, values.mean], dim=-1)
    encoder, decoder = blocks(keys.encoder, values.encoder), blocks(keys.decoder, values.decoder)
    return Basis(encoder, decoder, torch.ones_like(mean), mean, key_share=torch.ones_like(mean))


@torch.no_grad()
@windows
@sharing
@names
def test_latents_side_by_side_are_those_apart(name, shared, window):
    apart = tiny(name)
    convert_attention(apart)
    together = copy.deepcopy(apart)
    for index, (one, two) in enumerate(zip(eigen_layers(apart), eigen_layers(together), strict=True)):
        pair = random_basis(one, 6, True, index, shared), random_basis(one, 9, True, 100 + index, shared)
        attach(one, *pair, window, Sharing(shared, shared))
        attach(two, side_by_side(*pair), None, window, Sharing(shared, shared))
    ids = tokens(2, LENGTH)
    exact = apart(ids).logits
    close(together(ids).logits, exact)
    close(in_pieces(together, ids, DynamicCache(config=apart.config), [13] + [1] * 17), exact)
    assert kv_ratio(eigen_layers(together)) == kv_ratio(eigen_layers(apart)) == 15 / (2 * HEAD_DIM * shared)


@torch.no_grad()
@windows
@names
def test_full_rank_changes_nothing(name, window):
    model, ids = tiny(name), tokens(2, LENGTH)
    full = small(name, window, 1, 2 * HEAD_DIM)
    close(full(ids).logits, model(ids).logits)
    close(in_pieces(full, ids, DynamicCache(config=model.config), [13, 1, 16]), model(ids).logits)


@windows
@sharing
@names
def test_cached_equals_uncached(name, shared, window):
    check_caches(small(name, window, shared), name, window)


@windows
@pytest.mark.parametrize("name", ["llama", "mpt"])
def test_left_padding_and_generation(name, window):
    check_generation(small(name, window, 2))


@torch.no_grad()
@windows
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_tokens_taken_back(name, window):
    model, ids = small(name, window, 1), tokens(2, LENGTH)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, use_cache=True)
    cache.crop(-5)
    again = model(ids[:, -5:], past_key_values=cache, use_cache=True).logits
    close(again, model(ids, use_cache=False).logits[:, -5:])


@torch.no_grad()
@windows
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_quantised(name, window):
    model, ids = small(name, window, 2, widths=Widths(5, 0, 9, 6)).double(), tokens(2, LENGTH)
    exact = model(ids, use_cache=False).logits
    close(in_pieces(model, ids, DynamicCache(config=model.config), [13] + [1] * 17), exact)
    # Two KV heads of keys and of values in one latent of 5 + 5 + 2 bytes.
    assert kv_ratio(eigen_layers(model)) == (5 + 5 + 2) / (2 * 2 * HEAD_DIM * 2)


@torch.no_grad()
@windows
@sharing
@pytest.mark.parametrize(("target", "name"), [("kv_ratio", "llama"), ("kv_ratio", "mpt"), ("bits_per_element", "opt")])
def test_save_and_load(target, name, shared, window, tmp_path):
    model, ids = tiny(name), tokens(2, 60)
    config = EigenAttentionConfig(
        **{target: {"kv_ratio": 0.5, "bits_per_element": 4}[target]},
        rank_multiple=2,
        window=window,
        shared_heads=shared,
        joint=True,
    )
    report = compress(model, [ids], config)
    model.save_pretrained(tmp_path)
    backend = model.config._attn_implementation
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", attn_implementation=backend)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert 0.2 < report.kv_ratio <= 0.5
    assert all(attention.sharing == (shared, shared) for attention in eigen_layers(loaded))
    assert any(attention.joint for attention in eigen_layers(loaded))  # a layer at full rank is not


@torch.no_grad()
@pytest.mark.parametrize("rule", RANK_RULES)
def test_every_rank_rule_keeps_to_the_ratio(rule):
    model = tiny("llama")
    config = EigenAttentionConfig(kv_ratio=0.5, ranks=rule, rank_multiple=2, window=WINDOW, joint=True)
    report = compress(model, [tokens(2, 60)], config)
    assert 0.35 < report.kv_ratio <= 0.5
    ranks = [(layer["rank_k"], layer["rank_v"]) for layer in report.layers]
    assert all((rank_k % 2, rank_v) == (0, 0) or (rank_k, rank_v) == (HEAD_DIM,) * 2 for rank_k, rank_v in ranks)
    assert any(rank_v == 0 for _, rank_v in ranks)


@pytest.mark.parametrize("target", [{"energy": 0.7}, {"error_budget": 0.3}])
def test_other_targets(target):
    model, ids = tiny("llama"), tokens(2, 60)
    report = compress(model, [ids], EigenAttentionConfig(**target, rank_multiple=2, window=WINDOW, joint=True))
    assert 0 < report.kv_ratio < 1
    assert any(layer["rank_v"] == 0 for layer in report.layers)


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.5, 0.6])
@pytest.mark.parametrize("name", ["opt", "mpt"])
def test_where_keys_and_values_fill_no_more_half_is_lossless(name, ratio):
    """With as many KV heads as query heads both are made of half as many dimensions: the hidden state's."""
    model, ids = tiny(name), tokens(8, 100)
    config = EigenAttentionConfig(kv_ratio=ratio, rank_multiple=2, window=WINDOW, shared_heads=4, joint=True)
    report = compress(model, ids.split(1), config)
    assert report.kv_ratio <= ratio
    close(model(tokens(2, 60, seed=9)).logits, tiny(name)(tokens(2, 60, seed=9)).logits, 1e-3)


def test_all_of_it_is_the_original():
    model, ids = tiny("llama"), tokens(2, 60)
    report = compress(model, [ids], EigenAttentionConfig(kv_ratio=1.0, joint=True))
    assert report.kv_ratio == 1
    assert torch.equal(model(ids).logits, tiny("llama")(ids).logits)


@torch.no_grad()
def test_bases_alone(tmp_path):
    model, ids = tiny("llama"), tokens(2, 60)
    config = EigenAttentionConfig(kv_ratio=0.5, rank_multiple=2, window=WINDOW, shared_heads=2, joint=True)
    compress(model, [ids], config, provenance={"base_model": "base"})
    save_bases(model, tmp_path)
    assert torch.equal(eigenattn.attach(tiny("llama"), tmp_path)(ids).logits, model(ids).logits)


def test_what_cannot_be_joint():
    with pytest.raises(EigenAttnError, match="eigen"):
        EigenAttentionConfig(joint=True, basis="eigen")
    with pytest.raises(EigenAttnError, match="true or false"):
        EigenAttentionConfig(joint=1)
    with pytest.raises(EigenAttnError, match="not refitted"):
        EigenAttentionConfig(joint=True, window=0, refit=True)
    assert not EigenAttentionConfig(joint=True, window=0).refit


def test_quantised_caches_of_transformers_refuse():
    layer = type("QuantizedLayer", (), {"q_group_size": 8})()  # the real ones need quanto or hqq
    latents = torch.zeros(1, 2, 3, 16)
    prepare(SimpleNamespace(layers=[layer]), 0, (latents, latents))
    with pytest.raises(EigenAttnError, match="cannot hold latents that keys and values share"):
        prepare(SimpleNamespace(layers=[layer]), 0, (latents, latents[..., :0]))
