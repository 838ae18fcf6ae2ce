"""Sums of gradients and drawn vectors, and the bases and costs that are made of them."""

import pytest
import torch
from tiny import converted, tokens

from eigenattn.calibration import fisher_moments
from eigenattn.calibration.fisher_moments import FisherMoments, Sample, collect_fisher
from eigenattn.calibration.statistics import Batch
from eigenattn.compression.fisher import COHERENCE, fisher, fisher_quantisers
from eigenattn.compression.quantise import ALLOTTED
from eigenattn.config import Sharing
from eigenattn.errors import EigenAttnError

WINDOW = 4
BATCHES = [Batch(tokens(2, 40)), Batch(tokens(2, 40, seed=5))]


def collected(share="1", batches=BATCHES):
    model, layers = converted("llama")
    return collect_fisher(model, layers, batches, lambda a: FisherMoments.of(a, WINDOW, Sharing.of(share)))


@pytest.mark.parametrize("share", ["1", "2", "1-2", "1kv", "2kv"])
def test_bases_restore_what_they_are_of(share):
    for moments in collected(share):
        bases = fisher(moments)
        assert [(basis.sides, basis.heads) for basis in bases] == list(Sharing.of(share).kinds)
        for basis, latents in zip(bases, moments.latents, strict=True):
            identity = torch.eye(basis.full_rank, dtype=torch.float64)
            assert torch.allclose(basis.encoder @ basis.decoder, identity.expand_as(latents.metric), atol=1e-6)
            assert (basis.spectrum.diff(dim=-1) <= 1e-12).all()


def test_the_spectrum_is_what_errors_cost():
    moments = collected()[1]
    basis, latents = fisher(moments)[0], moments.keys
    mean = latents.vectors.first / latents.vectors.weight[:, None]
    covariance = latents.vectors.second / latents.vectors.weight[:, None, None] - mean[:, :, None] * mean[:, None]
    level = latents.metric.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    metric = (latents.metric + level * torch.eye(basis.full_rank)) / 2
    for rank in (0, 5):
        lost = torch.eye(basis.full_rank) - basis.encoder[..., :rank] @ basis.decoder[:, :rank]
        cost = (lost.mT @ covariance @ lost @ metric).diagonal(dim1=-2, dim2=-1).sum(-1)
        expected = COHERENCE * cost / (2 * moments.tokens)
        assert torch.allclose(basis.spectrum[:, rank:].sum(-1), expected, rtol=1e-6)


def test_more_bits_cost_less():
    for moments in collected():
        for fitted in fisher_quantisers(moments, fisher(moments)):
            assert fitted.costs.shape[1] == len(ALLOTTED)
            assert (fitted.costs.diff(dim=1) <= 1e-9 * fitted.costs[:, :1] + 1e-30).all()


def test_a_sample_estimates_sums_over_all(monkeypatch):
    monkeypatch.setattr(fisher_moments, "SAMPLE", 40)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 400, 3, generator=generator, dtype=torch.float64)
    weights = torch.rand(1, 400, generator=generator, dtype=torch.float64) ** 4
    expected = (weights[..., None] * x.square()).sum(1)
    estimates = []
    for seed in range(200):
        sample = Sample.empty(x, 1, 3)
        draw = torch.Generator().manual_seed(seed)
        for part in (slice(0, 150), slice(150, 400)):
            sample.add(x[:, part], weights[:, part], draw)
        estimates.append((sample.estimates[..., None] * sample.vectors.square()).sum(1))
    assert torch.allclose(torch.stack(estimates).mean(0), expected, rtol=0.1)


def test_few_vectors_are_all_kept():
    x, weights = torch.randn(2, 7, 3), torch.rand(2, 7, dtype=torch.float64)
    sample = Sample.empty(x, 2, 3)
    sample.add(x, weights, torch.Generator().manual_seed(0))
    assert torch.allclose(sample.estimates.sum(-1), weights.sum(-1))


def test_no_text_is_refused():
    with pytest.raises(EigenAttnError, match="no tokens"):
        collected(batches=[])
