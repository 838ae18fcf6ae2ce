"""Attention-weighted moments against their definitions, written as loops over query-key pairs."""

from functools import partial

import pytest
import torch
from tiny import converted, tiny, tokens

from eigenattn.calibration import attention_moments
from eigenattn.calibration.attention_moments import AttentionMoments
from eigenattn.calibration.statistics import Batch, collect_moments
from eigenattn.config import Sharing
from eigenattn.models.conversion import convert_attention, eigen_layers
from eigenattn.models.rotary import rotate

LENGTH = 12
NAMES = ["llama", "llama-yarn", "phi3-partial", "qwen3", "opt", "mpt", "bloom", "mistral-sliding", "falcon-alibi"]


def rotated(attention, x, position, back=False):
    """One vector [D], rotated to a position or, by the transpose, back from it."""
    if not attention.rotates:
        return x
    cos, sin = attention.angles(x[None, None], torch.tensor([[position]]))
    return rotate(x[None, None, None], cos, -sin if back else sin)[0, 0, 0]


@torch.no_grad()
def by_loops(attention, heads, weights, window, sharing):
    """Every sum of `AttentionMoments`, from the weights [B, H, T, T] of the model itself."""
    expected = AttentionMoments.of(attention, window, sharing)
    b, h, t, _ = heads.query.shape
    for row in range(b):
        for head in range(h):
            g = head // attention.num_key_value_groups
            latents = [g // shared for shared in sharing[:2]]
            mates = [slice(i * shared, (i + 1) * shared) for i, shared in zip(latents, sharing[:2], strict=True)]
            for m in range(t):
                far = range(max(m - window + 1, 0)) if window else range(m + 1)
                p, o = 0.0, torch.zeros(sharing.values * attention.head_dim, dtype=torch.float64)
                for n in far:
                    a = weights[row, head, m, n].double()
                    key, value = (x[row, own, n].flatten().double() for x, own in zip(heads[1:], mates, strict=True))
                    key = torch.cat([key, value]) if expected.outputs is None else key
                    query = rotated(attention, rotated(attention, heads.query[row, head, m], m), n, back=True).double()
                    expected.key_metric[g] += a * torch.outer(query, query) * attention.scaling**2
                    add(expected.vectors, latents[0], key, a)
                    p, o = p + a, o + a * value
                if expected.outputs is not None and p:
                    add(expected.outputs, latents[1], o / p, p**2)
    return expected


def add(sums, latent, x, weight):
    """Add a vector to one latent's sums."""
    sums.second[latent] += weight * torch.outer(x, x)
    sums.first[latent] += weight * x
    sums.weight[latent] += weight


def same_sums(one, other):
    """Assert that all sums but the metrics agree."""
    for a, b in ((one.vectors, other.vectors), (one.outputs, other.outputs)):
        if a is not None:
            for field in ("second", "first", "weight"):
                torch.testing.assert_close(getattr(a, field), getattr(b, field), rtol=1e-4, atol=3e-5)


@torch.no_grad()
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize(
    ("name", "share"),
    [
        *((name, "1") for name in NAMES),
        *(("llama", "2"), ("opt", "2-4"), ("opt", "1-4")),
        *(("llama", "1kv"), ("opt", "2kv")),
    ],
)
def test_moments_are_their_definitions(name, share, window, monkeypatch):
    # With as many draws as make every key's share whole, sampling by mass is only nearly exact: see the next test.
    monkeypatch.setattr(attention_moments, "SAMPLED_KEYS", 4096)
    monkeypatch.setattr(attention_moments, "QUERY_BLOCK", 5)
    model, ids = tiny(name), tokens(2, LENGTH)
    convert_attention(model)
    layers, seen = eigen_layers(model), {}

    class Recorder:
        tokens = 1

        def observe(self, attention, heads, this, valid):
            mask = this.mask(heads.query, LENGTH)
            q, k = (this.rotated(x) for x in heads[:2])
            k = k.repeat_interleave(attention.num_key_value_groups, 1)
            scores = q @ k.transpose(-1, -2) * attention.scaling
            mask = torch.ones(LENGTH, LENGTH).tril().bool() if mask is None else mask
            scores = scores.masked_fill(~mask, -1e30) if mask.dtype == torch.bool else scores + mask
            seen[attention.layer_idx] = (heads, scores.softmax(-1))

    collect_moments(model, layers, [Batch(ids)], lambda attention: Recorder())
    empty = partial(AttentionMoments.of, window=window, sharing=Sharing.of(share))
    moments = collect_moments(model, layers, [Batch(ids)], empty)
    for attention, found in zip(layers, moments, strict=True):
        expected = by_loops(attention, *seen[attention.layer_idx], window, Sharing.of(share))
        assert found.tokens == 2 * LENGTH
        same_sums(found, expected)
        error = (found.key_metric - expected.key_metric).norm() / expected.key_metric.norm()
        assert error < (0.02 if attention.rotates else 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "falcon-grouped"])
def test_value_metric_is_that_of_the_output_projection(name):
    """`x M x` is what the output projection makes of x in each of a group's heads: the sum of squared lengths."""
    _, (attention, *_) = converted(name)
    metric = AttentionMoments.of(attention, 0, Sharing()).value_metric
    x = torch.randn(16, generator=torch.Generator().manual_seed(0))
    origin = attention.output_projection(torch.zeros(attention.heads * 16))
    for g in range(attention.kv_heads):
        total = 0.0
        for h in range(g * attention.num_key_value_groups, (g + 1) * attention.num_key_value_groups):
            alone = torch.zeros(attention.heads, 16)
            alone[h] = x
            total += (attention.output_projection(alone.flatten()) - origin).square().sum()
        torch.testing.assert_close((x.double() @ metric[g] @ x.double()).float(), total)


@torch.no_grad()
def test_padding_does_not_count():
    model, short = tiny("llama"), tokens(1, LENGTH)
    convert_attention(model)
    layers = eigen_layers(model)
    ids = torch.cat([short, torch.zeros(1, 5, dtype=torch.int64)], 1)
    mask = torch.cat([torch.ones_like(short), torch.zeros(1, 5, dtype=torch.int64)], 1)

    def collect(batch):
        return collect_moments(model, layers, [batch], lambda attention: AttentionMoments.of(attention, 3, Sharing()))

    for a, b in zip(collect(Batch(short)), collect(Batch(ids, mask)), strict=True):
        assert a.tokens == b.tokens
        torch.testing.assert_close(a.key_metric, b.key_metric, rtol=1e-4, atol=3e-5)
        same_sums(a, b)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "shared"), [("llama-bias", 1), ("llama", 2), ("opt", 1), ("mpt", 4), ("falcon-grouped", 1)]
)
def test_priors_are_what_the_projections_make_of_white_noise(name, shared):
    model = tiny(name)
    convert_attention(model)
    attention = eigen_layers(model)[0]
    moments = AttentionMoments.of(attention, 0, Sharing(shared, shared), 0.1)
    units = torch.eye(model.config.hidden_size)[None]
    for prior, with_bias, bias in zip(
        moments.priors,
        attention.project(units)[1:],
        attention.project(torch.zeros_like(units))[1:],
        strict=True,
    ):
        weight = (with_bias - bias)[0].double()  # [G, C, D]
        by_latent = weight.unflatten(0, (-1, shared)).transpose(1, 2).flatten(2)  # [G/N, C, N * D]
        expected = by_latent.transpose(1, 2) @ by_latent
        assert (prior - expected).norm() < 0.2 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3", "mpt-clip", "olmo2"])
def test_priors_pass_norms_and_clips(name):
    model = tiny(name)
    convert_attention(model)
    one, other = (AttentionMoments.of(eigen_layers(model)[0], 0, Sharing(), 0.1) for _ in range(2))
    for prior, again in zip(one.priors, other.priors, strict=True):
        assert torch.equal(prior, again)
        assert (torch.linalg.eigvalsh(prior) > 0).all()
