"""Positions are those the tokens came with, through every cache: gaps, padding behind texts, jumps, packed rows."""

from functools import partial
from importlib.util import find_spec

import pytest
import torch
from helpers import close, generate, has_static, windows
from tiny import compressed, tokens
from transformers import DynamicCache, StaticCache

from eigenattn import kernels
from eigenattn.kernels import chunked, decoding
from eigenattn.models.conversion import eigen_layers

# Halves and neighbours, whole heads and parts, kinds of scaling, norms, layers that slide.
ROTARY = ["llama", "llama3", "llama-yarn", "gpt_neox", "cohere", "qwen3", "phi3-partial", "gemma3", "mistral-sliding"]
LENGTH, READ = 20, 12
BY_STEPS, IN_PIECES = [READ] + [1] * (LENGTH - READ), [5, 7, 1, 7]
PIECES = BY_STEPS, IN_PIECES, [READ, LENGTH - READ]
coded = pytest.mark.parametrize("coded", [False, True], ids=["plain", "coded"])


def gaps(mask):
    """One row ends early and is padded up to where the texts go on, and the other has a hole."""
    mask[0, 8:10] = 0
    mask[1, 3:5] = 0


def padding_behind(mask):
    mask[1, 7:READ] = 0


def padding_on_both_sides(mask):
    mask[0, :3] = 0
    mask[1, :1], mask[1, 9:READ] = 0, 0


def nothing_hidden(mask):
    pass


def counted(mask):
    """Positions as `generate` counts them."""
    return (mask.cumsum(-1) - 1).clamp_min(0)


def jumps(mask):
    """Images and cut texts: positions that leap, in each row elsewhere, and stand still."""
    steps = torch.ones_like(mask)
    steps[0, 6], steps[0, 13], steps[1, 15] = 30, 7, 90
    steps[1, 2:5] = 0
    return steps.cumsum(-1)


def one_row_for_all(mask):
    return 5 + 3 * torch.arange(mask.shape[1])[None]


CASES = {
    "gaps": (gaps, counted),
    "padding behind": (padding_behind, counted),
    "padding on both sides": (padding_on_both_sides, counted),
    "jumps": (nothing_hidden, jumps),
    "jumps and gaps": (gaps, jumps),
    "one row for all": (nothing_hidden, one_row_for_all),
}
cases = pytest.mark.parametrize("case", CASES)


def text(case, length=LENGTH):
    """Ids, attention mask and positions [2, T]."""
    hide, count = CASES[case]
    mask = torch.ones(2, length, dtype=torch.int64)
    hide(mask)
    return tokens(2, length), mask, count(mask)


@torch.no_grad()
def read(model, cache, ids, mask, positions, sizes, seen=0):
    """Logits of a text that goes through a cache in pieces."""
    logits = []
    for size in sizes:
        piece, seen = slice(seen, seen + size), seen + size
        out = model(
            ids[:, piece],
            attention_mask=mask[:, :seen],
            position_ids=positions[:, piece],
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def at_once(model, ids, mask, positions):
    """Logits of one pass without a cache."""
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


def differ(model, ids, mask, positions):
    """That positions matter: counted from the last token, as if there were no gaps, logits are others."""
    plain = positions[:, -1:] - ids.shape[1] + 1 + torch.arange(ids.shape[1])
    others = at_once(model, ids, mask, plain - plain.min())
    return (others - at_once(model, ids, mask, positions))[mask.bool()].abs().max() > 0.05


@windows
@cases
@pytest.mark.parametrize(("name", "coded"), [*((name, False) for name in ROTARY), ("llama", True), ("cohere", True)])
def test_caches_equal_one_pass(name, coded, case, window):
    # In float64, so that rounding stays far from the edges between codes.
    model, given = compressed(name, window, coded).double(), text(case)
    exact = at_once(model, *given)
    assert case == "one row for all" or differ(model, *given)
    for sizes in PIECES:
        close(read(model, DynamicCache(config=model.config), *given, sizes), exact)
    if has_static(name):
        static = StaticCache(config=model.config, max_cache_len=32)
        close(read(model, static, *given, BY_STEPS), exact)


@windows
@pytest.mark.parametrize("share", ["2", "1-2", "2kv"])
def test_shared_latents(share, window):
    model, given = compressed("llama", window, share=share).double(), text("jumps and gaps")
    close(read(model, DynamicCache(config=model.config), *given, BY_STEPS), at_once(model, *given))


@torch.no_grad()
@coded
@windows
@pytest.mark.parametrize("name", ["llama", "cohere", "gemma3"])
@pytest.mark.parametrize("case", ["gaps", "padding behind", "jumps"])
def test_rows_that_are_chosen_and_repeated_keep_their_positions(case, name, window, coded):
    model, (ids, mask, positions) = compressed(name, window, coded).double(), text(case)
    exact, cache = at_once(model, ids, mask, positions), DynamicCache(config=model.config)
    read(model, cache, ids, mask, positions, [READ])

    def go_on(rows, sizes, seen):
        found = read(model, cache, ids[rows], mask[rows], positions[rows], sizes, seen)
        close(found, exact[rows, seen : seen + sum(sizes)])

    cache.batch_repeat_interleave(2)
    go_on([0, 0, 1, 1], [1, 1], READ)
    cache.reorder_cache(torch.tensor([2, 0, 3, 1]))
    go_on([1, 0, 1, 0], [1, 2], READ + 2)
    cache.batch_select_indices(torch.tensor([3, 0, 0]))
    go_on([0, 1, 1], [1, 2], READ + 5)


@torch.no_grad()
@windows
@pytest.mark.parametrize("case", ["gaps", "padding behind"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "cohere"])
def test_beams(name, case, window):
    """`generate` counts positions by the mask, with a cache and without one."""
    model, (ids, mask, _) = compressed(name, window), text(case, READ)
    for options in ({"num_beams": 3}, {"num_beams": 1}):
        cached = generate(model, ids, mask, 8, use_cache=True, **options)
        assert torch.equal(cached, generate(model, ids, mask, 8, use_cache=False, **options))
    # A row among others, whatever they are, generates what it does alone.
    for row in range(2):
        one = slice(row, row + 1)
        alone = generate(model, ids[one], mask[one], 8, num_beams=3)
        assert torch.equal(alone, generate(model, ids, mask, 8, num_beams=3)[one])


@torch.no_grad()
@windows
def test_static_beams(window):
    model, (ids, mask, positions) = compressed("llama", window), text("jumps and gaps")
    exact, cache = at_once(model, ids, mask, positions), StaticCache(config=model.config, max_cache_len=32)
    read(model, cache, ids, mask, positions, [READ])
    cache.reorder_cache(torch.tensor([1, 0]))
    swapped = ids[[1, 0]], mask[[1, 0]], positions[[1, 0]]
    close(read(model, cache, *swapped, [1, 1, 3], READ), exact[[1, 0], READ : READ + 5])
    cache.reset()
    close(read(model, cache, ids, mask, positions, IN_PIECES), exact)


@torch.no_grad()
@windows
def test_tokens_taken_back_take_their_positions_with_them(window):
    model, (ids, mask, positions) = compressed("llama", window), text("jumps and gaps")
    exact, cache = at_once(model, ids, mask, positions), DynamicCache(config=model.config)
    read(model, cache, ids, mask, positions, [READ])
    read(model, cache, ids, mask, positions + 17, [4], READ)  # a draft
    cache.crop(-4)
    close(read(model, cache, ids, mask, positions, [1, 4, 3], READ), exact[:, READ:])


@torch.no_grad()
@coded
@windows
@cases
@pytest.mark.parametrize("name", ["llama", "llama-yarn", "phi3-partial", "mistral-sliding"])
def test_chunks_of_keys(name, case, window, coded, monkeypatch):
    model, given, calls = compressed(name, window, coded).double(), text(case), []
    exact, plain = at_once(model, *given), chunked.attend_far
    monkeypatch.setattr(chunked, "CHUNK", 7)
    monkeypatch.setattr(chunked, "QUERY_BLOCK", 4)
    monkeypatch.setattr(chunked, "attend_far", lambda *a, **k: calls.append(1) or plain(*a, **k))
    seen = given[1].bool()
    # A query that sees nothing gives what no one reads, and not the same in every way to attend.
    close(at_once(model, *given)[seen], exact[seen])
    close(read(model, DynamicCache(config=model.config), *given, IN_PIECES)[seen], exact[seen])
    assert calls


@torch.no_grad()
@windows
@pytest.mark.parametrize("coded", [False, True], ids=["plain", "coded"])
def test_long_texts(coded, window):
    """Beyond what is attended to at once: the gap is in the first chunk, and the jump in the second."""
    length = chunked.CHUNK + 150
    model, ids = compressed("llama", window, coded, num_hidden_layers=1), tokens(1, length)
    model = model.double() if coded else model
    mask = torch.ones(1, length, dtype=torch.int64)
    mask[0, 700:720] = 0
    positions = counted(mask) + 50 * (torch.arange(length) > chunked.CHUNK + 20)
    calls, plain = [], chunked.attend_far
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "CHUNK", length)
        exact = at_once(model, ids, mask, positions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "attend_far", lambda *a, **k: calls.append(1) or plain(*a, **k))
        close(at_once(model, ids, mask, positions), exact)
        cache = DynamicCache(config=model.config)
        close(read(model, cache, ids, mask, positions, [length - 64, 1, 62, 1]), exact)
    assert calls


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@windows
@pytest.mark.parametrize("case", ["gaps", "jumps"])
@pytest.mark.parametrize("make", [DynamicCache, partial(StaticCache, max_cache_len=18)], ids=["dynamic", "static"])
def test_the_fused_kernel(make, case, window, monkeypatch):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = compressed("llama", window, num_hidden_layers=1).to(device)
    ids, mask, positions = (x.to(device) for x in text(case))
    exact, calls = at_once(model, ids, mask, positions), []
    plain = decoding.DECODE_BACKENDS["triton"]
    monkeypatch.setitem(decoding.DECODE_BACKENDS, "triton", lambda step: calls.append(1) or plain(step))
    before = kernels.use("triton")
    try:
        found = read(model, make(config=model.config), ids, mask, positions, [READ, 1])
    finally:
        kernels.use(before)
    close(found, exact[:, : READ + 1])
    assert len(calls) == len(eigen_layers(model))
