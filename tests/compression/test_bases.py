import dataclasses

import pytest
import torch

from eigenattn.cache.layout import SIDES
from eigenattn.calibration.attention_moments import AttentionMoments, Sums
from eigenattn.calibration.statistics import LayerMoments
from eigenattn.compression.bases import attention, attention_of_both, eigen, floored
from eigenattn.compression.basis import truncated


def moments_of(keys, queries, values):
    """Moments of [G, N, D] vectors."""
    return LayerMoments(*(x.transpose(1, 2).double() @ x.double() for x in (queries, keys, values)))


def random_vectors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(3, 0.1, 8)
    return [torch.randn(2, 50, 8, generator=generator) * scale for _ in range(3)]


def test_eigen_is_the_svd_of_the_stack():
    keys, queries, values = random_vectors()
    key_basis, value_basis = eigen(moments_of(keys, queries, values))
    for basis, stack in ((key_basis, torch.cat([keys, queries], 1)), (value_basis, values)):
        _, singular, right = torch.linalg.svd(stack.double(), full_matrices=False)
        torch.testing.assert_close(basis.spectrum, singular.square())
        # Up to sign.
        torch.testing.assert_close(basis.decoder.abs(), right.abs(), rtol=1e-6, atol=1e-6)


def test_eigen_is_better_than_random_subspaces():
    keys, queries, values = random_vectors()
    basis = eigen(moments_of(keys, queries, values))[0].truncate(3)
    stack = torch.cat([keys, queries], 1).double()
    best = (stack - stack @ basis.encoder @ basis.decoder).square().sum()
    generator = torch.Generator().manual_seed(1)
    for _ in range(1000):
        other = torch.linalg.qr(torch.randn(2, 8, 3, generator=generator, dtype=torch.float64)).Q
        assert (stack - stack @ other @ other.transpose(1, 2)).square().sum() > best


def weighted_problem(seed=0, g=2, d=6, n=40):
    """Moments of the `attention` basis from random vectors, and the errors of keys and of values they stand for."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scale = torch.linspace(2, 0.2, d, dtype=torch.float64)
    metric_root, k, weight = draw(g, d, d), draw(g, n, d) * scale + 3, draw(g, n).square()
    output, p, value_root = draw(g, n, d) * scale + 2, draw(g, n).square(), draw(g, d, d)
    metric, value_metric = metric_root @ metric_root.mT, value_root @ value_root.mT
    rows, shares = k * weight[..., None], output * p[..., None]
    moments = AttentionMoments(
        metric,
        Sums(rows.mT @ k, rows.sum(1), weight.sum(1)),
        value_metric,
        Sums(output.mT @ output, shares.sum(1), p.square().sum(1)),
        window=0,
    )

    def key_error(encoder, decoder, mean):
        rest = (k - mean[:, None]) - (k - mean[:, None]) @ encoder @ decoder
        return torch.einsum("gn,gnd,gde,gne->", weight / weight.sum(1, keepdim=True), rest, metric, rest)

    def value_error(encoder, decoder, mean):
        centred = output - p[..., None] * mean[:, None]
        rest = centred - centred @ encoder @ decoder
        return torch.einsum("gnd,gde,gne->", rest, value_metric, rest)

    return moments, key_error, value_error


def test_attention_basis_is_optimal():
    """No random competitor, and none found from one by gradient descent, has a lower expected weighted error."""
    moments, *errors = weighted_problem()
    for basis, error in zip(attention(moments), errors, strict=True):
        for rank in (1, 3, 5):
            cut = basis.truncate(rank)
            best = float(error(cut.encoder, cut.decoder, cut.mean))
            generator = torch.Generator().manual_seed(rank)
            competitors = []
            for _ in range(2000):
                encoder = torch.randn(2, 6, rank, generator=generator, dtype=torch.float64)
                decoder = torch.linalg.pinv(encoder)
                mean = cut.mean + 0.1 * torch.randn(2, 6, generator=generator, dtype=torch.float64)
                competitors.append((float(error(encoder, decoder, mean)), encoder, decoder, mean))
            assert min(competitor[0] for competitor in competitors) > best
            for _, *start in sorted(competitors, key=lambda each: each[0])[:2]:
                assert descend(error, start) > best * (1 - 1e-3)


def descend(error, start):
    """The error that gradient descent reaches from a competitor, over encoder, decoder and mean."""
    parameters = [x.clone().requires_grad_() for x in start]
    optimiser = torch.optim.LBFGS(parameters, max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        value = error(*parameters)
        value.backward()
        return value

    optimiser.step(closure)
    return error(*parameters).item()


def test_shrinkage_is_a_mixture_of_covariances():
    """The basis of shrunk moments is the one of moments that hold the mixture already."""
    moments, *_ = weighted_problem()
    generator = torch.Generator().manual_seed(5)
    roots = torch.randn(2, 2, 6, 6, generator=generator, dtype=torch.float64)
    priors = tuple(roots @ roots.mT)
    given = dataclasses.replace(moments, priors=priors)
    found = attention(dataclasses.replace(given, shrinkage=0.25))

    def mixed(sums, prior):
        """Second moments whose covariance about their mean is three quarters their own and a quarter the prior."""
        mean = sums.first / sums.weight[:, None]
        about = mean[..., None] * mean[:, None] * sums.weight[:, None, None]
        own = sums.second - about
        scale = own.diagonal(dim1=1, dim2=2).sum(1) / prior.diagonal(dim1=1, dim2=2).sum(1)
        second = 0.75 * own + 0.25 * prior * scale[:, None, None] + about
        return dataclasses.replace(sums, second=second)

    vectors, outputs = (mixed(*pair) for pair in zip((moments.vectors, moments.outputs), priors, strict=True))
    expected = attention(dataclasses.replace(moments, vectors=vectors, outputs=outputs))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.encoder, other.encoder)
        torch.testing.assert_close(one.spectrum, other.spectrum)
    for one, other in zip(attention(given), attention(moments), strict=True):
        assert torch.equal(one.encoder, other.encoder)


def problem_of_both(weights, seed=0, g=2, d=4, n=40):
    """Moments of random keys and values side by side, and the weighted error of both that they stand for."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixed, weight = draw(g, 2 * d, 2 * d), draw(g, n).square()
    x = draw(g, n, 2 * d) @ mixed + 2
    metric, value_metric = (root @ root.mT for root in draw(2, g, d, d))
    rows = x * weight[..., None]
    sums = Sums(rows.mT @ x, rows.sum(1), weight.sum(1))
    moments = AttentionMoments(metric, sums, value_metric, None, window=0)

    def error(encoder, decoder, mean):
        rest = (x - mean[:, None]) - (x - mean[:, None]) @ encoder @ decoder
        sides = zip(weights, (metric, value_metric), (rest[..., :d], rest[..., d:]), strict=True)
        share = weight / weight.sum(1, keepdim=True)
        return sum(unit * torch.einsum("gn,gnd,gde,gne->", share, side, m, side) for unit, m, side in sides)

    return moments, error


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.2, 5.0)])
def test_a_basis_of_both_sides_is_optimal(weights):
    """As for keys and for values apart; and it beats bases of either side that share out the rank in any way."""
    moments, error = problem_of_both(weights)
    basis = attention_of_both(moments, *weights)
    assert basis.sides == SIDES and basis.full_rank == 8
    of_keys = weights[0] * (basis.decoder[..., :4] @ floored(moments.key_metric) * basis.decoder[..., :4]).sum(-1)
    torch.testing.assert_close(basis.key_share, of_keys)
    apart = attention(moments)
    for rank in (1, 3, 5):
        cut = basis.truncate(rank)
        best = float(error(cut.encoder, cut.decoder, cut.mean))
        assert best == pytest.approx(float(cut.spectrum[:, rank:].sum()), rel=1e-2)
        generator = torch.Generator().manual_seed(rank)
        competitors = []
        for _ in range(2000):
            encoder = torch.randn(2, 8, rank, generator=generator, dtype=torch.float64)
            mean = cut.mean + 0.1 * torch.randn(2, 8, generator=generator, dtype=torch.float64)
            competitors.append((float(error(encoder, torch.linalg.pinv(encoder), mean)), encoder, mean))
        assert min(competitor[0] for competitor in competitors) > best
        for _, encoder, mean in sorted(competitors, key=lambda each: each[0])[:2]:
            assert descend(error, (encoder, torch.linalg.pinv(encoder), mean)) > best * (1 - 1e-3)
        for rank_k in range(max(rank - 4, 0), min(rank, 4) + 1):
            keys, values = (
                (each.encoder[..., :kept], each.decoder[:, :kept])
                for each, kept in zip(apart, (rank_k, rank - rank_k), strict=True)
            )
            encoder, decoder = (
                torch.stack([torch.block_diag(*pair) for pair in zip(*sides, strict=True)])
                for sides in zip(keys, values, strict=True)
            )
            assert error(encoder, decoder, cut.mean) > best


def test_priors_of_both_sides_are_scaled_each_for_itself():
    """A prior in other units for keys or for values is the same prior."""
    moments, _ = problem_of_both((1.0, 1.0))
    generator = torch.Generator().manual_seed(5)
    root = torch.randn(2, 8, 8, generator=generator, dtype=torch.float64)
    units = torch.tensor([3.0] * 4 + [0.1] * 4, dtype=torch.float64)
    found = [
        attention_of_both(
            dataclasses.replace(moments, shrinkage=0.25, priors=(scale[:, None] * (root @ root.mT) * scale,)), 1, 1
        )
        for scale in (torch.ones_like(units), units)
    ]
    torch.testing.assert_close(found[0].encoder, found[1].encoder)
    assert not torch.allclose(found[0].spectrum, attention_of_both(moments, 1, 1).spectrum)


def test_a_side_that_costs_nothing_is_kept_where_it_is_free():
    moments, error = problem_of_both((1.0, 0.0))
    basis = attention_of_both(moments, 1.0, 0.0)
    cut = basis.truncate(4)
    assert error(cut.encoder, cut.decoder, cut.mean) < 1e-3 * error(cut.encoder * 0, cut.decoder, cut.mean)
    assert all(x.isfinite().all() for x in (basis.encoder, basis.decoder))


def test_the_attention_spectrum_is_the_error():
    moments, key_error, value_error = weighted_problem(1)
    for basis, error in zip(attention(moments), (key_error, value_error), strict=True):
        for rank in (1, 4):
            cut = basis.truncate(rank)
            found = float(error(cut.encoder, cut.decoder, cut.mean))
            assert found == pytest.approx(float(cut.spectrum[:, rank:].sum()), rel=1e-2)


def test_signs_are_fixed():
    keys, queries, values = random_vectors()
    basis = eigen(moments_of(keys, queries, values))[0]
    assert (basis.encoder.gather(1, basis.encoder.abs().argmax(1, keepdim=True)) > 0).all()


def test_full_rank_needs_no_basis():
    keys, values = eigen(moments_of(*random_vectors()))
    found = truncated([(keys, values)] * 3, [(8, 8), (5, 8), (8, 3)])
    assert [[(basis.sides, basis.rank) for basis in layer] for layer in found] == [
        [],
        [(("key",), 5)],
        [(("value",), 3)],
    ]
