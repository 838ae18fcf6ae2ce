"""Refitted value decoders against least squares done the long way."""

import dataclasses

import pytest
import torch
from tiny import converted, some_bases, tiny, tokens

from eigenattn import EigenAttentionConfig, compress
from eigenattn.cache.packing import Widths
from eigenattn.calibration.statistics import Batch
from eigenattn.compression import refit as refitting
from eigenattn.compression.folding import attach, detach
from eigenattn.compression.refit import LeastSquares, refit
from eigenattn.journal import Journal
from eigenattn.progress import TokenProgress

BARS = TokenProgress(False)
RANK = 6
BATCHES = [Batch(tokens(2, 40)), Batch(tokens(1, 50, seed=7))]


def random_bases(layers, share="1", coded=False):
    size = Widths.of({8: 4, 4: 4, 2: 4}) if coded else RANK
    return [tuple(some_bases(attention, share, (size, size), i)) for i, attention in enumerate(layers)]


def outputs(model, attention, batch):
    """What a layer's output projection gives, [B, T, C]."""
    found = []
    hook = attention.output_projection.register_forward_hook(lambda *args: found.append(args[-1]))
    model(batch.input_ids, attention_mask=batch.attention_mask)
    hook.remove()
    return found[0]


@torch.no_grad()
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize(
    ("name", "share", "coded"),
    [
        *((name, "1", False) for name in ("llama", "llama3", "opt", "mpt-clip", "qwen3", "gemma2", "bloom", "granite")),
        *((name, "1", False) for name in ("falcon-grouped", "mistral-sliding", "phi3-partial")),
        *((name, "2", False) for name in ("llama", "opt")),
        *((name, "1", True) for name in ("llama", "mpt")),
        ("llama", "2", True),
        ("llama", "1-2", False),
    ],
)
def test_the_output_changes_as_sums_over_latents_foretell(name, share, coded, window):
    model, (attention, *_) = converted(name)
    keys, values = random_bases([attention], share, coded)[0]
    fit = LeastSquares(attention, values.rank)
    attach(attention, [keys, values], window)
    attention.observer = fit.observe
    before = outputs(model, attention, BATCHES[0])
    attention.observer = None
    change = torch.randn(attention.kv_heads, values.rank, attention.head_dim, dtype=torch.float64)
    attach(attention, [keys, refitting._changed(values, change)], window)
    after = outputs(model, attention, BATCHES[0])
    by_head = change.repeat_interleave(attention.num_key_value_groups, 0)
    foretold = torch.einsum("bhtr,hrd,hdc->btc", fit.sums.double(), by_head, fit.weight)
    torch.testing.assert_close((after - before).double(), foretold, rtol=1e-4, atol=1e-4)


def test_least_squares_is_that_of_the_whole_matrix():
    _, (attention, *_) = converted("llama")
    fit = LeastSquares(attention, 3)
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([9.0, 3.0, 0.3])  # of latents, as spectra fall
    sums = [torch.randn(2, 4, 30, 3, generator=generator) * scale for _ in range(3)]
    missing = [torch.randn(2, 30, 64, generator=generator) for _ in range(3)]
    valid = torch.ones(2, 30, dtype=torch.bool)
    valid[0, :11] = False
    for each, target in zip(sums, missing, strict=True):
        fit.sums = each
        fit.add(target, valid)

    def predict(change):
        return torch.cat(
            [
                torch.einsum("bhtr,hrd,hdc->btc", each.double(), change.repeat_interleave(2, 0), fit.weight)[valid]
                for each in sums
            ]
        ).flatten()

    matrix = torch.stack([predict(unit.view(2, 3, 16)) for unit in torch.eye(96, dtype=torch.float64)], dim=1)
    target = torch.cat([each[valid] for each in missing]).flatten().double()
    own = matrix.T @ matrix
    # The ridge holds every entry of a group's decoder alike, in proportion to the energy that meets it.
    gram = torch.einsum("aras->ars", fit.gram).view(2, 2, 3, 3).sum(1).diagonal(dim1=1, dim2=2).mean(-1)
    weights = fit.weight.square().sum((1, 2)).view(2, 2).sum(1) / 16
    ridge = (refitting.RIDGE * gram * weights / 2).repeat_interleave(48)
    expected = torch.linalg.solve(own + ridge.diag(), matrix.T @ target)
    torch.testing.assert_close(fit.solve().flatten(), expected, rtol=1e-4, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("name", ["llama", "opt", "falcon-grouped"])
def test_no_decoder_near_the_refitted_one_has_a_lower_error(name, window, monkeypatch):
    monkeypatch.setattr(refitting, "RIDGE", 1e-9)
    model, layers = converted(name)
    chosen = random_bases(layers)
    found = refit(model, layers, chosen, window, BATCHES, BARS)
    last = layers[-1]
    targets = [outputs(model, last, batch) for batch in BATCHES]

    def error(pair):
        for attention, earlier in zip(layers, [*found[:-1], pair], strict=True):
            attach(attention, earlier, window)
        made = [outputs(model, last, batch) for batch in BATCHES]
        for attention in layers:
            detach(attention)
        return sum((one - other).double().square().sum() for one, other in zip(made, targets, strict=True))

    keys, values = found[-1]
    least = error(found[-1])
    assert least < 0.9 * error(chosen[-1])
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-2, 1e-1):
        for _ in range(4):
            change = size * torch.randn(*values.decoder.shape, generator=generator, dtype=torch.float64)
            assert error((keys, dataclasses.replace(values, decoder=values.decoder + change))) > least


@torch.no_grad()
def test_a_refitted_model_predicts_more_like_the_original():
    ids = tokens(4, 60)
    exact = tiny("llama")(ids).logits.log_softmax(-1)
    divergences = []
    for refitted in (False, True):
        model = tiny("llama")
        config = EigenAttentionConfig(kv_ratio=0.7, rank_multiple=2, window=0, refit=refitted)
        compress(model, list(ids.split(1)), config)
        found = model(ids).logits.log_softmax(-1)
        divergences.append((exact.exp() * (exact - found)).sum(-1).mean())
    assert divergences[1] < divergences[0]


def test_padding_does_not_count():
    model, layers = converted("llama")
    chosen = random_bases(layers)
    short, long = tokens(1, 30), tokens(1, 44, seed=3)
    mask = torch.ones(2, 44, dtype=torch.int64)
    mask[0, :14] = 0
    padded = torch.cat([torch.cat([torch.zeros_like(short[:, :14]), short], dim=1), long])
    one = refit(model, layers, chosen, 5, [Batch(padded, mask)], BARS)
    other = refit(model, layers, chosen, 5, [Batch(short), Batch(long)], BARS)
    for (_, a), (_, b) in zip(one, other, strict=True):
        torch.testing.assert_close(a.decoder, b.decoder, rtol=1e-3, atol=1e-4)


def test_a_side_at_full_rank_is_left_alone():
    model, layers = converted("llama")
    keys, values = random_bases(layers)[0]
    exact = model(BATCHES[0].input_ids).logits
    found = refit(model, layers, [(), (keys,), (values,)], 0, BATCHES, BARS)
    assert found[:2] == [(), (keys,)]
    assert not torch.equal(found[2][0].decoder, values.decoder)
    assert torch.equal(model(BATCHES[0].input_ids).logits, exact)


def test_layers_that_were_refitted_are_taken_up(tmp_path, monkeypatch):
    model, layers = converted("llama")
    chosen = random_bases(layers)
    monkeypatch.setattr(refitting.resuming, "SAVE_SECONDS", 0.0)
    expected = refit(model, layers, chosen, 5, BATCHES, BARS)
    solve = LeastSquares.solve
    solved = []

    def killed_at_the_third(fit):
        if len(solved) == 2:
            raise KeyboardInterrupt
        solved.append(fit)
        return solve(fit)

    with pytest.raises(KeyboardInterrupt), Journal(tmp_path / "out", {}) as journal:
        monkeypatch.setattr(LeastSquares, "solve", killed_at_the_third)
        refit(model, layers, chosen, 5, BATCHES, BARS, journal)
    monkeypatch.setattr(LeastSquares, "solve", lambda fit: (solved.append(fit), solve(fit))[1])
    model, layers = converted("llama")
    with Journal(tmp_path / "out", {}) as journal:
        found = refit(model, layers, chosen, 5, BATCHES, BARS, journal)
    assert len(solved) == 3
    for (_, a), (_, b) in zip(found, expected, strict=True):
        assert torch.equal(a.decoder, b.decoder)
