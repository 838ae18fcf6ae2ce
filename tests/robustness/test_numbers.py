"""Moments and subspaces of ill-conditioned data against exact arithmetic."""

from fractions import Fraction

import pytest
import torch

from eigenattn.calibration.statistics import LayerMoments, second_moment
from eigenattn.compression.bases import eigen

EPSILON = torch.finfo(torch.float64).eps
D = 12


def ill_conditioned(condition: float, count: int = 400) -> torch.Tensor:
    """Vectors [count, D] in fp32 whose second moment has eigenvalues from 1 down to 1 / condition."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q
    scales = torch.logspace(0, -0.5 * torch.tensor(condition).log10().item(), D, dtype=torch.float64)
    free = torch.linalg.qr(torch.randn(count, D, generator=generator, dtype=torch.float64)).Q
    return ((free * scales) @ turn.T).float()


def exact_moment(x: torch.Tensor) -> torch.Tensor:
    """`x.T @ x` in rational arithmetic, rounded once."""
    rows = [[Fraction(value) for value in row] for row in x.tolist()]
    sums = [[sum(row[i] * row[j] for row in rows) for j in range(D)] for i in range(D)]
    return torch.tensor([[float(value) for value in row] for row in sums], dtype=torch.float64)


@pytest.mark.parametrize("condition", [1e2, 1e12])
def test_streamed_moments_are_exact_to_rounding(condition):
    x = ill_conditioned(condition)
    exact = exact_moment(x)
    streamed = sum(second_moment(piece[None, None], None, 1)[0] for piece in x.split(37))
    error = (streamed - exact).norm() / exact.norm()
    assert error < 4 * len(x) ** 0.5 * EPSILON


@pytest.mark.parametrize("rank", range(1, D))
def test_subspaces_of_ill_conditioned_moments(rank):
    """At condition 1e12 the leading subspace of every rank is found to `rounding * condition at the cut`.

    An error `e` in the moment turns a subspace by at most `e / gap` (Davis and Kahan). The exact subspace is that of a
    singular value decomposition of the vectors themselves, whose condition is the root of the moment's.
    """
    x = ill_conditioned(1e12)
    moments = LayerMoments(*(torch.zeros(1, D, D, dtype=torch.float64) for _ in range(3)))
    for piece in x.split(37):
        moments.value += second_moment(piece[None, None], None, 1)
    basis = eigen(moments)[1].truncate(rank)
    singular, directions = torch.linalg.svd(x.double(), full_matrices=False)[1:]
    outside = directions[rank:] @ basis.encoder[0]  # sines of the angles between the subspaces
    gap = singular[rank - 1] ** 2 - singular[rank] ** 2
    allowed = 4 * len(x) ** 0.5 * EPSILON * singular[0] ** 2 / gap
    assert torch.linalg.matrix_norm(outside, 2) < allowed
    # What matters: the energy that the truncation leaves out is the least possible.
    left = (x.double() - x.double() @ basis.encoder[0] @ basis.decoder[0]).square().sum()
    least = singular[rank:].square().sum()
    assert float(left) <= float(least) * (1 + 1e-3) + 4 * len(x) ** 0.5 * EPSILON


def test_orders_of_batches_differ_by_rounding_only():
    x = ill_conditioned(1e12)
    forward = sum(second_moment(piece[None, None], None, 1) for piece in x.split(10))
    backward = sum(second_moment(piece[None, None], None, 1) for piece in x.flip(0).split(10))
    assert (forward - backward).norm() / forward.norm() < 1e-14
