"""KV heads that share a latent: like latents of single heads, and the same with a cache, in batches, in files."""

import copy

import pytest
import torch
from helpers import LENGTH, WINDOW, check_caches, check_generation, close, in_pieces, names, windows
from tiny import HEAD_DIM, quantised_basis, random_basis, tiny, tokens
from transformers import AutoModelForCausalLM, DynamicCache

from eigenattn import EigenAttentionConfig, EigenAttnError, compress
from eigenattn.cache.packing import Widths
from eigenattn.cache.size import kv_ratio
from eigenattn.compression.bases import Basis
from eigenattn.compression.folding import attach, compress_layer
from eigenattn.config import Sharing
from eigenattn.models.conversion import convert_attention, eigen_layers

BOTH, VALUES = Sharing(2, 2), Sharing(1, 2)
sharings = pytest.mark.parametrize("sharing", [BOTH, VALUES])


def small(name, window, sharing, rank_k=14, rank_v=20):
    model = tiny(name)
    convert_attention(model)
    for index, attention in enumerate(eigen_layers(model)):
        keys = random_basis(attention, rank_k, True, index, sharing.keys)
        values = random_basis(attention, rank_v, True, 100 + index, sharing.values)
        compress_layer(attention, keys, values, window, sharing)
    return model


def side_by_side(basis):
    """The bases of two neighbouring heads as one of both."""

    def blocks(x):
        return torch.stack([torch.block_diag(*pair) for pair in x.unflatten(0, (-1, 2))])

    return Basis(
        blocks(basis.encoder), blocks(basis.decoder), basis.spectrum, basis.mean.unflatten(0, (-1, 2)).flatten(1)
    )


@torch.no_grad()
@sharings
@windows
@names
def test_latents_side_by_side_are_those_of_single_heads(name, window, sharing):
    single = tiny(name)
    convert_attention(single)
    shared = copy.deepcopy(single)
    for index, (one, two) in enumerate(zip(eigen_layers(single), eigen_layers(shared), strict=True)):
        pair = random_basis(one, 6, True, index), random_basis(one, 9, True, 100 + index)
        attach(one, *pair, window)
        together = (side_by_side(basis) if n == 2 else basis for basis, n in zip(pair, sharing, strict=True))
        attach(two, *together, window, sharing)
    ids = tokens(2, LENGTH)
    exact = single(ids).logits
    close(shared(ids).logits, exact)
    close(in_pieces(shared, ids, DynamicCache(config=single.config), [13] + [1] * 17), exact)
    assert kv_ratio(eigen_layers(shared)) == kv_ratio(eigen_layers(single)) == 15 / 32


@torch.no_grad()
@sharings
@windows
@names
def test_full_rank_changes_nothing(name, window, sharing):
    model, ids = tiny(name), tokens(2, LENGTH)
    full = small(name, window, sharing, *(shared * HEAD_DIM for shared in sharing))
    close(full(ids).logits, model(ids).logits)
    close(in_pieces(full, ids, DynamicCache(config=model.config), [13, 1, 16]), model(ids).logits)


@sharings
@windows
@names
def test_cached_equals_uncached(name, window, sharing):
    check_caches(small(name, window, sharing), name, window)


@sharings
@windows
@pytest.mark.parametrize("name", ["llama", "mpt"])
def test_left_padding_and_generation(name, window, sharing):
    check_generation(small(name, window, sharing))


@torch.no_grad()
@sharings
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_quantised(name, sharing):
    model, ids, widths = tiny(name), tokens(2, LENGTH), {1: Widths(3, 0, 6, 6), 2: Widths(5, 0, 9, 6)}
    convert_attention(model)
    for index, attention in enumerate(eigen_layers(model)):
        seeds = zip((index, 100 + index), sharing, strict=True)
        pair = (quantised_basis(attention, widths[n], True, seed, n) for seed, n in seeds)
        compress_layer(attention, *pair, WINDOW, sharing)
    model = model.double()
    exact = model(ids, use_cache=False).logits
    close(in_pieces(model, ids, DynamicCache(config=model.config), [13] + [1] * 17), exact)
    # Bytes of the codes of a latent, for each of the heads that share it.
    held = {BOTH: 2 * (5 + 5 + 2) / 2, VALUES: 3 + 3 + 2 + (5 + 5 + 2) / 2}[sharing]
    assert kv_ratio(eigen_layers(model)) == held / (2 * HEAD_DIM * 2)


@torch.no_grad()
@sharings
@windows
@pytest.mark.parametrize(("target", "name"), [("kv_ratio", "llama"), ("kv_ratio", "mpt"), ("bits_per_element", "opt")])
def test_save_and_load(target, name, window, sharing, tmp_path):
    model, ids = tiny(name), tokens(2, 60)
    goal = {"kv_ratio": 0.5, "bits_per_element": 4}[target]
    shared = {"shared_heads": sharing.keys, "shared_values": sharing.values}
    report = compress(model, [ids], EigenAttentionConfig(**{target: goal}, rank_multiple=2, window=window, **shared))
    model.save_pretrained(tmp_path)
    backend = model.config._attn_implementation
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", attn_implementation=backend)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert 0.2 < report.kv_ratio <= 0.5
    assert all(attention.sharing == sharing for attention in eigen_layers(loaded))


def test_what_cannot_be_shared():
    with pytest.raises(EigenAttnError, match="3 KV heads cannot share a latent where there are 2: choose 1, 2"):
        compress(tiny("llama"), [tokens(1, 60)], EigenAttentionConfig(shared_heads=3))
    with pytest.raises(EigenAttnError, match="3 KV heads cannot share a latent"):
        compress(tiny("llama"), [tokens(1, 60)], EigenAttentionConfig(shared_values=3))
    for name in ("shared_heads", "shared_values"):
        with pytest.raises(EigenAttnError, match="eigen"):
            EigenAttentionConfig(**{name: 2}, basis="eigen")
    with pytest.raises(EigenAttnError, match="multiple of shared_heads, 2, not 3"):
        EigenAttentionConfig(shared_heads=2, shared_values=3)
    with pytest.raises(EigenAttnError, match="leave out shared_values"):
        EigenAttentionConfig(joint=True, shared_values=2)
    with pytest.raises(EigenAttnError, match="whole number"):
        EigenAttentionConfig(shared_heads=0)
