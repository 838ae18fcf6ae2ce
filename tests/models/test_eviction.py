"""Evicted tokens: as if every head had masked its own of them in one pass without a cache."""

import copy
from unittest.mock import patch

import pytest
import torch
from helpers import WINDOW, close, generate, in_pieces, padded, windows
from tiny import compressed, converted, quantised_model, random_basis, tiny, tokens
from transformers import DynamicCache

from eigenattn import EigenAttnError, EigenCache
from eigenattn.cache.evicting import EvictingLayer
from eigenattn.cache.rules import EVICTION_RULES, SINKS
from eigenattn.cache.size import allocated_bytes, cache_bytes
from eigenattn.compression.folding import compress_layer
from eigenattn.kernels.reference import causal_mask
from eigenattn.models.conversion import eigen_layers, layouts_of
from eigenattn.models.forward_pass import ForwardPass

LENGTH = 104
# A prompt, some tokens, a short turn, and a second prompt.
PIECES = [45, 1, 1, 9, 1, 36, *[1] * 11]
BUDGETS = {name: max(20, rule.least + WINDOW) for name, rule in EVICTION_RULES.items()}
every_rule = pytest.mark.parametrize(("evict", "budget"), BUDGETS.items(), ids=list(BUDGETS))
rules = pytest.mark.parametrize(("evict", "budget"), [*BUDGETS.items(), ("snapkv", 0.8)])


def small(name="llama", window=WINDOW, share="1", **options):
    return compressed(name, window, share=share, **options)


def evicted_reading(model, ids, cache, pieces=PIECES, **options):
    """Logits through the cache, and which tokens [B, H, T, S] each layer's queries could still see."""
    layers = eigen_layers(model)
    visible = [torch.ones(len(ids), a.heads, ids.shape[1], ids.shape[1], dtype=torch.bool) for a in layers]
    logits, start = [], 0
    for size in pieces:
        stop = start + size
        for attention, seen in zip(layers, visible, strict=True):
            layer = cache.layers[attention.layer_idx] if start else None
            if isinstance(layer, EvictingLayer) and layer.evicted:
                heads = layer.columns.long().repeat_interleave(attention.heads // layer.columns.shape[1], 1)
                left = heads.shape[-1] + layer.evicted
                held = torch.zeros(*heads.shape[:2], left, dtype=torch.bool).scatter(-1, heads, True)
                assert held.sum(-1).eq(heads.shape[-1]).all()
                seen[:, :, start:stop, :left] = held.unsqueeze(-2)
        mask = {name: x[:, :stop] for name, x in options.items()}
        logits.append(model(ids[:, start:stop], past_key_values=cache, use_cache=True, **mask).logits)
        start = stop
    return torch.cat(logits, 1), visible


def masked_reading(model, ids, visible, **options):
    """Logits of one pass without a cache in which every head is blind to its evicted tokens."""
    seen, plain = dict(zip(eigen_layers(model), visible, strict=True)), ForwardPass.mask

    def blinded(this, q, keys):
        mask, sees = plain(this, q, keys), seen[this.layer]
        mask = causal_mask(keys, keys, q.device) if mask is None else mask
        return mask & sees if mask.dtype == torch.bool else mask.masked_fill(~sees, torch.finfo(mask.dtype).min)

    at_once = patch.object(ForwardPass, "is_in_parts", lambda *_: False)
    with at_once, patch.object(ForwardPass, "mask", blinded):
        return model(ids, use_cache=False, **options).logits


@torch.no_grad()
@windows
@rules
@pytest.mark.parametrize("name", ["llama", "cohere", "gpt_neox", "opt", "mpt", "bloom", "gemma3"])
def test_against_masks_in_a_pass_without_a_cache(name, evict, budget, window):
    model, ids = small(name, window), tokens(2, LENGTH)
    found, visible = evicted_reading(model, ids, EigenCache(model.config, evict=evict, budget=budget))
    close(found, masked_reading(model, ids, visible))
    assert (found - model(ids, use_cache=False).logits)[:, 45:].abs().max() > 1e-2  # eviction does something


@torch.no_grad()
@windows
@rules
def test_quantised_latents(evict, budget, window):
    model, ids = quantised_model(window=window), tokens(2, LENGTH)
    found, visible = evicted_reading(model, ids, EigenCache(model.config, evict=evict, budget=budget))
    close(found, masked_reading(model, ids, visible))


@torch.no_grad()
@windows
@rules
@pytest.mark.parametrize("share", ["2", "2kv", "1-2"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_shared_latents_are_evicted_together(name, share, evict, budget, window):
    model, ids = small(name, window, share), tokens(2, LENGTH)
    cache = EigenCache(model.config, evict=evict, budget=budget)
    found, visible = evicted_reading(model, ids, cache)
    assert cache.layers[0].columns.shape[1] == eigen_layers(model)[0].kv_heads // 2
    close(found, masked_reading(model, ids, visible))


@torch.no_grad()
@windows
@pytest.mark.parametrize("name", ["llama", "mpt", "bloom", "falcon-alibi"])
@every_rule
def test_left_padding_without_a_cache(name, evict, budget, window):
    model, ids = small(name, window), tokens(2, 70)
    left, mask = padded(ids, 5)
    mask[1, :40] = 0
    options = {"attention_mask": mask}
    pieces = [60] + [1] * 15
    cache = EigenCache(model.config, evict=evict, budget=budget)
    found, visible = evicted_reading(model, left, cache, pieces, **options)
    exact = masked_reading(model, left, visible, **options)
    close(found[0, 5:], exact[0, 5:])
    close(found[1, 40:], exact[1, 40:])


@torch.no_grad()
@windows
@pytest.mark.parametrize("name", ["llama", "opt"])
@every_rule
def test_padded_batches_generate_what_single_prompts_do(name, evict, budget, window):
    # In float64, so that no two scores are so near that rounding orders them otherwise in a batch.
    model, long, short = small(name, window).double(), tokens(1, 60), tokens(1, 45, seed=4)
    ids = torch.cat([long, torch.cat([torch.zeros(1, 15, dtype=torch.int64), short], 1)])
    mask = torch.ones_like(ids)
    mask[1, :15] = 0

    def written(ids, mask=None, **options):
        cache = EigenCache(model.config, evict=evict, budget=budget)
        return generate(model, ids, mask, 16, past_key_values=cache, **options)[:, ids.shape[1] :]

    both = written(ids, mask)
    assert torch.equal(both[:1], written(long))
    assert torch.equal(both[1:], written(short))
    beams = written(ids, mask, num_beams=3)
    assert torch.equal(beams[:1], written(long, num_beams=3))
    assert torch.equal(beams[1:], written(short, num_beams=3))


@torch.no_grad()
@windows
@pytest.mark.parametrize("name", ["llama", "mpt"])
def test_a_large_budget_changes_nothing_at_all(name, window):
    model, ids = small(name, window), tokens(2, LENGTH)
    plain = in_pieces(model, ids, DynamicCache(config=model.config), PIECES)
    for options in ({}, *({"evict": evict, "budget": LENGTH} for evict in EVICTION_RULES)):
        close(in_pieces(model, ids, EigenCache(model.config, **options), PIECES), plain)


@torch.no_grad()
@windows
def test_eager_attention_gives_weights_by_token(window):
    model, ids = small("llama", window, attn_implementation="eager"), tokens(2, 60)
    cache = EigenCache(model.config, evict="snapkv", budget=38)
    model(ids[:, :50], past_key_values=cache)
    columns = cache.layers[0].columns.long().repeat_interleave(2, 1)
    for piece in (ids[:, 50:51], ids[:, 51:]):
        weights = model(piece, past_key_values=cache, output_attentions=True).attentions[0]
        assert weights.shape[-1] == cache.get_seq_length()
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        gone = torch.ones_like(weights[:, :, 0], dtype=torch.bool).scatter(-1, columns, False)
        gone[..., 50 - window :] = False
        assert weights.transpose(2, 3)[gone].eq(0).all()


@torch.no_grad()
@windows
def test_each_head_keeps_what_its_queries_attend_to(window):
    model, layers = converted("opt")
    attention, length = layers[0], 80
    compress_layer(attention, [random_basis(attention, 8, True, sides=("value",))], window)
    hits = [11, 23, 37, 5]
    hidden = 0.01 * torch.randn(1, length, 64, generator=torch.Generator().manual_seed(0))
    noisy = attention.project(hidden)

    def project(states):
        """Queries look along the first axis, and in each head one key lies there."""
        q, k, v = (x.clone() for x in noisy)
        q[..., 0] = 30
        k[..., 0] = 0
        for head, hit in enumerate(hits):
            k[0, head, hit, 0] = 3
        return type(noisy)(q, k, v)

    attention.project = project
    cache = EigenCache(model.config, evict="snapkv", budget=40)
    attention(hidden, past_key_values=cache, attention_mask=None)
    columns = cache.layers[0].columns[0]
    assert columns.shape == (4, 40 - window)
    for head, hit in enumerate(hits):
        assert set(range(hit - 3, hit + 4)) <= set(columns[head].tolist())


@torch.no_grad()
def test_streaming_holds_sinks_and_recent_tokens():
    model = small()
    cache = EigenCache(model.config, evict="streaming", budget=20)
    in_pieces(model, tokens(1, 60), cache, [30] + [1] * 30)
    assert cache.layers[0].columns[0, 0].tolist() == [*range(SINKS), *range(60 - 20 + SINKS, 60 - WINDOW)]
    assert (cache.get_seq_length(), cache.kept_tokens) == (60, 20)


@torch.no_grad()
@windows
@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize(
    ("evict", "budget", "kept"),
    [("snapkv", 38, 42), *((evict, 20, 20) for evict in EVICTION_RULES if evict != "snapkv"), ("streaming", 99, 54)],
)
def test_bytes_are_those_planned(evict, budget, kept, coded, window):
    model = quantised_model(window=window) if coded else small(window=window, share="1-2")
    cache = EigenCache(model.config, evict=evict, budget=budget)
    in_pieces(model, tokens(2, 54), cache, [50] + [1] * 4)
    assert cache.kept_tokens == kept
    planned = cache_bytes(layouts_of(model), 8 if coded else 4, 54, kept)
    if EVICTION_RULES[evict].tally is not None:  # a number a row that the plan leaves out
        planned += sum(4 * (layout.kv_heads // layout.together) * (kept - window) for layout in layouts_of(model))
    assert allocated_bytes(cache) == 2 * planned


@torch.no_grad()
@windows
@pytest.mark.parametrize("side", ["key", "value"])
def test_a_side_at_full_rank_beside_shared_latents(side, window):
    (model, layers), ids = converted("llama"), tokens(2, LENGTH)
    for attention in layers:
        compress_layer(attention, [random_basis(attention, 12, True, 1, (side,), 2)], window)
    cache = EigenCache(model.config, evict="snapkv", budget=38)
    found, visible = evicted_reading(model, ids, cache)
    close(found, masked_reading(model, ids, visible))
    kept = cache.kept_tokens
    assert allocated_bytes(cache) == 2 * cache_bytes(layouts_of(model), 4, LENGTH, kept)


@torch.no_grad()
@windows
@every_rule
def test_batches_of_a_cache_change_and_move(evict, budget, window):
    """Afterwards logits are those of a cache that stood still, in the next pass and in one behind another eviction."""
    model, ids = small(window=window), tokens(2, 70)

    def read():
        cache = EigenCache(model.config, evict=evict, budget=budget)
        model(ids[:, :50], past_key_values=cache)
        return cache

    exact = in_pieces(model, ids[:, 50:], read(), [10, 1, 9])
    cache = read()
    cache.batch_repeat_interleave(2)  # rows 0, 0, 1, 1
    cache.reorder_cache(torch.tensor([2, 0, 3, 1]))
    cache.batch_select_indices(torch.tensor([1, 2]))  # rows 0, 1
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    twin = copy.deepcopy(cache)
    close(in_pieces(model, ids[:, 50:], cache, [10, 1, 9]), exact)
    close(in_pieces(model, ids[:, 50:], twin, [10, 1, 9]), exact)
    cache.reset()
    assert cache.get_seq_length() == 0
    close(in_pieces(model, ids, cache, [50, 10, 1, 9])[:, 50:], exact)


@torch.no_grad()
@every_rule
def test_assistants_are_refused(evict, budget):
    model, ids = small(), tokens(1, 50)

    def drafted(cache):
        return generate(model, ids, length=20, past_key_values=cache, prompt_lookup_num_tokens=3)

    with pytest.raises(EigenAttnError, match="assistant's drafts"):
        drafted(EigenCache(model.config, evict=evict, budget=budget))
    assert torch.equal(drafted(EigenCache(model.config)), drafted(None))


@torch.no_grad()
@windows
def test_tokens_behind_an_eviction_cannot_be_taken_back(window):
    model, ids = small(window=window), tokens(1, 60)
    cache = EigenCache(model.config, evict="snapkv", budget=38)
    model(ids[:, :50], past_key_values=cache)
    exact = model(ids[:, 50:], past_key_values=copy.deepcopy(cache)).logits
    model(tokens(1, 10, seed=9), past_key_values=cache)
    cache.crop(-10)
    close(model(ids[:, 50:], past_key_values=cache).logits, exact)
    with pytest.raises(EigenAttnError, match="evicted since"):
        cache.crop(-30)
    assert cache.get_seq_length() == 60


@torch.no_grad()
@windows
@pytest.mark.parametrize(
    "evict", [name for name, rule in EVICTION_RULES.items() if rule.queries == 1 and rule.tally is None]
)
def test_what_came_before_any_eviction_can_be_taken_back(evict, window):
    model, ids = small(window=window), tokens(1, 60)
    kept_all, found = (EigenCache(model.config, evict=evict, budget=45) for _ in range(2))
    exact = in_pieces(model, ids, kept_all, [30, 20, 1, 9])
    model(ids[:, :30], past_key_values=found)
    model(tokens(1, 9, seed=9), past_key_values=found)
    found.crop(-9)
    close(in_pieces(model, ids[:, 30:], found, [20, 1, 9]), exact[:, 30:])
    for layer, expected in zip(found.layers, kept_all.layers, strict=True):
        assert torch.equal(layer.columns, expected.columns)
    with pytest.raises(EigenAttnError, match="evicted since"):
        found.crop(-9 - window)


@torch.no_grad()
@windows
@pytest.mark.parametrize("evict", [name for name, rule in EVICTION_RULES.items() if rule.tally is not None])
def test_attention_that_was_counted_cannot_be_taken_back(evict, window):
    model, cache = small(window=window), EigenCache(evict=evict, budget=45)
    model(tokens(1, 30), past_key_values=cache)
    with pytest.raises(EigenAttnError, match=f"{evict} counts"):
        cache.crop(-9)
    assert cache.get_seq_length() == 30


@torch.no_grad()
def test_layers_that_slide_evict_nothing():
    model, ids = small("gemma3"), tokens(1, 60)
    for config in (model.config, None):
        cache = EigenCache(config, evict="streaming", budget=20)
        in_pieces(model, ids, cache, [50] + [1] * 10)
        assert [isinstance(layer, EvictingLayer) for layer in cache.layers] == [False, True, False]
    with pytest.raises(EigenAttnError, match="all layers of this model slide"):
        EigenCache(tiny("mistral-sliding").config, evict="streaming", budget=20)


@torch.no_grad()
def test_what_cannot_evict_says_so():
    ids = tokens(1, 40)
    for config in (tiny("llama").config, None):
        with pytest.raises(EigenAttnError, match="not compressed by eigenattn"):
            tiny("llama")(ids, past_key_values=EigenCache(config, evict="streaming", budget=20))
    with pytest.raises(EigenAttnError, match="beyond the exact window of 6"):
        small()(ids, past_key_values=EigenCache(evict="streaming", budget=6))


def test_other_attention_is_refused():
    model = small("opt", window=0)
    attention = eigen_layers(model)[0]
    attention.config._attn_implementation = "flash_attention_2"
    cache = EigenCache(model.config, evict="streaming", budget=20)
    with pytest.raises(EigenAttnError, match="sdpa"):
        attention(torch.zeros(1, 3, 64), past_key_values=cache, attention_mask=None)
