"""Whole models that decode by a fused kernel against those that do without.

Triton's is interpreted where there is no GPU; the native one is for CPUs.
"""

import inspect
from importlib.util import find_spec

import pytest
import torch
from helpers import windows
from tiny import TINY, compressed, tiny, tokens
from torch._dynamo.backends.debugging import aot_eager
from transformers import DynamicCache, StaticCache

from eigenattn import EigenAttnError, kernels
from eigenattn.kernels import decoding, selection
from eigenattn.kernels.decoding import batched
from eigenattn.kernels.native_library import unavailable
from eigenattn.models import maps
from eigenattn.models.conversion import convert_attention, eigen_layers

without_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
without_compiler = pytest.mark.skipif(unavailable() is not None, reason=f"no native kernels: {unavailable()}")
KERNELS = [pytest.param("triton", marks=without_triton)]
if not torch.cuda.is_available():
    KERNELS.append(pytest.param("native", marks=without_compiler))

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ONE, TWO = {"num_hidden_layers": 1}, {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
# Rotary positions of every kind, ALiBi as families pass it, none, norms, soft caps, and layers that slide: interpreting
# takes time, so each meets what it may not get along with.
DYNAMIC = [("llama", 0), ("llama-yarn", 6), ("stablelm", 6), ("gpt_neox", 0), ("cohere-norm", 6), ("gemma2", 6)]
DYNAMIC += [("gemma3", 0), ("mistral-sliding", 0), ("mistral-sliding", 6), ("opt", 0), ("opt", 6), ("mpt", 6)]
DYNAMIC += [("bloom", 0), ("falcon-alibi", 6)]


@pytest.fixture(params=KERNELS)
def fused(monkeypatch, request):
    """Decode by a fused kernel, and count how often."""
    calls, name = [], request.param
    plain = decoding.DECODE_BACKENDS[name]
    monkeypatch.setitem(decoding.DECODE_BACKENDS, name, lambda step: calls.append(1) or plain(step))
    before = kernels.use(name)
    yield calls
    kernels.use(before)


def small(name, window, coded=False, share="1"):
    layers = ONE if "layer_types" not in TINY[name][1] else TWO
    return compressed(name, window, coded, share, **layers).to(DEVICE)


@torch.no_grad()
def decoded(model, cache, mask=None, length=14):
    """Logits of a step of decoding, after a prompt that nothing but PyTorch reads."""
    ids = tokens(1 if mask is None else len(mask), length + 1).to(DEVICE)
    for start, stop in ((0, length), (length, length + 1)):
        options = {"past_key_values": cache, "use_cache": True}
        if mask is not None:
            options["attention_mask"] = mask[:, :stop].to(DEVICE)
            if "position_ids" in inspect.signature(model.forward).parameters:
                options["position_ids"] = (options["attention_mask"].cumsum(-1) - 1).clamp_min(0)[:, start:]
        logits = model(ids[:, start:stop], **options).logits
    return logits


def compare(model, calls, make_cache, **options):
    found = decoded(model, make_cache(), **options)
    assert len(calls) == len(eigen_layers(model))
    kernels.use("torch")
    expected = decoded(model, make_cache(), **options)
    assert len(calls) == len(eigen_layers(model))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


def dynamic(model):
    return lambda: DynamicCache(config=model.config)


def static(model):
    return lambda: StaticCache(config=model.config, max_cache_len=20)


@pytest.mark.parametrize(("name", "window"), DYNAMIC)
def test_dynamic_caches(name, window, fused):
    model = small(name, window)
    compare(model, fused, dynamic(model))


@pytest.mark.parametrize(("name", "window"), [("llama", 0), ("llama", 6), ("opt", 6), ("mpt", 0), ("qwen2-sliding", 6)])
def test_static_caches(name, window, fused):
    model = small(name, window)
    compare(model, fused, static(model))


@windows
@pytest.mark.parametrize("name", ["llama", "mpt"])
def test_quantised_latents_go_to_the_kernel_packed(name, window, fused, monkeypatch):
    model, unpacked = small(name, window, coded=True), []
    for module, name_of in ((maps, "levels_of"), (batched, "_restored")):
        plain = getattr(module, name_of)
        monkeypatch.setattr(module, name_of, lambda *a, plain=plain: unpacked.append(1) or plain(*a))
    compare(model, fused, dynamic(model))
    assert len(unpacked) == 3 * 2  # keys and values: of the prompt once, and then of all without the kernel


@pytest.mark.parametrize("share", ["2", "1-2", "1kv", "2kv"])
@pytest.mark.parametrize(("name", "window", "coded"), [("llama", 6, True), ("llama", 0, False), ("opt", 6, False)])
def test_latents_that_are_shared(name, window, coded, share, fused):
    model = small(name, window, coded, share)
    compare(model, fused, dynamic(model))


@pytest.mark.parametrize("make_cache", [dynamic, static])
@pytest.mark.parametrize(("name", "window"), [("llama", 6), ("llama", 0), ("mpt", 6)])
def test_left_padding(name, window, make_cache, fused):
    model, mask = small(name, window), torch.ones(2, 15, dtype=torch.int64)
    mask[1, :5] = 0
    compare(model, fused, make_cache(model), mask=mask)


@pytest.mark.parametrize("share", ["1", "1kv"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_one_graph_with_a_static_cache(kernel, share, monkeypatch):
    """The kernel is an operator in the graph, which does not break there."""
    model, ids = small("llama", 6, share=share), tokens(1, 16).to(DEVICE)
    monkeypatch.setattr(selection, "_chosen", kernel)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    cache = static(model)()
    with torch.no_grad():
        exact = model(ids).logits[:, 14:]
        model(ids[:, :14], past_key_values=cache)
        steps = [compiled(ids[:, i : i + 1], past_key_values=cache).logits for i in (14, 15)]
    torch.testing.assert_close(torch.cat(steps, 1), exact, rtol=0, atol=2e-4)
    operator = {"triton": "decode_over_latents", "native": "decode_natively"}[kernel]
    assert len(graphs) == 1 and f"eigenattn.{operator}" in graphs[0].code


def test_changed_weights_are_seen(fused):
    """What follows from weights is kept between steps, and no longer than it is true."""
    model = small("llama", 6, coded=True)
    before = decoded(model, dynamic(model)())
    with torch.no_grad():
        eigen_layers(model)[0].value_levels.mul_(1.5)
    after = decoded(model, dynamic(model)())
    kernels.use("torch")
    torch.testing.assert_close(after, decoded(model, dynamic(model)()), rtol=0, atol=2e-4)
    assert (after - before).abs().max() > 1e-2


def test_what_the_kernel_cannot_serve_is_left_to_pytorch(fused):
    model, ids = small("llama", 6), tokens(1, 8).to(DEVICE)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    model(ids[:, :1], past_key_values=cache).logits.sum().backward()
    decoded(model.double(), dynamic(model)())
    assert not fused


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in TINY if not name.startswith("mpt")])  # see its note
def test_weights_are_still_given(name, fused):
    model, ids = tiny(name, attn_implementation="eager"), tokens(1, 8).to(DEVICE)
    convert_attention(model.to(DEVICE))
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, use_cache=True)
    found = model(ids[:, :1], past_key_values=cache, use_cache=True, output_attentions=True)
    assert found.attentions[-1].shape == (1, 4, 1, 9)
    assert not fused


def test_kernels_are_chosen_by_name(monkeypatch):
    assert kernels.use("torch") == "auto"
    assert kernels.use("auto") == "torch"
    with pytest.raises(EigenAttnError, match="unknown kernels 'fast'"):
        kernels.use("fast")
    monkeypatch.setattr(selection, "_chosen", "fast")
    with pytest.raises(EigenAttnError, match="unknown kernels 'fast'"):
        decoded(small("llama", 6), DynamicCache())
    monkeypatch.setattr(selection, "HAS_TRITON", False)
    with pytest.raises(EigenAttnError, match="need triton"):
        kernels.use("triton")
