"""Gradients of far keys and values against autograd through the path that attends with an exact window."""

import pytest
import torch
import torch.nn.functional as F
from every_type import built
from tiny import converted, tokens

from eigenattn.calibration import attention_moments, gradients
from eigenattn.calibration.gradients import backward
from eigenattn.calibration.statistics import Batch
from eigenattn.compression.folding import attach, detach
from eigenattn.errors import EigenAttnError
from eigenattn.models.conversion import convert_attention, eigen_layers

NAMES = ["llama", "llama-yarn", "phi3-partial", "qwen3", "opt", "mpt", "bloom", "mistral-sliding", "gemma2", "gpt_neox"]
NAMES += ["deepseek_v3"]  # whose values are keys
# Output gates and layers without attention, sinks, layers that read another one's cache, of sizes by layer, norms
# behind rotation, a norm on the output, and rotary positions in some layers only.
TYPES = ["qwen3_next", "gpt_oss", "gemma3n_text", "gemma4_text", "hunyuan_v1_dense", "bitnet", "llama4_text", "lfm3"]
LENGTH, WINDOW, SEED = 13, 4, 3


def watched(monkeypatch, model, layers, batch, window):
    """Gradients by layer, and the tokens that were drawn."""
    found, drawn, plain = {}, [], gradients.drawn_of
    monkeypatch.setattr(gradients, "drawn_of", lambda *args: drawn.append(plain(*args)) or drawn[-1])
    backward(model, layers, batch, window, SEED, lambda a, vectors, grads: found.update({a.layer_idx: grads}))
    monkeypatch.undo()
    return found, drawn[0]


def by_autograd(model, attention, batch, drawn, window):
    """The same loss's gradients at what is added to a layer's far keys and values, or to what is both."""
    b, t = batch.input_ids.shape
    latents = len(attention.layout.latents)
    shape = (b, attention.kv_heads, t, attention.head_dim)
    keys, values = (torch.zeros(shape, requires_grad=True) for _ in range(2))
    attach(attention, (), window)
    attention.rounded = lambda k, v: (k + keys[:, :, : k.shape[2]], v + values[:, :, : v.shape[2]])[:latents]
    try:
        logits = model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits.float()
        logits = logits.flatten(0, 1) if batch.valid is None else logits[batch.valid]
        F.cross_entropy(logits, drawn, reduction="sum").backward()
    finally:
        del attention.rounded
        detach(attention)
    return (keys.grad, values.grad)[:latents]


def test_gradients_in_half_precision_are_nearly_those_in_full(monkeypatch):
    drawn = tokens(1, 2 * LENGTH)[0]
    monkeypatch.setattr(gradients, "drawn_of", lambda predictions, seed: drawn)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, layers = converted("llama")
        model.to(dtype)
        backward(
            model,
            layers,
            Batch(tokens(2, LENGTH)),
            WINDOW,
            SEED,
            lambda a, vectors, grads, dtype=dtype: found.setdefault(dtype, []).extend(grads),
        )
    for exact, rounded in zip(*found.values(), strict=True):
        assert rounded.dtype == torch.float32
        assert 0 < (rounded - exact).norm() < 0.12 * exact.norm()  # 0.05 to 0.08, of which products here add none


@pytest.mark.parametrize("blocks", [256, 5])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_autograd(monkeypatch, name, blocks):
    model, layers = converted(name)
    batch = Batch(tokens(2, LENGTH))
    monkeypatch.setattr(attention_moments, "QUERY_BLOCK", blocks)
    found, drawn = watched(monkeypatch, model, layers, batch, WINDOW)
    for attention in layers:
        every = by_autograd(model, attention, batch, drawn, WINDOW)
        for own, expected in zip(found[attention.layer_idx][: len(every)], every, strict=True):
            assert expected.abs().max() > 0
            assert torch.allclose(own, expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("name", TYPES)
def test_gradients_of_other_types_are_those_of_autograd(monkeypatch, name):
    try:
        model = built(name).double()
    except (KeyError, ValueError) as error:
        pytest.skip(f"this transformers has no {name}: {error}")
    convert_attention(model)
    layers = eigen_layers(model)
    batch = Batch(tokens(2, LENGTH))
    found, drawn = watched(monkeypatch, model, layers, batch, WINDOW)
    assert len(found) == len(layers)
    for attention in layers:
        for own, expected in zip(
            found[attention.layer_idx], by_autograd(model, attention, batch, drawn, WINDOW), strict=True
        ):
            assert expected.abs().max() > 0
            assert torch.allclose(own.double(), expected.double(), atol=1e-4 * expected.abs().max().item(), rtol=1e-3)


def test_padding_counts_for_nothing(monkeypatch):
    model, layers = converted("llama")
    ids = tokens(1, LENGTH)
    alone, drawn = watched(monkeypatch, model, layers, Batch(ids), WINDOW)
    mask = torch.cat([torch.zeros(1, 3), torch.ones(1, LENGTH)], dim=1).long()
    padded = Batch(torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1), mask)
    beside, same = watched(monkeypatch, model, layers, padded, WINDOW)
    assert torch.equal(drawn, same)
    for index, pair in alone.items():
        for one, other in zip(pair, beside[index], strict=True):
            assert torch.allclose(one, other[:, :, 3:], atol=1e-4, rtol=1e-3)
            assert not other[:, :, :3].any()


def test_weights_keep_whether_they_are_trained():
    model, layers = converted("llama")
    trained = [each.requires_grad for each in model.parameters()]
    backward(model, layers, Batch(tokens(1, LENGTH)), WINDOW, SEED, lambda *_: None)
    assert [each.requires_grad for each in model.parameters()] == trained
    assert all(each.grad is None for each in model.parameters())
    assert all(attention.observer is None for attention in layers)


def test_a_model_without_a_head_is_refused():
    model, layers = converted("llama")
    with pytest.raises(EigenAttnError, match="language head"):
        backward(model.model, layers, Batch(tokens(1, LENGTH)), WINDOW, SEED, lambda *_: None)
