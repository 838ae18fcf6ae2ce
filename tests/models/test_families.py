"""One suite that every row of the table of families runs, on tiny random models."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import transformers
from packaging.version import Version
from tiny import HEAD_DIM, TINY, random_basis, tiny, tokens
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from eigenattn import EigenAttentionConfig, compress
from eigenattn.compression.folding import attach, fold
from eigenattn.kernels import BACKENDS
from eigenattn.models.conversion import convert_attention, eigen_layers
from eigenattn.models.families import FAMILIES

NAMES = list(TINY)
RANK_K, RANK_V = 12, 8
TOLERANCE = 1e-4
LENGTH = 30
WINDOW = 6
# Where the original itself fails: Falcon's ALiBi does not fit a static cache's mask.
NO_STATIC_CACHE = {"falcon-alibi"}
# Nor did BLOOM's before transformers 5.21, unless the mask was as long as the cache: `generate` makes it so.
OLD_BLOOM = {"bloom"} if Version(transformers.__version__) < Version("5.21") else set()
NO_STATIC_CACHE_WITHOUT_MASK = NO_STATIC_CACHE | OLD_BLOOM
# A window beside nothing but sliding layers: refused with a static cache (see test_window.py).
NO_STATIC_WINDOW = {"mistral-sliding"}


def has_static(name: str, window: int, masked: bool = False) -> bool:
    fails = NO_STATIC_CACHE if masked else NO_STATIC_CACHE_WITHOUT_MASK
    return name not in fails and not (window and name in NO_STATIC_WINDOW)


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
        keys = random_basis(attention, rank_k, centred, seed=index)
        attach(attention, keys, random_basis(attention, rank_v, centred, seed=100 + index), window)
        if folded:
            fold(attention)
    return model


def padded(ids: torch.Tensor, room: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Left padding in front of each row, and the attention mask."""
    pad = torch.zeros(ids.shape[0], room, dtype=ids.dtype)
    return torch.cat([pad, ids], 1), torch.cat([pad, torch.ones_like(ids)], 1)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@torch.no_grad()
def in_pieces(model: nn.Module, ids: torch.Tensor, cache, sizes: list[int]) -> torch.Tensor:
    """Logits of a text that goes through a cache in pieces."""
    logits, start = [], 0
    for size in sizes:
        end = start + size
        out = model(ids[:, start:end], past_key_values=cache, use_cache=True)
        logits.append(out.logits)
        start = end
    return torch.cat(logits, dim=1)


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
    if has_static(name, window):
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
    if has_static(name, window):
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


def generate(model, ids, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    settings = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=mask, **settings)


@torch.no_grad()
@ways
def test_generate(name, folded, window):
    small = with_bases(tiny(name), RANK_K, RANK_V, True, folded, window)
    ids = tokens(2, 9)
    greedy = generate(small, ids, use_cache=True)
    assert torch.equal(greedy, generate(small, ids, use_cache=False))
    assert torch.equal(greedy, generate(small, ids, use_cache=True, prefill_chunk_size=4))
    if has_static(name, window, masked=True):
        static = {"cache_implementation": "static", "disable_compile": True}
        assert torch.equal(greedy, generate(small, ids, use_cache=True, **static))
    beams = {"num_beams": 3}
    assert torch.equal(generate(small, ids, use_cache=True, **beams), generate(small, ids, use_cache=False, **beams))
    torch.manual_seed(0)
    sampled = generate(small, ids, do_sample=True, use_cache=True)
    torch.manual_seed(0)
    assert torch.equal(sampled, generate(small, ids, do_sample=True, use_cache=False))


@torch.no_grad()
@pytest.mark.parametrize("window", [0, WINDOW])
def test_save_and_load(name, window, tmp_path):
    small, ids = tiny(name), tokens(2, LENGTH)
    compress(small, [ids], EigenAttentionConfig(kv_ratio=0.6, ranks="uniform", rank_multiple=2, window=window))
    small.save_pretrained(tmp_path)
    # The attention backend is not saved.
    backend = small.config._attn_implementation
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", attn_implementation=backend)
    assert torch.equal(loaded(ids).logits, small(ids).logits)
    assert [(a.rank_k, a.rank_v) for a in eigen_layers(loaded)] == [(a.rank_k, a.rank_v) for a in eigen_layers(small)]


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
        expected = HEAD_DIM if layer.rotates else RANK_K
        assert (q, k, v) == (expected, expected, RANK_V)
        held = cache.layers[layer.layer_idx]
        assert held.keys.shape == (1, layer.kv_heads, 8, RANK_K)
        assert held.values.shape == (1, layer.kv_heads, 8, RANK_V)
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
