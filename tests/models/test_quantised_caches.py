"""transformers' own quantised caches: they hold plain latents where their groups fit, and say what else to do."""

import pytest
import torch
from helpers import skip_without
from tiny import compressed, quantised_model, tokens
from transformers import QuantizedCache
from transformers.cache_utils import Cache, QuantizedLayer

from eigenattn import EigenAttnError
from eigenattn.models.conversion import eigen_layers


class StandInQuantizedLayer(QuantizedLayer):
    """A backend without a package: 8 bits for each tensor, in groups that must fit."""

    def _quantize(self, tensor, axis):
        assert tensor[0].numel() % self.q_group_size == 0
        scale = tensor.abs().max() / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, q_tensor):
        return q_tensor[0] * q_tensor[1]


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
    model = compressed("llama", 0)
    assert relative_error(model, stand_in(model, 8)) < 0.1


@pytest.mark.parametrize("name", ["fp8", "quanto", "hqq"])
def test_every_backend_holds_latents(name):
    model = compressed("llama", 0)
    assert relative_error(model, backend(name, model, q_group_size=8)) < 0.2


def test_groups_that_do_not_fit_say_which_would():
    model = compressed("llama", 0)
    with pytest.raises(EigenAttnError, match=r"24 and 16: .*such as 8, or compress with coded latents"):
        relative_error(model, stand_in(model, 64))


def test_beside_a_window_ours_is_named():
    model = compressed("llama", 6)
    with pytest.raises(EigenAttnError, match=r"exact window.*coded latents"):
        relative_error(model, stand_in(model, 8))


def test_codes_are_not_quantised_again():
    model = quantised_model(window=0, dtype=torch.float32)
    with pytest.raises(EigenAttnError, match="coded already"):
        relative_error(model, stand_in(model, 1))


@pytest.mark.parametrize("share", ["1kv", "2kv"])
def test_latents_of_keys_and_values_together_are_refused(share):
    model = compressed("llama", 0, share=share)
    with pytest.raises(EigenAttnError, match="cannot hold latents that keys and values share"):
        relative_error(model, stand_in(model, 8))
