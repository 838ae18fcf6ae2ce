"""Keys and values that share a latent: like latents apart, and the same with a cache, in batches, in files."""

import copy
import dataclasses

import pytest
import torch
from helpers import LENGTH, WINDOW, check_caches, check_generation, close, in_pieces, names, windows
from tiny import HEAD_DIM, compressed, converted, some_bases, tiny, tokens
from transformers import AutoModelForCausalLM, DynamicCache

import eigenattn
from eigenattn import EigenAttentionConfig, EigenAttnError, compress
from eigenattn.cache.packing import Widths
from eigenattn.cache.size import kv_ratio
from eigenattn.compression.folding import attach
from eigenattn.compression.pipeline import calibrate
from eigenattn.compression.ranks import RANK_RULES
from eigenattn.models.bases_file import save_bases
from eigenattn.models.conversion import eigen_layers, layouts_of
from eigenattn.report.planning import plan_capacity

heads_share = pytest.mark.parametrize("heads", [1, 2])


def small(name, window, heads, rank=10):
    return compressed(name, window, share=f"{heads}kv", sizes=(rank * heads,))


def side_by_side(keys, values):
    """Bases of keys and of values as one of both."""

    def blocks(x, y):
        return torch.stack([torch.block_diag(*pair) for pair in zip(x, y, strict=True)])

    mean = torch.cat([keys.mean, values.mean], dim=-1)
    encoder, decoder = blocks(keys.encoder, values.encoder), blocks(keys.decoder, values.decoder)
    return dataclasses.replace(
        keys, encoder=encoder, decoder=decoder, mean=mean, sides=("key", "value"), key_share=torch.ones_like(mean)
    )


@torch.no_grad()
@windows
@heads_share
@names
def test_latents_side_by_side_are_those_apart(name, heads, window):
    apart, layers = converted(name)
    together = copy.deepcopy(apart)
    for index, (one, two) in enumerate(zip(layers, eigen_layers(together), strict=True)):
        pair = some_bases(one, str(heads), (6, 9), index)
        attach(one, pair, window)
        attach(two, [side_by_side(*pair)], window)
    ids = tokens(2, LENGTH)
    exact = apart(ids).logits
    close(together(ids).logits, exact)
    close(in_pieces(together, ids, DynamicCache(config=apart.config), [13] + [1] * 17), exact)
    assert kv_ratio(layouts_of(together)) == kv_ratio(layouts_of(apart)) == 15 / (2 * HEAD_DIM * heads)


@torch.no_grad()
@windows
@names
def test_full_rank_changes_nothing(name, window):
    model, ids = tiny(name), tokens(2, LENGTH)
    full = small(name, window, 1, 2 * HEAD_DIM)
    close(full(ids).logits, model(ids).logits)
    close(in_pieces(full, ids, DynamicCache(config=model.config), [13, 1, 16]), model(ids).logits)


@windows
@heads_share
@names
def test_cached_equals_uncached(name, heads, window):
    check_caches(small(name, window, heads), name)


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
    widths = Widths.of({8: 5, 4: 9, 2: 6})
    model, ids = compressed(name, window, share="2kv", sizes=(widths,)).double(), tokens(2, LENGTH)
    exact = model(ids, use_cache=False).logits
    close(in_pieces(model, ids, DynamicCache(config=model.config), [13] + [1] * 17), exact)
    # Two KV heads of keys and of values in one latent of 5 + 5 + 2 bytes.
    assert kv_ratio(layouts_of(model)) == (5 + 5 + 2) / (2 * 2 * HEAD_DIM * 2)


@torch.no_grad()
@windows
@heads_share
@pytest.mark.parametrize(("coded", "name"), [(False, "llama"), (False, "mpt"), (True, "opt")])
def test_save_and_load(coded, name, heads, window, tmp_path):
    model, ids = tiny(name), tokens(2, 60)
    target = {"kv_ratio": 0.25 if coded else 0.5, "coded": coded}
    config = EigenAttentionConfig(**target, rank_multiple=2, window=window, share=f"{heads}kv")
    report = compress(model, [ids], config)
    model.save_pretrained(tmp_path)
    backend = model.config._attn_implementation
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", attn_implementation=backend)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert 0.2 < report.kv_ratio <= 0.5
    assert layouts_of(loaded) == layouts_of(model)
    assert any(layout.joint for layout in layouts_of(loaded))  # a layer at full rank is not
    assert all(layout.together == heads for layout in layouts_of(loaded) if layout.joint)


@torch.no_grad()
@pytest.mark.parametrize("rule", RANK_RULES)
def test_every_rank_rule_keeps_to_the_ratio(rule):
    model = tiny("llama")
    config = EigenAttentionConfig(kv_ratio=0.5, ranks=rule, rank_multiple=2, window=WINDOW, share="1kv")
    report = compress(model, [tokens(2, 60)], config)
    assert 0.35 < report.kv_ratio <= 0.5
    assert all(
        layout.uncompressed or (layout.joint and layout.latents[0].rank % 2 == 0) for layout in layouts_of(model)
    )
    assert any(layout.joint for layout in layouts_of(model))


@pytest.mark.parametrize("target", [{"energy": 0.7}, {"error_budget": 0.3}])
def test_other_targets(target):
    model, ids = tiny("llama"), tokens(2, 60)
    report = compress(model, [ids], EigenAttentionConfig(**target, rank_multiple=2, window=WINDOW, share="1kv"))
    assert 0 < report.kv_ratio < 1
    assert any(layout.joint for layout in layouts_of(model))


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.5, 0.6])
@pytest.mark.parametrize("name", ["opt", "mpt"])
def test_where_keys_and_values_fill_no_more_half_is_lossless(name, ratio):
    """With as many KV heads as query heads both are made of half as many dimensions: the hidden state's."""
    model, ids = tiny(name), tokens(8, 100)
    config = EigenAttentionConfig(kv_ratio=ratio, rank_multiple=2, window=WINDOW, share="4kv", coded=False)
    report = compress(model, ids.split(1), config)
    assert report.kv_ratio <= ratio
    close(model(tokens(2, 60, seed=9)).logits, tiny(name)(tokens(2, 60, seed=9)).logits, 1e-3)


def test_all_of_it_is_the_original():
    model, ids = tiny("llama"), tokens(2, 60)
    report = compress(model, [ids], EigenAttentionConfig(kv_ratio=1.0, share="1kv"))
    assert report.kv_ratio == 1
    assert torch.equal(model(ids).logits, tiny("llama")(ids).logits)


@torch.no_grad()
def test_bases_alone(tmp_path):
    model, ids = tiny("llama"), tokens(2, 60)
    config = EigenAttentionConfig(kv_ratio=0.5, rank_multiple=2, window=WINDOW, share="2kv", coded=False)
    compress(model, [ids], config, provenance={"base_model": "base"})
    save_bases(model, tmp_path)
    assert torch.equal(eigenattn.attach(tiny("llama"), tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["opt", "mpt", "bloom", "falcon-alibi", "llama", "deepseek_v3"])
def test_they_are_one_by_default_where_positions_do_not_turn_keys(name, tmp_path):
    joint, ids = name in ("opt", "mpt", "bloom", "falcon-alibi"), tokens(2, 60)
    tiny(name).save_pretrained(tmp_path)
    planned = plan_capacity(str(tmp_path), gpu_memory=1, context=64, config=EigenAttentionConfig(window=WINDOW))
    model = tiny(name)
    report = compress(model, [ids], EigenAttentionConfig(window=WINDOW))
    assert all(layout.joint == (joint or layout.tied) for layout in layouts_of(model))
    assert report.config["share"] == ("1kv" if joint else "1")
    assert planned.compressed.bytes_per_token == pytest.approx(report.bytes_per_token, rel=0.2)
    check_caches(model, name)


def test_statistics_say_what_is_shared(tmp_path):
    (tmp_path / "apart").mkdir()
    ids = tokens(2, 60)
    facts = {"text": [{"source": "prose.txt", "sha256": "0"}], "samples": 2, "length": 60, "seed": 0}
    calibrate(tiny("opt"), [ids], EigenAttentionConfig(window=WINDOW, share="1")).save(tmp_path / "apart", facts)
    model = tiny("opt")
    compress(model, config=EigenAttentionConfig(window=WINDOW), statistics=[tmp_path / "apart"])
    assert not any(layout.joint for layout in layouts_of(model))


def test_what_cannot_be_of_both_sides():
    with pytest.raises(EigenAttnError, match="eigen"):
        compress(tiny("llama"), [tokens(1, 60)], EigenAttentionConfig(share="1kv", basis="eigen"))
    with pytest.raises(EigenAttnError, match="not refitted"):
        EigenAttentionConfig(share="1kv", window=0, refit=True, coded=False)
    assert not EigenAttentionConfig(share="1kv", window=0, coded=False).refit
