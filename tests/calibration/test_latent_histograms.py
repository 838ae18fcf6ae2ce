"""Histograms against attention written out pair by pair, and against the moments the bases are made of."""

import pytest
import torch
from tiny import random_basis, tiny, tokens

from eigenattn.cache.codebook import scale_codes, scales
from eigenattn.cache.layout import SIDES
from eigenattn.calibration.attention_moments import AttentionMoments
from eigenattn.calibration.latent_histograms import BINS, REACH, LatentHistograms, Map
from eigenattn.calibration.statistics import Batch, collect_moments
from eigenattn.compression.bases import attention as attention_basis
from eigenattn.config import Sharing
from eigenattn.models.conversion import convert_attention, eigen_layers

WINDOW = 4


def map_of(basis):
    """What a basis makes of vectors."""
    return Map(basis.encoder, basis.mean, basis.sides)


def collected(name, batches, window=WINDOW):
    model = tiny(name, attn_implementation="eager")
    convert_attention(model)
    layers = eigen_layers(model)
    maps = {
        a.layer_idx: [map_of(random_basis(a, 16, True, seed, (side,))) for side, seed in (("key", i), ("value", 9))]
        for i, a in enumerate(layers)
    }
    found = collect_moments(model, layers, batches, lambda a: LatentHistograms(maps[a.layer_idx], window))
    return model, layers, maps, found


def expected_weights(model, layer, batch, window=WINDOW):
    """First and second sums of attention from outside the window, [B, G, T], by the model's own eager weights."""
    weights = model(batch.input_ids, attention_mask=batch.attention_mask, output_attentions=True).attentions
    a = weights[layer.layer_idx].detach().double().tril(-window)
    if batch.valid is not None:
        a = a * batch.valid[:, None, :, None]
    a = a.unflatten(1, (layer.kv_heads, -1))
    return a.sum((2, 3)), a.square().sum((2, 3))


@pytest.mark.parametrize("name", ["llama", "mpt", "gemma2"])
def test_every_latent_is_in_its_bin_with_its_weight(name):
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, :7] = 0
    batches = [Batch(tokens(2, 20), mask), Batch(tokens(1, 26, seed=3))]
    model, layers, maps, found = collected(name, batches)
    layer, histograms = layers[1], found[1]
    seen = []
    layer.observer = lambda attention, heads, this: seen.append(heads)
    weights = [expected_weights(model, layer, batch) for batch in batches]
    for side, index, (encoder, mean, _) in zip(histograms.histograms, (0, 1), maps[1], strict=True):
        edges = side.scale[..., None] * torch.linspace(-REACH, REACH, BINS + 1, dtype=torch.float64).sinh()
        expected = torch.zeros(3, layer.kv_heads, 16, BINS, dtype=torch.float64)
        for heads, pair in zip(seen, weights, strict=True):
            z = (heads[1 + index].detach().double() - mean.unsqueeze(1)) @ encoder
            scale = scales(scale_codes(z)).double()
            z, weight = z / scale, pair[index] * scale.squeeze(-1).square()
            for g in range(layer.kv_heads):
                for r in range(16):
                    which = torch.searchsorted(edges[g, r], z[:, g, :, r].contiguous()) - 1
                    for power in range(3):
                        share = weight[:, g] * z[:, g, :, r] ** power
                        expected[power, g, r].index_add_(0, which.flatten(), share.flatten())
        torch.testing.assert_close(side.sums, expected, rtol=1e-3, atol=1e-3)
        total = sum(pair[index].sum((0, 2)) for pair in weights)
        torch.testing.assert_close(histograms.weights[index], total, rtol=1e-4, atol=0)


@torch.no_grad()
@pytest.mark.parametrize(("name", "shared"), [("llama", 1), ("opt", 2)])
def test_latents_of_both_sides_and_what_attention_sums_of_them(name, shared):
    model, batch = tiny(name, attn_implementation="eager"), Batch(tokens(2, 20))
    convert_attention(model)
    layers = eigen_layers(model)
    basis = random_basis(layers[1], 12, True, 3, SIDES, shared)
    found = collect_moments(model, layers, [batch], lambda a: LatentHistograms([map_of(basis)], WINDOW))[1]
    seen = []
    layers[1].observer = lambda attention, heads, this: seen.append(heads)
    weights = model(batch.input_ids, output_attentions=True).attentions[1].double().tril(-WINDOW)
    heads, count = seen[0], len(basis.encoder)
    k, v = (x.double().unflatten(1, (count, shared)).transpose(2, 3).flatten(3) for x in heads[1:])
    z = (torch.cat([k, v], dim=-1) - basis.mean.unsqueeze(1)) @ basis.encoder  # [B, G/N, T, R]
    weights = weights.unflatten(1, (count, -1))  # [B, G/N, H/G * N, T, T]
    sums = (weights @ z.unsqueeze(2)).square().sum((0, 2, 3))
    torch.testing.assert_close(found.outputs, sums, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.squares, weights.square().sum((0, 2, 3, 4)), rtol=1e-4, atol=0)
    energy = (weights.sum((2, 3)).unsqueeze(-1) * z.square()).sum((0, 2))
    torch.testing.assert_close(found.histograms[0].sums[2].sum(-1), energy, rtol=1e-4, atol=1e-6)


def test_weights_and_spread_are_those_of_the_basis():
    """In the `attention` basis the weighted variance of a key's latent is its eigenvalue."""
    model, batches = tiny("llama"), [Batch(tokens(4, 60))]
    convert_attention(model)
    layers = eigen_layers(model)
    moments = collect_moments(model, layers, batches, lambda a: AttentionMoments.of(a, WINDOW, Sharing()))
    bases = [attention_basis(sums) for sums in moments]
    maps = {a.layer_idx: list(map(map_of, pair)) for a, pair in zip(layers, bases, strict=True)}
    found = collect_moments(model, layers, batches, lambda a: LatentHistograms(maps[a.layer_idx], WINDOW))
    for sums, histograms, (keys, _) in zip(moments, found, bases, strict=True):
        total = histograms.weights[0]
        torch.testing.assert_close(total, sums.vectors.weight, rtol=1e-4, atol=0)
        variance = histograms.histograms[0].sums[2].sum(-1) / total.unsqueeze(-1)
        torch.testing.assert_close(variance, keys.spectrum, rtol=1e-3, atol=1e-6)


def test_outliers_keep_a_place():
    side = collected("llama", [Batch(tokens(1, 20))])[-1][0].histograms[0]
    far, before = side.scale[None, :, None, :] * 1e6, side.sums[0].sum(-1)
    side.add(far, torch.ones(1, 2, 1, dtype=torch.float64))
    assert side.sums[0, ..., -1].min() >= 1
    torch.testing.assert_close(side.sums[0].sum(-1), before + 1)
