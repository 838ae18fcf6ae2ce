"""Quantised latents: the same with a cache and without, in bytes that were planned, through files and graphs.

Models are in float64: rounding noise of shapes and orders then stays far from the edges between codes.
"""

from dataclasses import replace
from functools import partial

import helpers
import pytest
import torch
from helpers import LENGTH, WINDOW, generate, has_static, in_pieces, windows
from tiny import TINY, WIDTHS_K, WIDTHS_V, compressed, converted, quantised_basis, quantised_model, tiny, tokens
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache

import eigenattn
from eigenattn import EigenAttnError
from eigenattn.cache.codebook import Codebook
from eigenattn.cache.layout import Layout
from eigenattn.cache.packing import Widths, unpack
from eigenattn.cache.size import allocated_bytes, bytes_per_token, cache_bytes
from eigenattn.compression.folding import compress_layer, detach
from eigenattn.models.bases_file import save_bases
from eigenattn.models.checkpoint_format import EigenAttnCheckpointConfig, mark_compressed
from eigenattn.models.conversion import eigen_layers, layouts_of
from eigenattn.models.maps import QUANTISERS

# Of a model with one layer of two KV heads.
ONE_LAYER, ORIGINALS = LlamaConfig(num_hidden_layers=1), [Layout.full(2, 16)]
NAMES = [name for name in TINY if name not in ("mixtral", "qwen3_moe")]  # their experts know no float64
close, write = partial(helpers.close, tolerance=1e-5), partial(generate, length=16)


def without_codes(model):
    """Let a model's latents be plain."""
    for attention in eigen_layers(model):
        plain = tuple(replace(latent, widths=None) for latent in attention.layout.latents)
        attention.layout = replace(attention.layout, latents=plain)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "window"), [*((name, WINDOW) for name in NAMES), ("llama", 0), ("opt", 0), ("mpt", 0)]
)
def test_cached_equals_uncached(name, window):
    model, ids = quantised_model(name, window), tokens(2, LENGTH)
    exact = model(ids, use_cache=False).logits
    close(in_pieces(model, ids, DynamicCache(config=model.config), [1] * LENGTH), exact)
    close(in_pieces(model, ids, DynamicCache(config=model.config), [13, 1, 16]), exact)
    if has_static(name):
        close(in_pieces(model, ids, StaticCache(config=model.config, max_cache_len=48), [20] + [1] * 10), exact)
    without_codes(model)
    assert (model(ids, use_cache=False).logits - exact).abs().max() > 1e-2  # the quantisers do something


@torch.no_grad()
@windows
@pytest.mark.parametrize("name", ["llama", "mpt"])
def test_the_cache_holds_codes_of_the_latents(name, window):
    model, ids = quantised_model(name, window), tokens(2, LENGTH)
    attention, seen = eigen_layers(model)[0], []
    attention.observer = lambda layer, heads, this: seen.append(heads)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, use_cache=True)
    held = cache.layers[0]
    latents = attention.encode(seen[0].key, seen[0].value)
    for rows, z, side, widths in (
        (held.keys, latents[0], "key", WIDTHS_K),
        (held.values, latents[1], "value", WIDTHS_V),
    ):
        far = LENGTH - window
        assert rows.dtype == torch.uint8
        assert rows.shape == (2, attention.kv_heads, far, widths.bytes)
        codebook = Codebook.of(getattr(attention, f"{side}_levels").view(attention.kv_heads, -1, 4), widths)
        assert torch.equal(unpack(rows, widths), codebook.quantise(z[:, :, :far]))
        found = attention.restored((held.keys, held.values), torch.float64)[side == "value"]
        close(found, codebook.dequantise(unpack(rows, widths)).double())


@torch.no_grad()
@windows
@pytest.mark.parametrize("length", [1, 6, 7, 71, 72])
def test_bytes_are_those_planned(window, length):
    model = quantised_model(window=window)
    cache = DynamicCache(config=model.config)
    for piece in tokens(2, length).tensor_split([length - 1], dim=1):
        if piece.shape[1]:
            model(piece, past_key_values=cache)
    assert allocated_bytes(cache) == 2 * cache_bytes(layouts_of(model), 8, length)
    each = (3, 1 + 1, 1, 1 + 1, 1), (2, 1, 2, 1)  # by width, 6 and 3 bits in two planes each
    assert bytes_per_token(layouts_of(model), 8) == 3 * 2 * sum(map(sum, each))


@torch.no_grad()
@windows
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_generate(name, window):
    model, long, short = quantised_model(name, window), tokens(1, 20), tokens(1, 9, seed=4)
    alone = write(model, long)
    assert torch.equal(alone, write(model, long, use_cache=False))
    assert torch.equal(alone, write(model, long, prefill_chunk_size=4))
    assert torch.equal(alone, write(model, long, prompt_lookup_num_tokens=3))
    assert torch.equal(alone, write(model, long, cache_implementation="static", disable_compile=True))
    assert torch.equal(write(model, long, num_beams=3), write(model, long, num_beams=3, use_cache=False))
    room = torch.zeros(1, 11, dtype=torch.int64)
    ids = torch.cat([long, torch.cat([room, short], 1)])
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    both = write(model, ids, mask)
    assert torch.equal(both[0], alone[0])
    assert torch.equal(both[1, 20:], write(model, short)[0, 9:])


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_cropping_what_the_last_update_brought_is_exact(name):
    model, ids = quantised_model(name), tokens(1, 40)
    exact = model(ids).logits
    cache = DynamicCache(config=model.config)
    model(ids[:, :20], past_key_values=cache)
    model(tokens(1, 18, seed=5), past_key_values=cache)
    cache.crop(-18)
    close(model(ids[:, 20:], past_key_values=cache).logits, exact[:, 20:])


@torch.no_grad()
@pytest.mark.parametrize("quantiser", [False, True])
def test_batches_of_a_cache_change_and_move(quantiser):
    """What beams, contrastive search and offloading do to a cache between two passes."""
    model, ids = quantised_model(), tokens(2, LENGTH)
    if not quantiser:
        without_codes(model)
    exact = model(ids).logits[:, 20:]
    cache = DynamicCache(config=model.config)
    model(ids[:, :20], past_key_values=cache)
    cache.batch_repeat_interleave(2)  # rows 0, 0, 1, 1
    cache.reorder_cache(torch.tensor([2, 0, 3, 1]))
    cache.batch_select_indices(torch.tensor([1, 2]))  # rows 0, 1
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    close(model(ids[:, 20:], past_key_values=cache).logits, exact)


@torch.no_grad()
@windows
def test_one_graph_with_a_static_cache(window):
    model, ids = quantised_model(window=window), tokens(1, 10)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    exact = model(ids).logits
    cache = StaticCache(config=model.config, max_cache_len=16)
    logits = [model(ids[:, :6], past_key_values=cache).logits]
    for i in range(6, 10):
        logits.append(compiled(ids[:, i : i + 1], past_key_values=cache).logits)
    close(torch.cat(logits, 1), exact)


@torch.no_grad()
def test_many_bits_at_full_rank_are_nearly_the_original():
    ids, errors = tokens(2, LENGTH), []
    exact = tiny("llama")(ids).logits
    for full in (Widths.of({bits: 16}) for bits in (8, 6, 4, 3, 2, 1)):
        model = quantised_model(widths_k=full, widths_v=full)
        for attention in eigen_layers(model):
            for name in QUANTISERS:
                getattr(attention, name).mul_(3)  # wide enough to clip hardly anything
        errors.append(float((model(ids).logits - exact).abs().mean() / exact.std()))
    assert errors[0] < 0.1
    assert errors[0] < errors[1] / 2 < errors[2] / 4 < errors[4] / 8, errors
    assert errors == sorted(errors), errors


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    ids = tokens(2, LENGTH)
    exact, half = quantised_model()(ids).logits, quantised_model(dtype=dtype)
    cached = in_pieces(half, ids, DynamicCache(config=half.config), [20] + [1] * 10)
    assert cached.dtype == dtype
    assert (cached - exact).abs().mean() < 0.15 * exact.std()


def marked(model, window):
    layers = [layout.to_dict() for layout in layouts_of(model)]
    mark_compressed(model, EigenAttnCheckpointConfig(layers, True, {"window": window}))
    return model


@torch.no_grad()
@windows
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_save_and_load(name, window, tmp_path):
    model, ids = marked(quantised_model(name, window), window), tokens(2, LENGTH)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert layouts_of(again) == layouts_of(model)
    assert [latent.widths for latent in layouts_of(again)[0].latents] == [WIDTHS_K, WIDTHS_V]
    assert torch.equal(again(ids).logits, model(ids).logits)


@torch.no_grad()
def test_bases_alone(tmp_path):
    model, ids = marked(quantised_model(), WINDOW), tokens(2, LENGTH)
    save_bases(model, tmp_path)
    again = eigenattn.attach(tiny("llama").double(), tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "layer",
    [
        {"rank_k": 4, "rank_v": 4, "widths_k": [1, 1, 1, 0], "widths_v": [4, 0, 0, 0]},
        {"rank_k": 4, "rank_v": 4, "widths_k": [4, 0], "widths_v": [4, 0, 0, 0]},
        {"rank_k": 4, "rank_v": 4, "widths_k": [5, -1, 0, 0], "widths_v": [4, 0, 0, 0]},
        {"rank_k": 4, "rank_v": 4, "widths_k": "4000", "widths_v": [4, 0, 0, 0]},
    ],
)
def test_malformed_widths_are_refused(layer):
    with pytest.raises(EigenAttnError, match="widths"):
        EigenAttnCheckpointConfig([layer], format_version=1).layouts(ONE_LAYER, ORIGINALS)


@torch.no_grad()
@windows
@pytest.mark.parametrize("side", ["key", "value"])
def test_one_side_coded_beside_a_plain_one(side, window):
    sizes = (WIDTHS_K, 8) if side == "key" else (12, WIDTHS_V)
    model, ids = compressed("llama", window, sizes=sizes).double(), tokens(2, LENGTH)
    exact, cache = model(ids, use_cache=False).logits, DynamicCache(config=model.config)
    close(in_pieces(model, ids, cache, [13, 1, 16]), exact)
    rows = cache.layers[0].keys, cache.layers[0].values
    assert [row.dtype == torch.uint8 for row in rows] == [side == "key", side == "value"]


def test_gradients_pass_the_quantisers():
    model, ids = quantised_model(), tokens(1, LENGTH)
    attention = eigen_layers(model)[1]
    model(ids, use_cache=False).logits.square().sum().backward()
    assert attention.key_encoder.grad.abs().sum() > 0
    assert attention.value_encoder.grad.abs().sum() > 0


def test_detaching_forgets_the_quantisers():
    exact = tiny("llama")(tokens(1, LENGTH)).logits
    model, layers = converted("llama")
    for attention in layers:
        compress_layer(attention, [quantised_basis(attention, WIDTHS_K, True)], WINDOW)
        detach(attention)
    assert torch.equal(model(tokens(1, LENGTH)).logits, exact)
