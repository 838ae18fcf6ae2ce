"""KV heads that share a latent: like latents of single heads, and the same with a cache, in batches, in files."""

import copy
import dataclasses

import pytest
import torch
from helpers import LENGTH, WINDOW, check_caches, check_generation, close, in_pieces, names, windows
from tiny import HEAD_DIM, compressed, converted, some_bases, tiny, tokens
from transformers import AutoModelForCausalLM, DynamicCache

from eigenattn import EigenAttentionConfig, EigenAttnError, compress
from eigenattn.cache.packing import Widths
from eigenattn.cache.size import kv_ratio
from eigenattn.compression.folding import attach
from eigenattn.config import Sharing
from eigenattn.models.conversion import eigen_layers, layouts_of

BOTH, VALUES = "2", "1-2"
SIZES = 14, 20
shares = pytest.mark.parametrize("share", [BOTH, VALUES])


def side_by_side(basis):
    """The bases of two neighbouring heads as one of both."""

    def blocks(x):
        return torch.stack([torch.block_diag(*pair) for pair in x.unflatten(0, (-1, 2))])

    mean = basis.mean.unflatten(0, (-1, 2)).flatten(1)
    return dataclasses.replace(basis, encoder=blocks(basis.encoder), decoder=blocks(basis.decoder), mean=mean, heads=2)


@torch.no_grad()
@shares
@windows
@names
def test_latents_side_by_side_are_those_of_single_heads(name, window, share):
    single, layers = converted(name)
    shared = copy.deepcopy(single)
    for index, (one, two) in enumerate(zip(layers, eigen_layers(shared), strict=True)):
        pair = some_bases(one, sizes=(6, 9), seed=index)
        attach(one, pair, window)
        numbers = Sharing.of(share)[:2]
        attach(two, [side_by_side(x) if n == 2 else x for x, n in zip(pair, numbers, strict=True)], window)
    ids = tokens(2, LENGTH)
    exact = single(ids).logits
    close(shared(ids).logits, exact)
    close(in_pieces(shared, ids, DynamicCache(config=single.config), [13] + [1] * 17), exact)
    assert kv_ratio(layouts_of(shared)) == kv_ratio(layouts_of(single)) == 15 / 32


@torch.no_grad()
@shares
@windows
@names
def test_full_rank_changes_nothing(name, window, share):
    model, ids = tiny(name), tokens(2, LENGTH)
    sizes = [heads * HEAD_DIM for heads in Sharing.of(share)[:2]]
    full = compressed(name, window, share=share, sizes=sizes)
    close(full(ids).logits, model(ids).logits)
    close(in_pieces(full, ids, DynamicCache(config=model.config), [13, 1, 16]), model(ids).logits)


@shares
@windows
@names
def test_cached_equals_uncached(name, window, share):
    check_caches(compressed(name, window, share=share, sizes=SIZES), name)


@shares
@windows
@pytest.mark.parametrize("name", ["llama", "mpt"])
def test_left_padding_and_generation(name, window, share):
    check_generation(compressed(name, window, share=share, sizes=SIZES))


@torch.no_grad()
@shares
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_quantised(name, share):
    ids, widths = tokens(2, LENGTH), {1: Widths.of({8: 3, 4: 6, 2: 6}), 2: Widths.of({8: 5, 4: 9, 2: 6})}
    sizes = [widths[heads] for heads in Sharing.of(share)[:2]]
    model = compressed(name, WINDOW, share=share, sizes=sizes).double()
    exact = model(ids, use_cache=False).logits
    close(in_pieces(model, ids, DynamicCache(config=model.config), [13] + [1] * 17), exact)
    # Bytes of the codes of a latent, for each of the heads that share it.
    held = {BOTH: 2 * (5 + 5 + 2) / 2, VALUES: 3 + 3 + 2 + (5 + 5 + 2) / 2}[share]
    assert kv_ratio(layouts_of(model)) == held / (2 * HEAD_DIM * 2)


@torch.no_grad()
@shares
@windows
@pytest.mark.parametrize(("coded", "name"), [(False, "llama"), (False, "mpt"), (True, "opt")])
def test_save_and_load(coded, name, window, share, tmp_path):
    model, ids = tiny(name), tokens(2, 60)
    target = {"kv_ratio": 0.25 if coded else 0.5, "coded": coded}
    report = compress(model, [ids], EigenAttentionConfig(**target, rank_multiple=2, window=window, share=share))
    model.save_pretrained(tmp_path)
    backend = model.config._attn_implementation
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", attn_implementation=backend)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert 0.2 < report.kv_ratio <= 0.5
    assert layouts_of(loaded) == layouts_of(model)
    assert all(layout.together == 2 for layout in layouts_of(loaded))


@pytest.mark.parametrize("share", ["3", "1-3"])
def test_what_cannot_be_shared(share):
    with pytest.raises(EigenAttnError, match="3 KV heads cannot share a latent where there are 2: choose 1, 2"):
        compress(tiny("llama"), [tokens(1, 60)], EigenAttentionConfig(share=share, coded=False))


@pytest.mark.parametrize("share", [BOTH, VALUES])
def test_the_paper_s_bases_share_nothing(share):
    with pytest.raises(EigenAttnError, match="eigen"):
        compress(tiny("llama"), [tokens(1, 60)], EigenAttentionConfig(share=share, basis="eigen"))


@pytest.mark.parametrize("share", ["2-3", "0", "2kv-2", "2-2kv", "kv", "", "-1", "1.5", 2, ["2"]])
def test_what_is_not_in_the_notation(share):
    with pytest.raises(EigenAttnError, match="share is written 3"):
        EigenAttentionConfig(share=share, coded=False)
