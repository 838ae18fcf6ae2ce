"""Measured costs against the same thing done the long way: truncate, run the whole model, compare."""

import pytest
import torch
from tiny import random_basis, tiny, tokens

from eigenattn.calibration.statistics import Batch
from eigenattn.compression import measure
from eigenattn.compression.basis import truncated as truncated_bases
from eigenattn.compression.folding import attach, detach
from eigenattn.compression.measure import Measurement
from eigenattn.models.conversion import convert_attention, eigen_layers
from eigenattn.progress import TokenProgress

FULL = (16, 16)


def measurement(name, window, mask=None):
    model, ids = tiny(name), tokens(2, 24)
    convert_attention(model)
    layers = eigen_layers(model)
    bases = [
        tuple(random_basis(a, 16, True, i + seed, (side,)) for side, seed in (("key", 0), ("value", 50)))
        for i, a in enumerate(layers)
    ]
    batches = [Batch(ids, mask), Batch(tokens(1, 30, seed=7))]
    return model, layers, bases, Measurement(model, layers, bases, window, batches, TokenProgress(False))


def truncated(layers, bases, ranks, window):
    for attention, chosen in zip(layers, truncated_bases(bases, ranks), strict=True):
        attach(attention, chosen, window)


@torch.no_grad()
def divergence(model, layers, bases, ranks, window, batches):
    """Mean KL divergence at the judged positions, by two whole passes."""
    total = count = 0
    for batch in batches:
        for attention in layers:
            detach(attention)
        exact = model(batch.input_ids).logits[:, :: measure.JUDGED_STRIDE].log_softmax(-1)
        truncated(layers, bases, ranks, window)
        changed = model(batch.input_ids).logits[:, :: measure.JUDGED_STRIDE].log_softmax(-1)
        total += (exact.exp() * (exact - changed)).sum().item()
        count += exact.shape[0] * exact.shape[1]
    for attention in layers:
        detach(attention)
    return total / count


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("name", ["llama", "opt", "gemma3", "bloom"])
def test_divergences_are_those_of_whole_passes(name, window):
    model, layers, bases, costs = measurement(name, window)
    trials = [[(6, 16), (16, 6)], [(4, 12)], [(16, 16), (2, 2)]]
    found = costs.divergences(trials)
    for index, (pairs, values) in enumerate(zip(trials, found, strict=True)):
        for pair, value in zip(pairs, values, strict=True):
            ranks = [FULL] * 3
            ranks[index] = pair
            expected = divergence(model, layers, bases, ranks, window, costs.batches)
            assert value == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_nothing_truncated_costs_nothing_and_nothing_is_left_behind():
    model, layers, _, costs = measurement("llama", 5)
    exact = model(tokens(1, 20)).logits
    for (value,) in costs.divergences([[FULL]] * 3):
        assert value == pytest.approx(0, abs=1e-6)
    costs.divergences([[(4, 4)]] * 3)
    costs.layer_errors([[(8, 8)]] * 3)
    assert torch.equal(model(tokens(1, 20)).logits, exact)
    assert all("forward" not in vars(layer) for layer in costs.blocks.all)
    assert all(attention.layout.uncompressed and attention.layout.window == 0 for attention in layers)


def test_rounding_in_half_precision_is_no_cost():
    model, _, _, costs = measurement("llama", 5)
    model.bfloat16()
    (at_full_rank,), (truncated,), _ = costs.divergences([[FULL], [(4, 4)], [FULL]])
    assert at_full_rank == 0 < truncated
    costs.window = 0  # where nothing is taken off, for full rank takes the original's path
    assert costs.divergences([[FULL], [], []])[0][0] == pytest.approx(0, abs=1e-6)


def test_padding_is_not_judged():
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[1, 12:] = 0
    _, _, _, costs = measurement("llama", 0, mask)
    costs.batches = costs.batches[:1]
    padded = costs.divergences([[(4, 4)], [], []])[0][0]
    costs.batches = [Batch(costs.batches[0].input_ids[:1]), Batch(costs.batches[0].input_ids[1:, :12])]
    alone = costs.divergences([[(4, 4)], [], []])[0][0]
    assert padded == pytest.approx(alone, rel=1e-3)


@torch.no_grad()
def test_layer_errors_are_those_of_the_layer_alone():
    model, layers, bases, costs = measurement("llama", 0)
    costs.batches = costs.batches[:1]
    found = costs.layer_errors([[(8, 8)], [(4, 16), FULL], [(16, 2)]])
    states = model.model(costs.batches[0].input_ids, output_hidden_states=True).hidden_states
    ids = costs.batches[0].input_ids
    positions = torch.arange(ids.shape[1])[None]
    angles = model.model.rotary_emb(states[0], positions)

    def run():
        return model.model.layers[1](states[1], position_ids=positions, position_embeddings=angles)

    exact = run()
    attach(layers[1], [bases[1][0].truncate(4)])
    expected = float((run() - exact).norm() / exact.norm())
    assert found[1] == [pytest.approx(expected, rel=1e-4), 0.0]
