"""Masks that show queries what comes after them, as images in a prompt have them: near and far by the words of the
definition, over texts of every length."""

import itertools

import pytest
import torch
from helpers import WINDOW, close, in_pieces, windows
from tiny import compressed, converted, some_bases, tiny, tokens
from transformers import DynamicCache, StaticCache

from eigenattn.compression.folding import attach
from eigenattn.kernels import blocks, chunked
from eigenattn.models.attention import EigenAttention
from eigenattn.models.rotary import rotate

SHORT, BLOCKS, LONG = 30, blocks.QUERY_BLOCK + 50, chunked.CHUNK + 40
lengths = pytest.mark.parametrize("length", [SHORT, BLOCKS, LONG])


def full(length: int) -> torch.Tensor:
    """All see all."""
    return torch.ones(1, 1, length, length, dtype=torch.bool)


def image(length: int) -> torch.Tensor:
    """Read forwards, but for two images, whose tokens see each other."""
    mask = full(length).tril()
    for start, stop in ((2, 12), (length - 14, length - 1)):
        mask[..., start:stop, start:stop] = True
    return mask


def arbitrary(length: int) -> torch.Tensor:
    """Anything, in each of two rows something else; every query sees itself."""
    mask = torch.rand(2, 1, length, length, generator=torch.Generator().manual_seed(0)) > 0.4
    return mask | torch.eye(length, dtype=torch.bool)


MASKS = {"full": full, "image": image, "arbitrary": arbitrary}
masks = pytest.mark.parametrize("kind", MASKS)
FORMS = "boolean", "additive"
CASES = [*itertools.product(("llama", "opt", "gemma2", "cohere"), FORMS, (SHORT, BLOCKS))]
CASES += [("llama", "boolean", LONG), ("opt", "additive", LONG)]


def additive(mask: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def by_definition(attention: EigenAttention, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The layer's output with all scores written out: token n is exact for query m if `n > m - W`, and else decoded."""
    length, window = hidden.shape[1], attention.layout.window
    q, k, v = attention.project(hidden)
    latents = attention.encode(k, v)
    k_hat, v_hat = attention.decode(latents[0], "key"), attention.decode(latents[1], "value")
    if attention.rotates:
        angles = attention.angles(hidden, torch.arange(length)[None])
        q, k, k_hat = (rotate(x, *angles, attention.family.interleaved) for x in (q, k, k_hat))
    k, v, k_hat, v_hat = (x.repeat_interleave(attention.num_key_value_groups, dim=1) for x in (k, v, k_hat, v_hat))
    m, n = torch.arange(length)[:, None], torch.arange(length)
    near = (n > m - window) & (window > 0)
    scores = torch.where(near, q @ k.mT, q @ k_hat.mT) * attention.scaling
    if attention.softcap is not None:
        scores = attention.softcap * torch.tanh(scores / attention.softcap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    out = (weights * near) @ v + (weights * ~near) @ v_hat
    return attention.output_projection(out.transpose(1, 2).flatten(2))


@torch.no_grad()
@windows
@masks
@pytest.mark.parametrize(("name", "form", "length"), CASES)
def test_against_the_definition(name, form, length, kind, window):
    _, (attention, *_) = converted(name)
    attach(attention, some_bases(attention), window)
    mask = MASKS[kind](length)
    hidden = torch.randn(len(mask), length, 64, generator=torch.Generator().manual_seed(0))
    options = {"attention_mask": mask if form == "boolean" else additive(mask)}
    positions = torch.arange(length)[None]
    if attention.rotates:
        options |= {"position_ids": positions, "position_embeddings": attention.angles(hidden, positions)}
    expected = by_definition(attention, hidden, mask)
    close(attention(hidden, **options)[0], expected)
    close(attention(hidden, past_key_values=DynamicCache(), **options)[0], expected)
    forwards = by_definition(attention, hidden, mask & full(length).tril())
    assert (forwards - expected).abs().max() > 1e-2  # the future counts


@torch.no_grad()
@lengths
@masks
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_without_a_window_it_is_the_model_s_own_mask(name, kind, length):
    """At full rank: what the original does with the mask."""
    if length == LONG and name == "opt":
        length = 500  # it has no more positions
    model, original = compressed(name, 0, sizes=(16, 16), num_hidden_layers=1), tiny(name, num_hidden_layers=1)
    mask = MASKS[kind](length)
    ids = tokens(len(mask), length)
    options = {"attention_mask": mask, "position_ids": torch.arange(length)[None]}  # OPT's own are of masks [B, T]
    expected = original(ids, use_cache=False, **options).logits
    close(model(ids, use_cache=False, **options).logits, expected)
    cache = DynamicCache(config=model.config)
    close(model(ids, past_key_values=cache, use_cache=True, **options).logits, expected)


def read(model, ids, mask, cache=None, sizes=(), room=0):
    """Logits of a text with this mask, without a cache, or in pieces through one with so many columns of room."""
    logits, start = [], 0
    for size in sizes or [ids.shape[1]]:
        stop = start + size
        seen = torch.nn.functional.pad(mask[..., start:stop, :stop], (0, max(room - stop, 0)))
        options = {"attention_mask": seen, "position_ids": torch.arange(start, stop)[None]}
        out = model(ids[:, start:stop], past_key_values=cache, use_cache=cache is not None, **options)
        logits.append(out.logits)
        start = stop
    return torch.cat(logits, dim=1)


@torch.no_grad()
@windows
@pytest.mark.parametrize("coded", [False, True], ids=["plain", "coded"])
@pytest.mark.parametrize("name", ["llama", "opt", "cohere"])
def test_images_through_caches(name, coded, window):
    """The first image comes with the first piece, the second with the last: nothing is seen before it came."""
    model, ids, mask = compressed(name, window, coded).double(), tokens(2, SHORT), image(SHORT)
    exact, pieces = read(model, ids, mask), [13, 1, 1, 15]
    dynamic, static = DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=36)
    close(read(model, ids, mask, dynamic, pieces), exact)
    close(read(model, ids, mask, static, pieces, room=36), exact)
    forwards = in_pieces(model, ids, DynamicCache(config=model.config), pieces)
    assert (forwards - exact).abs().max() > 1e-2


@torch.no_grad()
@windows
def test_an_image_in_a_long_text(window, monkeypatch):
    """What reads forwards is read in chunks, and a piece with an image at once."""
    model, ids, mask = compressed("llama", window), tokens(2, 60), image(60)
    exact = read(model, ids, mask)
    calls, plain = [], chunked.attend_far
    monkeypatch.setattr(chunked, "CHUNK", 7)
    monkeypatch.setattr(chunked, "QUERY_BLOCK", 5)
    monkeypatch.setattr(blocks, "QUERY_BLOCK", 5)
    monkeypatch.setattr(chunked, "attend_far", lambda *a, **k: calls.append(1) or plain(*a, **k))
    close(read(model, ids, mask), exact)
    assert not calls
    close(read(model, ids, mask, DynamicCache(config=model.config), [13, 20, 1, 26]), exact)
    assert len(calls) == 3  # the second piece, in each layer


@torch.no_grad()
def test_what_is_near_and_comes_later_is_exact():
    """A window over everything and a mask that shows everything: the original, whatever the bases."""
    model, original = compressed("llama", 40, sizes=(2, 2)), tiny("llama")
    ids = tokens(2, SHORT)
    expected = original(ids, attention_mask=full(SHORT)).logits
    close(model(ids, attention_mask=full(SHORT)).logits, expected)
    narrow = compressed("llama", WINDOW, sizes=(2, 2))
    assert (narrow(ids, attention_mask=full(SHORT)).logits - expected).abs().max() > 1e-2
