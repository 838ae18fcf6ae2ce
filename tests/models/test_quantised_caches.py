"""transformers' own quantised caches: they hold plain latents where their groups fit, and say what else to do."""

import pytest
import torch
from helpers import skip_without
from tiny import quantised_model, random_basis, tiny, tokens
from transformers import QuantizedCache
from transformers.cache_utils import Cache, QuantizedLayer

from eigenattn import EigenAttnError
from eigenattn.compression.folding import compress_layer
from eigenattn.models.conversion import convert_attention, eigen_layers

RANK_K, RANK_V = 12, 8


class StandInQuantizedLayer(QuantizedLayer):
    """A backend without a package: 8 bits for each tensor, in groups that must fit."""

    def _quantize(self, tensor, axis):
        assert tensor[0].numel() % self.q_group_size == 0
        scale = tensor.abs().max() / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, q_tensor):
        return q_tensor[0] * q_tensor[1]


def small(window):
    model = tiny("llama")
    convert_attention(model)
    for index, attention in enumerate(eigen_layers(model)):
        keys = random_basis(attention, RANK_K, True, index)
        compress_layer(attention, keys, random_basis(attention, RANK_V, True, 9), window)
    return model


def stand_in(model, group):
    layers = [StandInQuantizedLayer(q_group_size=group, residual_length=4) for _ in eigen_layers(model)]
    return Cache(layers=layers)


def backend(name, model, **options):
    skip_without(name)
    if name == "fp8":
        return QuantizedCache(backend=name, config=model.config)
    axis = {"axis_key": 1, "axis_value": 1} if name == "hqq" else {}
    return QuantizedCache(backend=name, config=model.config, residual_length=4, **axis, **options)


@torch.no_grad()
def relative_error(model, cache):
    ids = tokens(2, 37)
    exact = model(ids, use_cache=False).logits
    pieces = [(0, 30), *((i, i + 1) for i in range(30, 37))]
    found = torch.cat([model(ids[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in pieces], 1)
    return float((found - exact)[:, 30:].abs().mean() / exact.std())


def test_latents_are_held_where_groups_fit():
    model = small(0)
    assert relative_error(model, stand_in(model, 8)) < 0.1


@pytest.mark.parametrize("name", ["fp8", "quanto", "hqq"])
def test_every_backend_holds_latents(name):
    model = small(0)
    assert relative_error(model, backend(name, model, q_group_size=8)) < 0.2


def test_groups_that_do_not_fit_say_which_would():
    model = small(0)
    with pytest.raises(EigenAttnError, match=r"24 and 16: .*such as 8, or compress with bits_per_element"):
        relative_error(model, stand_in(model, 64))


def test_beside_a_window_ours_is_named():
    model = small(6)
    with pytest.raises(EigenAttnError, match=r"exact window.*bits_per_element"):
        relative_error(model, stand_in(model, 8))


def test_codes_are_not_quantised_again():
    model = quantised_model(window=0, dtype=torch.float32)
    with pytest.raises(EigenAttnError, match="quantised already"):
        relative_error(model, stand_in(model, 1))
