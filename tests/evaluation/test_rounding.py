"""Codes of rivals against loops, lattices against a search, and errors against those of papers."""

import itertools
import math

import pytest
import torch

from eigenattn.evaluation.rounding import (
    STEPS_OF_LATTICE,
    ChannelCode,
    HadamardCode,
    LatticeCode,
    SphereCode,
    class_of,
    from_class,
    hadamard,
    nearest_point,
    random_rotation,
    rounded_in_groups,
    sphere_levels,
    symmetric_in_groups,
)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_values_of_a_group_are_rounded_to_its_levels():
    x = torch.cat([torch.linspace(0, 3, 64), torch.linspace(10, 40, 16)])
    found = rounded_in_groups(x, 2)
    assert found.unique().tolist() == [0, 1, 2, 3, 10, 20, 30, 40]
    assert (found - x).abs().max() <= 5 + 1e-4


def test_symmetric_groups_have_the_levels_of_a_loop():
    x = gaussian(3, 80)
    x[0, :32] = 0
    for bits in (2, 3, 4):
        found, most = symmetric_in_groups(x, bits), 2 ** (bits - 1)
        for row, start in itertools.product(range(3), (0, 32, 64)):
            group = x[row, start : start + 32].tolist()
            step = torch.tensor(max(group, key=abs) / -most).half().item()
            levels = [step * code for code in range(-most, most)]
            nearest = [min(levels, key=lambda level, v=value: abs(level - v)) for value in group]
            assert found[row, start : start + 32].tolist() == pytest.approx(nearest, abs=1e-6)


@pytest.mark.parametrize("size", [16, 64, 80, 96, 128])
def test_rotations_are_orthogonal(size):
    for matrix in (hadamard(torch.eye(size)), random_rotation(size)):
        assert torch.allclose(matrix @ matrix.T, torch.eye(size), atol=1e-5)
    assert torch.allclose(hadamard(hadamard(torch.eye(size))), torch.eye(size), atol=1e-6)
    assert hadamard(torch.eye(size)).abs().max() == pytest.approx((size & -size) ** -0.5)


def test_a_hadamard_rotation_spreads_an_outlier():
    x = gaussian(500, 64)
    x[:, 3] = 20.0
    plain, rotated = (
        (rounded - x).square().mean() for rounded in (rounded_in_groups(x, 4), HadamardCode(4).rounded(x))
    )
    assert rotated < 0.2 * plain


@pytest.mark.parametrize(("bits", "error"), [(1, 0.36), (2, 0.117), (3, 0.03), (4, 0.009)])
def test_turboquant_has_the_papers_error(bits, error):
    """arXiv 2504.19874, theorem 1, which gives a digit or two; of unit vectors, and so of any in proportion."""
    x = gaussian(4000, 128) * torch.linspace(0.1, 10, 4000)[:, None]
    found = SphereCode(bits).rounded(x)
    relative = ((found - x).square().sum(-1) / x.square().sum(-1)).mean().item()
    assert relative == pytest.approx(error, rel=0.15 if bits > 2 else 0.02)


def test_corrected_norms_are_those_that_there_were():
    x = gaussian(200, 64) * torch.linspace(0.1, 10, 200)[:, None]
    found, shorter = SphereCode(2, corrected=True).rounded(x), SphereCode(2).rounded(x)
    assert torch.allclose(found.norm(dim=-1), x.norm(dim=-1), rtol=1e-3)
    assert torch.allclose(torch.cosine_similarity(found, shorter), torch.ones(200))
    assert (shorter.norm(dim=-1) / x.norm(dim=-1)).mean().square() == pytest.approx(1 - 0.117, abs=0.02)


def test_levels_are_those_of_lloyd_and_max():
    """Of a Gaussian, where there are many dimensions (Max 1960); and each the mean of what is nearest to it."""
    levels = sphere_levels(4096, 2) * 64
    assert levels.tolist() == pytest.approx([-1.510, -0.4528, 0.4528, 1.510], abs=2e-3)
    levels = sphere_levels(16, 3)
    first = gaussian(400_000, 16)
    first = first[:, 0] / first.norm(dim=-1)
    places = (first[:, None] - levels).abs().argmin(-1)
    means = torch.stack([first[places == i].mean() for i in range(8)])
    assert torch.allclose(means, levels, atol=3e-3)


def test_turboquant_is_a_loop_over_coordinates():
    x, bits = gaussian(5, 16), 3
    rotation, levels = random_rotation(16), sphere_levels(16, bits).tolist()
    found = SphereCode(bits).rounded(x)
    for vector, back in zip(x, found, strict=True):
        norm = vector.norm().half().float()
        unit = [float(vector @ rotation[:, i] / norm) for i in range(16)]
        nearest = torch.tensor([min(levels, key=lambda level, u=u: abs(level - u)) for u in unit])
        assert torch.allclose(back, norm * (rotation @ nearest), atol=1e-5)


def test_the_nearest_lattice_point_is_that_of_a_search():
    x = 3 * gaussian(40, 8)
    found = nearest_point(x)
    around = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=8)))
    for vector, point in zip(x, found, strict=True):
        candidates = torch.cat([vector.round() + around, (vector - 0.5).round() + 0.5 + around])
        candidates = candidates[candidates.sum(-1) % 2 == 0]
        assert (point - vector).norm() == pytest.approx((candidates - vector).norm(dim=-1).min().item(), abs=1e-5)
        assert (candidates == point).all(-1).any()


def test_a_class_of_the_lattice_is_as_many_bits_as_are_counted():
    """8 numbers below 2 ** bits; a point near the origin comes back, and all of a class come back as one."""
    x = gaussian(2000, 8)
    codes = class_of(x, 8)
    assert codes.shape == (2000, 8) and codes.min() == 0 and codes.max() == 7 and (codes == codes.round()).all()
    near = nearest_point(x).norm(dim=-1) < 8 / 2**0.5 - 1e-3  # within the sphere that a class's cell holds
    assert near.sum() > 1900
    assert torch.equal(from_class(codes, 8)[near], nearest_point(x)[near])
    far = nearest_point(x) + 8 * nearest_point(3 * gaussian(2000, 8, seed=1))
    assert torch.equal(from_class(class_of(far, 8), 8), from_class(codes, 8))


@pytest.mark.parametrize(("bits", "share"), [(2, 1.0), (3, 0.8), (4, 0.7)])
def test_the_lattice_loses_less_than_single_coordinates(bits, share):
    """At the same bits: by 6.02 dB a bit."""
    x, lattice, scalar = gaussian(4000, 64), LatticeCode(bits), SphereCode(bits)
    errors = [(code.rounded(x) - x).square().mean().item() for code in (lattice, scalar)]
    more = lattice.bits_per_element(64) - scalar.bits_per_element(64)
    assert more == math.log2(len(STEPS_OF_LATTICE)) / 8
    assert errors[0] < share * errors[1] * 4**-more


def test_channels_of_keys_and_tokens_of_values_have_groups():
    x = gaussian(1, 2, 70, 16)
    x[..., 5] += 100.0  # an outlying channel
    code = ChannelCode(4)
    keys, values = code.rounded_keys(x), code.rounded(x)
    for head, channel in ((0, 5), (1, 2)):
        for tokens in (slice(0, 64), slice(64, 70)):
            assert torch.equal(keys[0, head, tokens, channel], rounded_in_groups(x[0, head, tokens, channel], 4))
    assert torch.equal(values[0, 1, 7], rounded_in_groups(x[0, 1, 7], 4))
    assert (keys - x).square().mean() < 0.01 * (values - x).square().mean()


def test_bits_count_all_that_is_stored():
    bits = {
        ChannelCode(4): 4.5,
        HadamardCode(3): 3.5,
        HadamardCode(3, symmetric=True): 3.5,
        SphereCode(2): 2.25,
        LatticeCode(2): 2.5,
    }
    for code, expected in bits.items():
        assert code.bits_per_element(64) == expected
    assert SphereCode(2).bits_per_element(128) == 2.125
    assert HadamardCode(4).bits_per_element(32) == 5
