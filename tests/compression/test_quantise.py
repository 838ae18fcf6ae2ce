"""Quantisers against direct search on samples, bits against brute force."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from tiny import converted, random_basis, tiny, tokens

from eigenattn import EigenAttentionConfig, EigenAttnError, compress
from eigenattn.cache.codebook import Codebook, level_table
from eigenattn.cache.layout import SIDES
from eigenattn.cache.packing import Widths
from eigenattn.calibration.latent_histograms import Histograms
from eigenattn.compression import quantise
from eigenattn.compression.basis import Basis
from eigenattn.compression.codebooks import Fit, fit
from eigenattn.compression.quantise import ALLOTTED, allocate, costs_of_both, key_costs, quantised, value_costs
from eigenattn.models.conversion import layouts_of

BITS = ALLOTTED[1:]


def samples(kind, n=4000):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 1, n, 1, generator=generator, dtype=torch.float64)
    weight = torch.rand(1, 1, n, generator=generator, dtype=torch.float64)
    if kind == "skewed":
        z = z.exp()
    if kind == "sink":  # one token far out, with half of all the attention
        z[:, :, 0], weight[:, :, 0] = 40.0, weight.sum()
    return z.float(), weight


def fitted(z, weight):
    histograms = Histograms.empty(z, 1, 1)
    histograms.add(z, weight)
    return fit(histograms, BITS)


def error(z, weight, levels, bits):
    codebook = Codebook.of(levels.view(1, 1, 4), Widths.of({bits: 1}))
    restored = codebook.dequantise(codebook.quantise(z))
    return float(((z - restored).double().square().squeeze(-1) * weight).sum())


def even_levels(low, high, bits):
    """Levels from low to high, evenly spaced."""
    step = (high - low) / (2**bits - 1)
    return torch.tensor([low + step * 2 ** (bits - 1), step, 0.0, 0.0])


@pytest.mark.parametrize("kind", ["normal", "skewed", "sink"])
@pytest.mark.parametrize("bits", BITS)
def test_a_fit_is_better_than_even_levels(kind, bits):
    """The error is that measured on the samples, and no evenly spaced levels have a lower one."""
    z, weight = samples(kind)
    found = fitted(z, weight)
    measured = error(z, weight, found.levels[bits], bits)
    assert float(found.error[bits]) == pytest.approx(measured, rel=0.1)
    low, high = float(z.min()), float(z.max())
    ends = [low + (high - low) * share for share in torch.linspace(0, 1, 17).tolist()]
    best = min(error(z, weight, even_levels(a, b, bits), bits) for a, b in itertools.combinations(ends, 2))
    gain = {"normal": 1.0, "skewed": 0.7, "sink": 0.8}[kind]
    assert measured <= (gain if bits > 1 else 1.0) * best  # two levels are always even


@pytest.mark.parametrize("kind", ["normal", "skewed", "sink"])
def test_four_levels_are_where_lloyd_puts_them(kind):
    """A polynomial of degree 3 goes through any four levels: then nothing is lost by it."""
    z, weight = samples(kind)
    x, w = z.flatten().double(), weight.flatten()
    best = float("inf")
    for share in torch.linspace(0.1, 1, 10).tolist():  # from several starts
        levels = torch.quantile(x, torch.tensor([0.02, 0.35, 0.65, 1.0], dtype=x.dtype) * share)
        for _ in range(100):
            nearest = (x.unsqueeze(-1) - levels).abs().argmin(-1)
            sums = torch.zeros(2, 4, dtype=x.dtype).index_add(1, nearest, torch.stack([w, w * x]))
            levels = torch.where(sums[0] > 0, sums[1] / sums[0].clamp_min(1e-9), levels)
        best = min(best, float(((x.unsqueeze(-1) - levels).abs().amin(-1).square() * w).sum()))
    assert error(z, weight, fitted(z, weight).levels[2], 2) <= 1.03 * best


@pytest.mark.parametrize("bits", BITS)
def test_levels_rise(bits):
    for kind in ("normal", "skewed", "sink"):
        gaps = level_table(fitted(*samples(kind)).levels[bits], bits).diff(dim=-1)
        assert float(gaps.min()) > 0.01 * float(gaps.mean())


def test_more_bits_err_less_and_energy_is_that_of_the_samples():
    z, weight = samples("normal")
    found = fitted(z, weight)
    errors = {bits: float(found.error[bits]) for bits in BITS}
    # The best quantisers of a normal variable leave 0.1175 of it at 2 bits and 0.009497 at 4 (Max, 1960).
    assert errors[2] / float(found.energy) == pytest.approx(0.1175, rel=0.03)
    assert errors[4] / float(found.energy) == pytest.approx(0.009497, rel=0.12)
    assert errors[8] < errors[6] / 10 < errors[4] / 100
    assert float(found.energy) == pytest.approx(float((z.double().square().squeeze(-1) * weight).sum()), rel=0.01)


def test_a_head_without_attention_still_has_a_quantiser():
    found = fit(Histograms.empty(torch.zeros(()), 2, 3), BITS)
    for bits in BITS:
        assert (level_table(found.levels[bits], bits).diff(dim=-1) > 0).all()
        assert (found.error[bits] == 0).all()


def test_costs_start_at_the_spectrum_and_fall():
    z, weight = samples("normal")
    _, (attention, *_) = converted()
    basis = random_basis(attention, 1, True)
    spectrum = float((z.double().square().squeeze(-1) * weight).sum() / weight.sum())
    basis = type(basis)(basis.encoder[:1], basis.decoder[:1], torch.full((1, 1), spectrum), basis.mean)
    found = fitted(z, weight)
    keys = key_costs(found, basis, weight.sum().reshape(1))
    assert keys.shape == (1, len(ALLOTTED))
    two = ALLOTTED.index(2)
    assert float(keys[0, two] / keys[0, 0]) == pytest.approx(0.1175, rel=0.05)
    # Values whose errors are independent in all respects have a spectrum of their weighted energy.
    own = type(basis)(basis.encoder, basis.decoder, found.energy, basis.mean)
    assert float(value_costs(found, own)[0, two] / found.energy) == pytest.approx(0.1175, rel=0.05)
    # Where outputs carry more, because tokens agree, so does the part of the error that goes with the latent.
    agreeing = type(basis)(basis.encoder, basis.decoder, 30 * found.energy, basis.mean)
    costs = value_costs(found, agreeing)[0] / float(found.energy)
    assert float(costs[two]) == pytest.approx(30 * 0.1175**2 + (1 - 0.1175) * 0.1175, rel=0.1)
    assert (costs.diff() < 0).all()


def test_costs_of_both_sides():
    """Keys' part falls with the error; what values lose is in proportion to what attention's sums do."""
    z, weight = samples("normal")
    found = fitted(z, weight)
    total, energy = weight.sum().reshape(1, 1), found.energy
    histograms = SimpleNamespace(weights=[total[0]], outputs=0.5 * energy, squares=0.1 * total[0])

    def costs(share):
        nothing = torch.zeros(1, 1, 1)
        spectrum, key_share = torch.tensor([[8.0, share]], dtype=torch.float64).T.unsqueeze(1)
        basis = Basis(nothing, nothing, spectrum, sides=SIDES, key_share=key_share)
        return costs_of_both(found, basis, key_share, histograms)[0] / 8

    keys, values, both = costs(1.0), costs(0.0), costs(0.25)
    assert keys[0] == values[0] == both[0] == 1
    error, two = 0.1175, ALLOTTED.index(2)
    assert float(keys[two]) == pytest.approx(error, rel=0.05)
    assert float(values[two]) == pytest.approx((error**2 * 0.5 + (1 - error) * error * 0.1) / 0.5, rel=0.05)
    torch.testing.assert_close(both, 0.25 * keys + 0.75 * values)
    assert (both.diff() < 0).all()


FEW = [0, 2, 4, 6, 8]


@pytest.fixture
def few_widths(monkeypatch):
    monkeypatch.setattr(quantise, "ALLOTTED", FEW)


def tables(seed, sides=3, channels=4):
    generator = torch.Generator().manual_seed(seed)
    spectra = torch.rand(sides, channels, generator=generator, dtype=torch.float64).pow(4)
    spectra = spectra.sort(descending=True).values
    # Distortion per width as quantisers have it, a little different from channel to channel.
    shape = torch.tensor([1, 0.12, 0.01, 7e-4, 5e-5], dtype=torch.float64)
    wobble = 1 + 0.3 * torch.rand(sides, channels, len(FEW), generator=generator, dtype=torch.float64)
    return list(spectra.unsqueeze(-1) * shape * wobble), torch.rand(sides, generator=generator).pow(2).tolist()


def bytes_of(widths, heads):
    counts = [{bits: side.tolist().count(bits) for bits in BITS} for side in widths]
    return sum(g * Widths.of(count, scaled=True).bytes for g, count in zip(heads, counts, strict=True))


def cost_of(costs, weights, widths):
    return sum(
        weight * float(cost[torch.arange(len(cost)), [FEW.index(w) for w in side.tolist()]].sum())
        for cost, weight, side in zip(costs, weights, widths, strict=True)
    )


@pytest.mark.usefixtures("few_widths")
@pytest.mark.parametrize("seed", range(6))
def test_allocation_is_as_good_as_brute_force_up_to_one_step(seed):
    """Channels in groups of 4 fill whole bytes, so that every step costs what it says."""
    costs, weights = tables(seed, sides=2, channels=12)
    heads = [1, 2]
    choices = [choice for choice in itertools.product(FEW, repeat=3) if choice[0]]
    options = [torch.tensor(choice).repeat_interleave(4) for choice in choices]
    every = [(bytes_of(pair, heads), cost_of(costs, weights, pair)) for pair in itertools.product(options, options)]
    largest_step, exact = 2 * 4 * 8 // 8, 0
    for budget in range(6, 40):
        widths = allocate(costs, weights, heads, budget, 4)
        size, cost = bytes_of(widths, heads), cost_of(costs, weights, widths)
        assert size <= budget
        assert cost <= min((c for s, c in every if s <= budget - largest_step), default=float("inf")) + 1e-12
        exact += cost <= min(c for s, c in every if s <= size) + 1e-12
    assert exact > 20


@pytest.mark.usefixtures("few_widths")
@pytest.mark.parametrize("multiple", [1, 3, 5])
def test_odd_groups_keep_to_the_budget_with_their_padding(multiple):
    costs, weights = tables(1, sides=3, channels=13)
    for budget in (17, 25, 35.5):
        widths = allocate(costs, weights, [2, 2, 1], budget, multiple)
        assert budget - 8 < bytes_of(widths, [2, 2, 1]) <= budget
        for side in widths:
            for first in range(0, 13, multiple):
                assert len(set(side[first : first + multiple].tolist())) == 1


@pytest.mark.usefixtures("few_widths")
def test_budgets_that_cannot_be_met_say_what_is_possible():
    costs, weights = tables(0)
    with pytest.raises(EigenAttnError, match="takes 6"):  # a byte of codes and one of the scale
        allocate(costs, weights, [1, 1, 1], 5, 4)


def test_a_quantised_basis_is_sorted_by_width():
    _, (attention, *_) = converted()
    basis, widths = random_basis(attention, 6, True), torch.tensor([8, 2, 0, 8, 4, 2])
    error = {bits: torch.full((2, 6), float(bits)) + torch.arange(6) / 10 for bits in BITS}
    levels = {bits: each.unsqueeze(-1) * torch.arange(1, 5) for bits, each in error.items()}
    found = quantised(basis, Fit(levels, error, error[8]), widths)
    order = [0, 3, 4, 1, 5]
    assert torch.equal(found.encoder, basis.encoder[..., order])
    assert torch.equal(found.decoder, basis.decoder[:, order])
    assert found.quantiser.widths == Widths.of({8: 2, 4: 1, 2: 2}, scaled=True)
    assert found.quantiser.levels[0, :, 0].tolist() == pytest.approx([8.0, 8.3, 4.4, 2.1, 2.5])
    assert found.quantiser.levels[0, 2].tolist() == pytest.approx([4.4, 8.8, 13.2, 17.6])


@torch.no_grad()
def test_more_bits_are_nearer_to_the_original():
    ids, batches = tokens(2, 60, seed=9), list(tokens(8, 60).split(2))
    exact, errors = tiny("llama")(ids).logits, []
    for bits in (1.0, 4.0):
        model = tiny("llama")
        report = compress(
            model, batches, EigenAttentionConfig(coded=True, kv_ratio=bits / 16, rank_multiple=4, window=4)
        )
        assert bits - 0.5 < report.kv_ratio * 16 <= bits
        errors.append(float((model(ids).logits - exact).square().mean()))
        assert report.layers == [layout.to_dict() for layout in layouts_of(model)]
        assert all(layout.coded for layout in layouts_of(model))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 10


@torch.no_grad()
def test_without_a_window_too():
    ids, model = tokens(2, 30), tiny("opt")
    exact = model(ids).logits
    compress(model, [tokens(4, 60)], EigenAttentionConfig(coded=True, kv_ratio=7 / 16, rank_multiple=4, window=0))
    assert (model(ids).logits - exact).abs().mean() < 0.3 * exact.std()
