"""Long texts, many turns and several threads through the cache: no drift, no memory but the cache's own."""

import os
import random
import threading

import pytest
import torch
from helpers import windows
from tiny import some_bases, tiny, tokens
from transformers import DynamicCache

from eigenattn.cache.layers import ROLLBACK
from eigenattn.cache.size import allocated_bytes, cache_bytes
from eigenattn.compression.folding import compress_layer
from eigenattn.models.conversion import convert_attention, eigen_layers, layouts_of

# `make long` raises both.
LENGTH = int(os.environ.get("EIGENATTN_LONG", "300"))
TURNS = max(LENGTH // 20, 20)


def small(name, window):
    model = tiny(name, max_position_embeddings=max(2 * LENGTH, 512))
    convert_attention(model)
    for index, attention in enumerate(eigen_layers(model)):
        compress_layer(attention, some_bases(attention, seed=index), window)
    return model


def resident() -> int:
    """Bytes of memory this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@torch.no_grad()
@windows
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_many_tokens_one_by_one(name, window):
    """The last logits of a long text, read token by token, are those of one pass over it."""
    model, ids = small(name, window), tokens(1, LENGTH)
    cache = DynamicCache(config=model.config)
    errors, held = [], []
    whole = model(ids, use_cache=False).logits[0]
    for position in range(LENGTH):
        logits = model(ids[:, position : position + 1], past_key_values=cache).logits[0, 0]
        errors.append(float((logits - whole[position]).abs().max()))
        if position in (LENGTH // 2, LENGTH - 1) and os.path.exists("/proc/self/statm"):
            held.append((resident(), allocated_bytes(cache)))
    assert allocated_bytes(cache) == cache_bytes(layouts_of(model), 4, LENGTH)
    assert max(errors) < 1e-3
    # No drift: the last quarter is no worse than the first, beyond rounding.
    quarter = LENGTH // 4
    assert max(errors[-quarter:]) < 3 * max(errors[:quarter]) + 1e-4
    if held:
        (before, cache_before), (after, cache_after) = held
        assert after - before < 3 * (cache_after - cache_before) + 32 * 2**20


@torch.no_grad()
@windows
@pytest.mark.parametrize("name", ["llama", "qwen3", "opt"])
def test_many_turns_with_cropping(name, window):
    """A text grows, is taken back in part, and grows otherwise, again and again."""
    model, chance = small(name, window), random.Random(3)
    cache = DynamicCache(config=model.config)
    text = torch.empty(1, 0, dtype=torch.int64)
    for turn in range(TURNS):
        added = tokens(1, chance.randint(1, 40), seed=turn)
        logits = model(added, past_key_values=cache).logits
        text = torch.cat([text, added], 1)
        taken_back = chance.randint(0, min(added.shape[1], ROLLBACK))
        if taken_back:
            cache.crop(-taken_back)
            text = text[:, :-taken_back]
        assert cache.get_seq_length() == text.shape[1]
        if turn % (TURNS // 5) == TURNS // 5 - 1:
            logits = model(tokens(1, 3, seed=turn), past_key_values=cache).logits
            exact = model(torch.cat([text, tokens(1, 3, seed=turn)], 1), use_cache=False).logits[:, -3:]
            torch.testing.assert_close(logits, exact, rtol=0, atol=1e-3)
            cache.crop(-3)


@torch.no_grad()
@windows
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_every_padding(name, window):
    """A row of a batch, however far it is padded, says what it says alone."""
    model, longest, steps = small(name, window), 12, 10
    rows = [tokens(1, length, seed=length) for length in range(1, longest + 1)]
    room = [torch.zeros(1, longest - row.shape[1], dtype=torch.int64) for row in rows]
    ids = torch.cat([torch.cat(pair, 1) for pair in zip(room, rows, strict=True)])
    mask = torch.cat([torch.cat([torch.zeros_like(a), torch.ones_like(b)], 1) for a, b in zip(room, rows, strict=True)])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    following = tokens(longest, steps, seed=99)
    cache = DynamicCache(config=model.config)
    found = [model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1]]
    for step in range(steps):
        mask = torch.cat([mask, torch.ones(longest, 1, dtype=mask.dtype)], 1)
        here = positions[:, -1:] + 1 + step
        piece = following[:, step : step + 1]
        found.append(model(piece, attention_mask=mask, position_ids=here, past_key_values=cache).logits[:, -1])
    for number, row in enumerate(rows):
        alone = model(torch.cat([row, following[number : number + 1]], 1)).logits[0, row.shape[1] - 1 :]
        torch.testing.assert_close(torch.stack(found)[:, number], alone, rtol=0, atol=1e-4)


@torch.no_grad()
@windows
def test_threads_with_caches_of_their_own(window):
    model = small("llama", window)
    prompts = [tokens(1, 5 + 7 * number, seed=number) for number in range(4)]

    def generate(prompt):
        return model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0, max_new_tokens=40
        )

    expected = [generate(prompt) for prompt in prompts]
    found: dict[int, list[torch.Tensor]] = {}

    def work(number):
        with torch.no_grad():
            found[number] = [generate(prompts[number]) for _ in range(2)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, expected[number]) for number in range(4) for one in found[number])
