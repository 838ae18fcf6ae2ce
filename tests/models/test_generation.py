"""Ways of generating that reach further than one pass: long texts, several turns, assistants, compiled graphs."""

import pytest
import torch
from helpers import close, generate, windows
from tiny import converted, some_bases, tokens
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, StaticCache

from eigenattn.compression.folding import compress_layer

ROTARY = ["llama", "llama3", "mistral", "qwen2"]


def small(name, seed=0, window=0):
    model, layers = converted(name)
    for index, attention in enumerate(layers):
        compress_layer(attention, some_bases(attention, seed=seed + index), window)
    return model


@torch.no_grad()
@windows
@pytest.mark.parametrize("name", [*ROTARY, "opt", "mpt"])
def test_256_greedy_tokens(name, window):
    model, ids = small(name, window=window), tokens(1, 8)
    cached = generate(model, ids, length=256, use_cache=True)
    assert cached.shape[1] == 264
    assert torch.equal(cached, generate(model, ids, length=256, use_cache=False))


@torch.no_grad()
@windows
@pytest.mark.parametrize("name", ROTARY)
def test_padded_batches_generate_what_single_prompts_do(name, window):
    model, long, short = small(name, window=window), tokens(1, 20), tokens(1, 9, seed=4)
    room = torch.zeros(1, 11, dtype=torch.int64)
    ids = torch.cat([long, torch.cat([room, short], 1)])
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    both = generate(model, ids, mask, 24)
    assert torch.equal(both[0, 20:], generate(model, long, length=24)[0, 20:])
    assert torch.equal(both[1, 20:], generate(model, short, length=24)[0, 9:])


@torch.no_grad()
@windows
@pytest.mark.parametrize("name", [*ROTARY, "opt"])
def test_a_cache_carried_over_turns(name, window):
    model = small(name, window=window)
    cache = DynamicCache(config=model.config)
    conversation = tokens(1, 7)
    for turn in range(4):
        conversation = generate(model, conversation, length=6, past_key_values=cache)
        conversation = torch.cat([conversation, tokens(1, 3, seed=20 + turn)], 1)
    fresh = model(conversation).logits[:, -1]
    seen = cache.get_seq_length()
    continued = model(conversation[:, seen:], past_key_values=cache).logits[:, -1]
    close(continued, fresh)


@torch.no_grad()
@windows
@pytest.mark.parametrize("name", [*ROTARY, "opt"])
def test_assisted_decoding_crops_the_cache(name, window):
    model, assistant, ids = small(name, window=window), small(name, seed=7, window=window), tokens(1, 9)
    expected = generate(model, ids, length=20)
    assert torch.equal(generate(model, ids, length=20, assistant_model=assistant), expected)
    assert torch.equal(generate(model, ids, length=20, prompt_lookup_num_tokens=3), expected)


@torch.no_grad()
@windows
def test_one_graph_with_a_static_cache(window):
    model, ids = small("llama", window=window), tokens(1, 10)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    exact = model(ids).logits
    cache = StaticCache(config=model.config, max_cache_len=16)
    logits = [model(ids[:, :6], past_key_values=cache).logits]
    for i in range(6, 10):
        logits.append(compiled(ids[:, i : i + 1], past_key_values=cache).logits)
    close(torch.cat(logits, 1), exact)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # transformers still passes a flag that PyTorch retires
def test_flex_attention_takes_unequal_sizes():
    model, ids = small("llama"), tokens(1, 10)
    exact = model(ids).logits
    model.set_attn_implementation("flex_attention")
    close(model(ids).logits, exact)


def test_continuous_batching_is_refused():
    """Its cache would never be written, and the tokens would be wrong."""
    model = small("llama")
    settings = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=2, pad_token_id=0)
    room = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    outputs = model.generate_batch(
        [tokens(1, 9)[0].tolist()], generation_config=settings, continuous_batching_config=room, progress_bar=False
    )
    assert [(out.generated_tokens, "continuous batching" in out.error) for out in outputs.values()] == [([], True)]
