import copy
import subprocess
import sys

import pytest
import torch
from helpers import same, state
from tiny import tiny, tokens
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from eigenattn import EigenAttentionConfig, EigenAttnError, compress
from eigenattn.cache.size import allocated_bytes, cache_bytes
from eigenattn.cache.store import room_for
from eigenattn.compression.methods import BASES
from eigenattn.compression.ranks import RANK_RULES
from eigenattn.models.conversion import eigen_layers, layouts_of

SMALL = {"rank_multiple": 2, "window": 4}


@torch.no_grad()
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("basis", sorted(BASES))
@pytest.mark.parametrize("ranks", sorted(RANK_RULES))
def test_report_is_what_the_cache_allocates(ranks, basis, window):
    model = tiny("llama")
    config = EigenAttentionConfig(kv_ratio=0.6, ranks=ranks, basis=basis, rank_multiple=2, window=window)
    report = compress(model, [tokens(2, 40)], config)
    assert report.kv_ratio <= 0.6
    cache = DynamicCache(config=model.config)
    model(tokens(2, 30), past_key_values=cache, use_cache=True)
    model(tokens(2, 1), past_key_values=cache, use_cache=True)
    assert allocated_bytes(cache) == 2 * cache_bytes(layouts_of(model), 4, 31)
    if not window:
        assert allocated_bytes(cache) == 2 * room_for(31) * report.bytes_per_token
    assert report.kv_ratio == report.bytes_per_token / report.baseline_bytes_per_token
    assert report.layers == [layout.to_dict() for layout in layouts_of(model)]
    assert report.tokens == 80
    assert report.forward_seconds > 0
    refitted = {"refit"} if basis == "attention" and not window else set()
    assert set(report.seconds) == {"statistics", "bases", "ranks", "folding"} | refitted


def test_full_rank_is_the_original_to_the_bit():
    model, ids = tiny("llama"), tokens(2, 20)
    exact = model(ids).logits
    assert compress(model, [ids], EigenAttentionConfig(kv_ratio=1.0)).kv_ratio == 1
    assert torch.equal(model(ids).logits, exact)


@pytest.mark.parametrize("basis", sorted(BASES))
def test_a_model_that_is_low_rank_loses_nothing(basis):
    """Keys, queries and values in half the dimensions of each head: a ratio of a half is then lossless."""
    model = tiny("llama-bias")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            subspace = torch.linalg.qr(torch.randn(2, 16, 8, generator=generator)).Q
            onto = subspace @ subspace.transpose(1, 2)  # a KV head's projector, [G, D, D]
            for projection, heads in ((attention.q_proj, 4), (attention.k_proj, 2), (attention.v_proj, 2)):
                by_head = onto.repeat_interleave(heads // 2, 0)
                projection.weight.copy_((by_head @ projection.weight.view(heads, 16, -1)).flatten(0, 1))
                projection.bias.copy_((by_head @ projection.bias.view(heads, 16, 1)).flatten())
    ids = tokens(4, 40)
    exact = model(ids).logits
    report = compress(model, [ids], EigenAttentionConfig(kv_ratio=0.5, ranks="uniform", basis=basis, window=0))
    assert [[latent["rank"] for latent in layer["latents"]] for layer in report.layers] == [[8, 8]] * 3
    torch.testing.assert_close(model(ids).logits, exact, rtol=0, atol=1e-4)


@torch.no_grad()
def test_fewer_bytes_cost_more():
    ids, batches = tokens(2, 40, seed=9), list(tokens(8, 40).split(2))
    exact = tiny("llama")(ids).logits
    errors = []
    for ratio in (0.9, 0.6, 0.3):
        model = tiny("llama")
        compress(model, batches, EigenAttentionConfig(kv_ratio=ratio, ranks="uniform", **SMALL))
        errors.append(float((model(ids).logits - exact).square().mean()))
    assert errors == sorted(errors)
    assert errors[0] > 0


def test_compression_is_deterministic():
    results = []
    for _ in range(2):
        model = tiny("llama")
        compress(model, [tokens(2, 40)], EigenAttentionConfig(kv_ratio=0.6, **SMALL))
        results.append(state(model))
    assert same(*results)


@pytest.mark.parametrize(
    ("batches", "config"),
    [
        ([], EigenAttentionConfig(coded=False)),
        (["words"], EigenAttentionConfig(coded=False)),
        ([tokens(1, 20)], EigenAttentionConfig(kv_ratio=0.01, rank_multiple=8, coded=False)),
        ([tokens(1, 20)], EigenAttentionConfig(basis="cosine")),
        ([tokens(1, 20)], EigenAttentionConfig(ranks="lottery")),
    ],
    ids=["no batches", "not tokens", "impossible ratio", "unknown basis", "unknown rule"],
)
def test_bad_input_leaves_the_model_as_it_was(batches, config):
    model, ids = tiny("llama").train(), tokens(2, 20)
    before, classes = state(model), [type(m) for m in model.modules()]
    with pytest.raises(EigenAttnError) as error:
        compress(model, batches, config)
    assert "\n" not in str(error.value)
    assert [type(m) for m in model.modules()] == classes
    assert model.training
    assert same(model.state_dict(), before)
    compress(model, [ids], EigenAttentionConfig(kv_ratio=0.6, **SMALL))  # and it can be tried again


def test_a_batch_that_fails_half_way_leaves_the_model_as_it_was():
    def failing():
        yield tokens(1, 20)
        raise KeyboardInterrupt

    model = tiny("llama")
    with pytest.raises(KeyboardInterrupt):
        compress(model, failing())
    assert not eigen_layers(model)


def test_text_within_the_window_is_refused():
    with pytest.raises(EigenAttnError, match="20 tokens at most, and the window keeps 32"):
        compress(tiny("llama"), [tokens(2, 20)], EigenAttentionConfig(kv_ratio=0.6))


def test_compressing_twice_is_refused():
    model = tiny("llama")
    compress(model, [tokens(1, 40)], EigenAttentionConfig(kv_ratio=0.6, **SMALL))
    with pytest.raises(EigenAttnError, match="compressed already"):
        compress(model, [tokens(1, 40)])


def test_unknown_model_types_list_the_known_ones():
    from transformers import CTRLConfig, CTRLLMHeadModel

    model = CTRLLMHeadModel(CTRLConfig(n_layer=1, n_embd=16, n_head=2, dff=16, vocab_size=20))
    with pytest.raises(EigenAttnError, match=r"'ctrl' is not supported: .*families\.md"):
        compress(model, [tokens(1, 10) % 20])


def test_attention_that_cannot_be_looked_into_is_refused():
    model = tiny("llama")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(EigenAttnError, match="sdpa"):
        compress(model, [tokens(1, 40)])


def test_cross_attention_is_refused():
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, add_cross_attention=True))
    with pytest.raises(EigenAttnError, match="cross-attention"):
        compress(model, [tokens(1, 40) % 50])


def test_a_copy_of_a_compressed_model_is_its_own():
    model, ids = tiny("llama"), tokens(2, 20)
    compress(model, [ids], EigenAttentionConfig(kv_ratio=0.6, ranks="uniform", **SMALL))
    twin = copy.deepcopy(model)
    logits = model(ids).logits
    with torch.no_grad():
        twin.model.layers[0].self_attn.key_decoder.zero_()
    assert torch.equal(model(ids).logits, logits)


MEMORY = """
import sys; sys.path.insert(0, {tests!r})
import resource, torch
from tiny import tiny, tokens
from eigenattn import EigenAttentionConfig, compress
torch.set_num_threads(1)
report = compress(tiny("llama", hidden_size=256, max_position_embeddings=2048),
                  (tokens(1, 512, seed=i) for i in range({samples})), EigenAttentionConfig(kv_ratio=0.6))
print(report.peak_memory_bytes)
"""


def test_memory_does_not_grow_with_the_samples(request):
    tests = str(request.config.rootpath / "tests")
    peaks = []
    for samples in (8, 64):
        code = MEMORY.format(tests=tests, samples=samples)
        out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        peaks.append(int(out.stdout))
    assert peaks[1] < 1.05 * peaks[0]
