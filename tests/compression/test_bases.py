import torch

from eigenattn.calibration.statistics import LayerMoments
from eigenattn.compression.bases import BASES, eigen


def moments_of(keys, queries, values):
    """Moments of [G, N, D] vectors."""
    g, _, d = keys.shape
    moments = LayerMoments.zeros(g, d, torch.device("cpu"))
    for name, x in (("key", keys), ("query", queries), ("value", values)):
        getattr(moments, name).add_(x.transpose(1, 2).double() @ x.double())
    return moments


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


def test_signs_are_fixed():
    keys, queries, values = random_vectors()
    for name in BASES:
        once, again = (BASES[name](moments_of(keys, queries, values)) for _ in range(2))
        assert torch.equal(once[0].encoder, again[0].encoder)
    basis = eigen(moments_of(keys, queries, values))[0]
    assert (basis.encoder.gather(1, basis.encoder.abs().argmax(1, keepdim=True)) > 0).all()


def test_full_rank_needs_no_basis():
    basis = eigen(moments_of(*random_vectors()))[0]
    assert basis.truncate(8) is None
    assert basis.truncate(5).rank == 5
