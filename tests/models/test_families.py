"""One suite that every row of the table of families runs, on tiny random models."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from helpers import (
    LENGTH,
    NO_STATIC_CACHE_WITHOUT_MASK,
    WINDOW,
    close,
    generate,
    has_static,
    in_pieces,
    padded,
    windows,
)
from tiny import HEAD_DIM, TINY, some_bases, tiny, tokens
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from eigenattn import EigenAttentionConfig, compress
from eigenattn.compression.folding import attach, fold
from eigenattn.kernels import BACKENDS
from eigenattn.models.conversion import convert_attention, eigen_layers, layouts_of
from eigenattn.models.families import FAMILIES

NAMES = list(TINY)
RANK_K, RANK_V = 12, 8

pytestmark = pytest.mark.parametrize("name", NAMES)


WAYS = [("run-time", 0), ("folded", 0), ("windowed", WINDOW)]
ways = pytest.mark.parametrize(("folded", "window"), [(w == "folded", n) for w, n in WAYS], ids=[w for w, _ in WAYS])


def with_bases(
    model: nn.Module, rank_k: int, rank_v: int, centred: bool = False, folded: bool = True, window: int = 0
) -> nn.Module:
    """A copy of a model, compressed by arbitrary bases."""
    model = copy.deepcopy(model)
    convert_attention(model)
    for index, attention in enumerate(eigen_layers(model)):
        attach(attention, some_bases(attention, sizes=(rank_k, rank_v), seed=index, centred=centred), window)
        if folded:
            fold(attention)
    return model


@torch.no_grad()
@pytest.mark.parametrize("centred", [False, True], ids=["origin", "centred"])
@ways
def test_full_rank_bases_change_nothing(name, centred, folded, window):
    model = tiny(name)
    small = with_bases(model, HEAD_DIM, HEAD_DIM, centred, folded, window)
    ids = tokens(2, LENGTH)
    exact = model(ids).logits
    close(small(ids).logits, exact)
    close(in_pieces(small, ids, DynamicCache(config=model.config), [1] * LENGTH), exact)
    close(in_pieces(small, ids, DynamicCache(config=model.config), [13, 1, 16]), exact)
    static = StaticCache(config=model.config, max_cache_len=48)
    if has_static(name):
        close(in_pieces(small, ids, static, [20] + [1] * 10), exact)
    elif name in NO_STATIC_CACHE_WITHOUT_MASK:
        with pytest.raises(RuntimeError):
            in_pieces(model, ids, static, [20])
    left, mask = padded(ids, 5)
    close(small(left, attention_mask=mask).logits[:, 5:], model(left, attention_mask=mask).logits[:, 5:])


@torch.no_grad()
@ways
def test_truncated_cached_equals_uncached(name, folded, window):
    small = with_bases(tiny(name), RANK_K, RANK_V, True, folded, window)
    ids = tokens(2, LENGTH)
    exact = small(ids, use_cache=False).logits
    config = small.config
    close(in_pieces(small, ids, DynamicCache(config=config), [1] * LENGTH), exact)
    close(in_pieces(small, ids, DynamicCache(config=config), [13, 1, 16]), exact)
    if has_static(name):
        close(in_pieces(small, ids, StaticCache(config=config, max_cache_len=48), [20] + [1] * 10), exact)


@torch.no_grad()
def test_run_time_maps_equal_folded_ones(name):
    model, ids = tiny(name), tokens(2, LENGTH)
    folded, run_time = (with_bases(model, RANK_K, RANK_V, True, folded) for folded in (True, False))
    close(folded(ids).logits, run_time(ids).logits)


@torch.no_grad()
@ways
def test_left_padding_equals_single(name, folded, window):
    small = with_bases(tiny(name), RANK_K, RANK_V, True, folded, window)
    long, short = tokens(1, LENGTH), tokens(1, LENGTH - 8, seed=2)
    padded_short, mask_short = padded(short, 8)
    ids, mask = torch.cat([long, padded_short]), torch.cat([torch.ones_like(long), mask_short])
    # Those that take positions are given them, as `generate` does; BLOOM and MPT read them off the mask.
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    takes_positions = "position_ids" in inspect.signature(small.forward).parameters
    cache, logits = DynamicCache(config=small.config), []
    for start, end in [(0, 20), *((i, i + 1) for i in range(20, LENGTH))]:
        options = {"position_ids": positions[:, start:end]} if takes_positions else {}
        seen = mask[:, :end]
        out = small(ids[:, start:end], attention_mask=seen, past_key_values=cache, use_cache=True, **options)
        logits.append(out.logits)
    batched = torch.cat(logits, dim=1)
    close(batched[:1], small(long).logits)
    close(batched[1:, 8:], small(short).logits)


@torch.no_grad()
@ways
def test_generate(name, folded, window):
    small = with_bases(tiny(name), RANK_K, RANK_V, True, folded, window)
    ids = tokens(2, 9)
    greedy = generate(small, ids, use_cache=True)
    assert torch.equal(greedy, generate(small, ids, use_cache=False))
    assert torch.equal(greedy, generate(small, ids, use_cache=True, prefill_chunk_size=4))
    if has_static(name, masked=True):
        static = {"cache_implementation": "static", "disable_compile": True}
        assert torch.equal(greedy, generate(small, ids, use_cache=True, **static))
    beams = {"num_beams": 3}
    assert torch.equal(generate(small, ids, use_cache=True, **beams), generate(small, ids, use_cache=False, **beams))
    torch.manual_seed(0)
    sampled = generate(small, ids, do_sample=True, use_cache=True)
    torch.manual_seed(0)
    assert torch.equal(sampled, generate(small, ids, do_sample=True, use_cache=False))


@torch.no_grad()
@windows
def test_save_and_load(name, window, tmp_path):
    small, ids = tiny(name), tokens(2, LENGTH)
    basis = "attention" if FAMILIES[TINY[name][0]].absorbed is None else "fisher"
    options = {"ranks": "uniform", "rank_multiple": 2, "window": window, "basis": basis}
    compress(small, [ids], EigenAttentionConfig(kv_ratio=0.6, **options))
    small.save_pretrained(tmp_path)
    # The attention backend is not saved.
    backend = small.config._attn_implementation
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", attn_implementation=backend)
    assert torch.equal(loaded(ids).logits, small(ids).logits)
    assert layouts_of(loaded) == layouts_of(small)


@ways
def test_gradients_reach_every_map(name, folded, window):
    small = with_bases(tiny(name), RANK_K, RANK_V, True, folded, window)
    ids = tokens(2, LENGTH)
    small(ids, labels=ids).loss.backward()
    for attention in eigen_layers(small):
        for parameter_name, parameter in attention.named_parameters():
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all(), parameter_name


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@ways
def test_half_precision(name, folded, window, dtype):
    small, ids = with_bases(tiny(name), RANK_K, RANK_V, True, folded, window), tokens(2, LENGTH)
    exact = small(ids).logits
    half = small.to(dtype)
    uncached = half(ids).logits.float()
    cached = in_pieces(half, ids, DynamicCache(config=half.config), [20] + [1] * 10).float()
    # Random sharp attention amplifies rounding: judged in the mean, against the spread of the logits.
    spread = exact.std()
    assert (uncached - exact).abs().mean() < 0.1 * spread
    assert (cached - exact).abs().mean() < 0.1 * spread


@torch.no_grad()
def test_attention_runs_in_the_small_space(name, monkeypatch):
    """Without rotary positions nothing of the head's own size reaches the kernel; with them, keys and queries do."""
    model_type, _ = TINY[name]
    small = with_bases(tiny(name), RANK_K, RANK_V)
    seen = []

    def spy(q, k, v, **options):
        seen.append((q.shape[-1], k.shape[-1], v.shape[-1]))
        return backend(q, k, v, **options)

    implementation = small.config._attn_implementation
    backend = BACKENDS[implementation]
    monkeypatch.setitem(BACKENDS, implementation, spy)
    cache = DynamicCache(config=small.config)
    small(tokens(1, 8), past_key_values=cache, use_cache=True)
    for layer, (q, k, v) in zip(eigen_layers(small), seen, strict=True):
        expected, rank_v = HEAD_DIM if layer.rotates else RANK_K, RANK_K if layer.layout.tied else RANK_V
        assert (q, k, v) == (expected, expected, rank_v)
        held = cache.layers[layer.layer_idx]
        assert held.keys.shape == (1, layer.kv_heads, 8, RANK_K)
        assert held.values.shape == (1, layer.kv_heads, 8, rank_v)
    if FAMILIES[model_type].positions in ("learned", "alibi"):
        assert not any(layer.rotates for layer in eigen_layers(small))


@torch.no_grad()
def test_a_window_over_everything_is_the_original(name):
    model, ids = tiny(name), tokens(2, LENGTH)
    small = with_bases(model, 2, 2, True, window=LENGTH)
    exact = model(ids).logits
    close(small(ids).logits, exact)
    close(in_pieces(small, ids, DynamicCache(config=model.config), [13, 1, 16]), exact)


@torch.no_grad()
@ways
def test_attention_weights_are_returned(name, folded, window):
    model = tiny(name, attn_implementation="eager")
    small = with_bases(model, HEAD_DIM, HEAD_DIM, True, folded, window)
    ids = tokens(1, LENGTH)
    ours, theirs = small(ids, output_attentions=True), model(ids, output_attentions=True)
    if name == "falcon-alibi":
        # transformers adds Falcon's ALiBi twice in eager attention, and once in sdpa, which has no weights to compare.
        theirs = tiny(name, attn_implementation="sdpa")(ids)
        assert len(ours.attentions) == small.config.num_hidden_layers
    else:
        for a, b in zip(ours.attentions, theirs.attentions, strict=True):
            close(a, b)
    close(ours.logits, theirs.logits)
    cache = DynamicCache(config=small.config)
    small(ids[:, :-1], past_key_values=cache, use_cache=True)
    last = small(ids[:, -1:], past_key_values=cache, use_cache=True, output_attentions=True)
    for a, b in zip(last.attentions, ours.attentions, strict=True):
        close(a, b[:, :, -1:, -a.shape[-1] :])  # a sliding layer no longer holds the first columns
    if has_static(name):
        cache = StaticCache(config=small.config, max_cache_len=LENGTH + 6)
        small(ids[:, :-1], past_key_values=cache, use_cache=True)
        last = small(ids[:, -1:], past_key_values=cache, use_cache=True, output_attentions=True)
        for a, b in zip(last.attentions, ours.attentions, strict=True):
            close(a[..., :LENGTH], b[:, :, -1:])
            assert not a[..., LENGTH:].any()
