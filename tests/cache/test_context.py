"""What the layers of a cache share: a pass's memo, positions, and nothing with another cache."""

import copy
import threading

import pytest
import torch
from helpers import close, generate, in_pieces, windows
from tiny import compressed, tokens
from transformers import DynamicCache, StaticCache

from eigenattn import EigenAttnError
from eigenattn.cache.context import CacheContext
from eigenattn.models.conversion import eigen_layers
from eigenattn.models.forward_pass import ForwardPass


def of_rows(*positions):
    return torch.tensor(positions)


def test_a_cache_has_one():
    one, other = DynamicCache(), DynamicCache()
    assert CacheContext.of(one) is CacheContext.of(one)
    assert CacheContext.of(one) is not CacheContext.of(other)


def test_the_first_layer_of_a_pass_owns_it():
    context = CacheContext()
    for _ in range(2):
        assert [context.begin(layer) for layer in (1, 2, 5)] == [True, False, False]
    assert context.owner == 1
    # A layer before it, which held no latents when the first pass came, owns the cache from then on.
    assert [context.begin(layer) for layer in (0, 1, 2)] == [True, False, False]
    assert context.owner == 0


def test_the_memo_lasts_a_pass():
    context, calls = CacheContext(), []

    def asked(name="sum"):
        return context.memoised(name, lambda: calls.append(name) or len(calls))

    def one_pass():
        found = []
        for layer in range(3):
            context.begin(layer)
            found += [asked(), asked("other")]
        return found

    assert one_pass() == [1, 2] * 3
    assert one_pass() == [3, 4] * 3
    assert calls == ["sum", "other"] * 2


def test_the_memo_goes_with_the_last_layer():
    context, calls = CacheContext(), []
    for _ in range(3):
        for layer in (1, 2, 4):
            context.begin(layer)
            context.memoised("sum", lambda: calls.append(1))
            context.end(layer)
        # Which layer is the last is known from the pass before.
        context.memoised("sum", lambda: calls.append(2))
    assert calls == [1, 1, 2, 1, 2]


@torch.no_grad()
@windows
@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "gemma3"])
def test_layers_compute_angles_once_a_pass(name, window, monkeypatch):
    model, ids, calls = compressed(name, window), tokens(1, 12), []
    plain = ForwardPass.memoised

    def counted(this, key, compute):
        def noted():
            calls.append((key, len(passes)))
            return compute()

        return plain(this, key, noted)

    passes, cache = [], DynamicCache(config=model.config)
    monkeypatch.setattr(ForwardPass, "memoised", counted)
    for piece in ids.split([7, 1, 1, 3], dim=1):
        model(piece, past_key_values=cache)
        passes.append(1)
    assert calls
    assert len(calls) == len(set(calls))
    assert {number for _, number in calls} >= {1, 2, 3}  # and again in the next pass; the first brings its own


def test_positions_are_those_written():
    context = CacheContext()
    assert context.positions(0, 4, torch.device("cpu")) is None
    context.write(0, of_rows([3, 4, 9], [0, 1, 2]), 2)
    context.write(3, of_rows([20]), 2)  # one row for all
    assert context.positions(0, 4, torch.device("cpu")).tolist() == [[3, 4, 9, 20], [0, 1, 2, 20]]
    assert context.positions(1, 2, torch.device("cpu")).tolist() == [[4, 9], [1, 2]]
    context.write(2, of_rows([7, 8]), 2)  # what came later was taken back
    assert context.positions(0, 4, torch.device("cpu")).tolist() == [[3, 4, 7, 8], [0, 1, 7, 8]]
    context.map(lambda x: x[[1, 0, 1]])
    assert context.positions(0, 2, torch.device("cpu")).tolist() == [[0, 1], [3, 4], [0, 1]]
    with pytest.raises(EigenAttnError, match="filled by another model"):
        context.write(5, of_rows([9]), 3)  # the fourth token's is missing
    with pytest.raises(EigenAttnError, match="another batch"):
        context.write(4, of_rows([9]), 2)
    context.reset()
    assert context.positions(0, 1, torch.device("cpu")) is None


def test_a_table_of_fixed_size_stays_where_it_is():
    context = CacheContext()
    context.write_fixed(torch.tensor([0, 1]), of_rows([5, 6], [0, 1]), 2, 6)
    place = context.positions(0, 6, torch.device("cpu")).data_ptr()
    context.write_fixed(torch.tensor([2]), of_rows([9], [2]), 2, 6)
    assert context.positions(0, 3, torch.device("cpu")).tolist() == [[5, 6, 9], [0, 1, 2]]
    context.reset()
    context.write_fixed(torch.tensor([0]), of_rows([1]), 2, 6)
    assert context.positions(0, 6, torch.device("cpu")).data_ptr() == place
    assert context.positions(0, 1, torch.device("cpu")).tolist() == [[1], [1]]


def empty(kind, model):
    """A cache for up to 24 tokens."""
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=24)
    return DynamicCache(config=model.config)


kinds = pytest.mark.parametrize("kind", ["dynamic", "static"])


@torch.no_grad()
@windows
@kinds
def test_a_copy_goes_its_own_way(kind, window):
    model, prompt, ends = compressed("llama", window), tokens(1, 12), [tokens(1, 8, seed=seed) for seed in (7, 8)]
    cache = empty(kind, model)
    in_pieces(model, prompt, cache, [12])
    caches = [cache, copy.deepcopy(cache)]
    for each in caches:
        assert all(layer.context is CacheContext.of(each) for layer in each.layers)
    assert CacheContext.of(caches[0]) is not CacheContext.of(caches[1])
    found = [[], []]
    for start, stop in ((0, 1), (1, 6), (6, 8)):  # in turns
        for number in range(2):
            found[number].append(model(ends[number][:, start:stop], past_key_values=caches[number]).logits)
    for number in range(2):
        whole = model(torch.cat([prompt, ends[number]], 1), use_cache=False).logits
        close(torch.cat(found[number], 1), whole[:, 12:])


@torch.no_grad()
@windows
@kinds
def test_a_cache_that_was_reset_reads_another_text(kind, window):
    model = compressed("llama", window)
    cache = empty(kind, model)
    for seed, far in ((1, 0), (2, 100), (3, 0)):
        ids, positions = tokens(1, 20, seed=seed), far + torch.arange(20)[None] * seed
        mask = torch.ones_like(ids)
        exact = model(ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
        found = [
            model(ids[:, a:b], position_ids=positions[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
            for a, b in ((0, 9), (9, 10), (10, 20))
        ]
        close(torch.cat(found, 1), exact)
        cache.reset()
        assert cache.get_seq_length() == 0


@torch.no_grad()
@windows
@pytest.mark.parametrize("name", ["llama", "opt", "qwen2-sliding"])
def test_threads_share_a_model_and_no_cache(name, window):
    """Two texts at once, in step: in the middle of every pass of one is one of the other."""
    model, prompts = compressed(name, window), [tokens(1, 20), tokens(2, 9, seed=4)]
    alone, found = [generate(model, ids, length=30) for ids in prompts], {}
    met = threading.Barrier(2, timeout=60)

    def wait(*_):
        met.wait()

    eigen_layers(model)[1].register_forward_pre_hook(wait)

    def write(number):
        with torch.no_grad():
            found[number] = generate(model, prompts[number], length=30)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], alone[number]) for number in range(2))
