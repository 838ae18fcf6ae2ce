import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch

from eigenattn import EigenAttentionConfig, EigenAttnError
from eigenattn.compression.rank_problem import RankProblem
from eigenattn.compression.ranks import RANK_RULES
from eigenattn.compression.sensitivity import allot, measured_costs

LAYERS, HEADS, DIM = 3, 2, 16


def problem(errors=None, seed=0, **config):
    generator = torch.Generator().manual_seed(seed)
    config = {"rank_multiple": 2, **config}
    sides = [
        [
            torch.rand(HEADS, DIM, generator=generator).double().pow(6).sort(descending=True).values
            for _ in range(LAYERS)
        ]
        for _ in range(2)
    ]
    spectra = list(zip(*sides, strict=True))

    def tail_energy(candidates):
        """A stand-in for measuring: the energy cut off, layer 1 being ten times as touchy."""
        return [
            [(10 if layer == 1 else 1) * float(k[:, r_k:].sum() + v[:, r_v:].sum()) for r_k, r_v in pairs]
            for layer, ((k, v), pairs) in enumerate(zip(spectra, candidates, strict=True))
        ]

    costs = SimpleNamespace(layer_errors=errors or tail_energy, divergences=tail_energy)
    return RankProblem(spectra, EigenAttentionConfig(**config), costs)


@pytest.mark.parametrize("rule", sorted(RANK_RULES))
@pytest.mark.parametrize("ratio", [0.15, 0.4, 0.6, 0.75, 0.9])
def test_the_ratio_is_met_from_below_with_whole_multiples(rule, ratio):
    case = problem(kv_ratio=ratio, ranks=rule)
    ranks = RANK_RULES[rule].choose(case)
    assert case.ratio(ranks) <= ratio + 1e-9
    assert case.ratio(ranks) > ratio - 0.2
    for rank in itertools.chain(*ranks):
        assert rank in case.allowed(case.spectra[0][0])


def test_uniform_is_within_one_multiple_everywhere():
    case = problem(kv_ratio=0.6, ranks="uniform")
    ranks = list(itertools.chain(*RANK_RULES["uniform"].choose(case)))
    assert max(ranks) - min(ranks) <= 2
    assert case.ratio(RANK_RULES["uniform"].choose(case)) > 0.6 - 2 / (DIM * LAYERS * 2)


@pytest.mark.parametrize("rule", sorted(RANK_RULES))
def test_sides_of_other_shapes_are_counted_as_they_are(rule):
    """Values of two heads to a latent: half as many latents, of up to twice the rank."""
    case = problem(kv_ratio=0.5, ranks=rule)
    spectra = [(keys, values.flatten().sort(descending=True).values[None]) for keys, values in case.spectra]
    case = dataclasses.replace(case, spectra=spectra)
    ranks = RANK_RULES[rule].choose(case)
    held = sum(len(k) * r_k + len(v) * r_v for (k, v), (r_k, r_v) in zip(case.spectra, ranks, strict=True))
    assert case.ratio(ranks) == held / sum(k.numel() + v.numel() for k, v in case.spectra)
    assert 0.3 < case.ratio(ranks) <= 0.5 + 1e-9
    if rule == "uniform":
        assert all(abs(2 * rank_k - rank_v) <= 4 for rank_k, rank_v in ranks)


def test_energy_keeps_what_was_asked_in_every_head():
    case = problem(energy=0.9)
    for layer, pair in enumerate(RANK_RULES["energy"].choose(case)):
        for spectrum, rank in zip(case.spectra[layer], pair, strict=True):
            assert (spectrum[:, :rank].sum(-1) >= 0.9 * spectrum.sum(-1) * (1 - 1e-9)).all()
            smaller = spectrum[:, : rank - 2].sum(-1) / spectrum.sum(-1)
            assert (smaller < 0.9).any()


def test_energy_of_one_is_full_rank():
    assert RANK_RULES["energy"].choose(problem(energy=1.0)) == [(DIM, DIM)] * LAYERS


def test_error_budget_stops_at_the_first_excess():
    dips = [0.0, 0.1, 0.05, 0.2]  # a later candidate under the budget does not count

    def errors(candidates):
        return [(dips + [1.0] * len(pairs))[: len(pairs)] for pairs in candidates]

    seen = []
    case = problem(errors=lambda candidates: seen.append(candidates) or errors(candidates), error_budget=0.07)
    ranks = RANK_RULES["error_budget"].choose(case)
    assert ranks == [pairs[0] for pairs in seen[0]]


def test_error_budget_gives_touchy_layers_more():
    ranks = RANK_RULES["error_budget"].choose(problem(kv_ratio=0.5, ranks="error_budget"))
    sizes = [sum(pair) for pair in ranks]
    assert sizes[1] > max(sizes[0], sizes[2])


def test_a_larger_budget_never_keeps_more():
    ratios = []
    for budget in (0.001, 0.01, 0.1, 1.0):
        case = problem(error_budget=budget)
        ratios.append(case.ratio(RANK_RULES["error_budget"].choose(case)))
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] > ratios[-1]


def brute_force(case, costs):
    """The least total cost within the budget."""
    pairs = list(itertools.product(case.allowed(case.spectra[0][0]), repeat=2))
    every = (list(choice) for choice in itertools.product(pairs, repeat=LAYERS))
    return min(total(costs, ranks) for ranks in every if case.ratio(ranks) <= case.config.kv_ratio)


def total(costs, ranks):
    return sum(float(k[r_k] + v[r_v]) for (k, v), (r_k, r_v) in zip(costs, ranks, strict=True))


def test_allotting_equals_brute_force():
    for seed in range(20):
        case = problem(seed=seed, kv_ratio=0.5, ranks="sensitivity", rank_multiple=4)
        generator = torch.Generator().manual_seed(seed)
        drops = torch.rand(LAYERS, 2, DIM, generator=generator).double().pow(3).sort(descending=True).values
        convex = torch.cat([drops.flip(-1).cumsum(-1).flip(-1), torch.zeros(LAYERS, 2, 1)], dim=-1)
        costs = [tuple(sides) for sides in convex]
        assert total(costs, allot(case, costs)) == pytest.approx(brute_force(case, costs))


def test_a_flat_stretch_does_not_hide_the_gain_behind_it():
    case = problem(kv_ratio=0.5, ranks="sensitivity", rank_multiple=4)
    flat = torch.zeros(DIM + 1, dtype=torch.float64)
    # Only the keys of layer 1 cost anything, and nothing is gained before rank 12.
    steep = torch.where(torch.arange(DIM + 1) < 12, 1.0, 0.0).double()
    costs = [(flat, flat), (steep, flat), (flat, flat)]
    assert total(costs, allot(case, costs)) == 0 == brute_force(case, costs)


def test_costs_pass_through_what_was_measured():
    case = problem(kv_ratio=0.5, ranks="sensitivity")
    asked = []
    measure = case.costs.divergences
    case.costs.divergences = lambda trials: asked.append(trials) or measure(trials)
    costs = measured_costs(case)
    assert len(asked) == 2
    for first, second in zip(*asked, strict=True):
        assert first != second  # the second measurement of a side is at another rank
    for trials in asked:
        for pairs, values, (k, v) in zip(trials, measure(trials), costs, strict=True):
            assert [float(k[pairs[0][0]]), float(v[pairs[1][1]])] == pytest.approx(values)
    for k, v in costs:
        assert (k.diff() <= 1e-12).all() and k[-1] == v[-1] == 0


def test_sides_that_cost_nothing_are_ranked_by_their_tails():
    case = problem(kv_ratio=0.5, ranks="sensitivity")
    case.costs.divergences = lambda trials: [[0.0 for _ in pairs] for pairs in trials]
    for curves, spectra in zip(measured_costs(case), case.spectra, strict=True):
        for curve, spectrum in zip(curves, spectra, strict=True):
            assert (curve[:-1] > 0).all()
            assert float(curve[4] / curve[0]) == pytest.approx(float(spectrum[:, 4:].sum() / spectrum.sum()))


def test_sensitivity_meets_the_ratio_closely():
    case = problem(kv_ratio=0.6, ranks="sensitivity", rank_multiple=1)
    one_rank = 1 / (2 * DIM * LAYERS)
    assert 0.6 - one_rank < case.ratio(RANK_RULES["sensitivity"].choose(case)) <= 0.6


def test_impossible_ratios_say_what_is_possible():
    with pytest.raises(EigenAttnError, match=r"ratio of 0\.500"):
        RANK_RULES["uniform"].choose(problem(kv_ratio=0.3, ranks="uniform", rank_multiple=8))


def test_multiples_that_do_not_divide_the_head():
    assert problem(rank_multiple=6).allowed(torch.ones(2, 16)) == [6, 12, 16]
