"""The smallest cache within a loss: the search on curves that are known, and on a model against its own divergence."""

import math

import pytest
import torch
from tiny import tiny, tokens

from eigenattn import EigenAttentionConfig, EigenAttnError, compress
from eigenattn.compression.smallest import FINEST, LEAST, NEAR, TRIALS, Found, search


def trials_of(curve, nats, start=0.25, largest=0.5):
    tried = []

    def at(ratio):
        tried.append(ratio)
        return Found(EigenAttentionConfig(kv_ratio=ratio), [], {"easy": curve(ratio) / 2, "hard": curve(ratio)})

    return search(at, nats, start, largest), tried


@pytest.mark.parametrize("bit", [2.0, 3.3, 6.0])
@pytest.mark.parametrize("at_four_bits", [1e-4, 1.5e-3, 2e-2])
@pytest.mark.parametrize("bend", [0.0, 0.4])
def test_the_size_is_the_smallest_up_to_a_tenth_of_a_bit(bit, at_four_bits, bend):
    def curve(ratio):
        bits = 16 * (0.25 - ratio)
        return at_four_bits * bit ** (bits + bend * math.sin(3 * bits))

    found, tried = trials_of(curve, 0.005)
    worst = found.divergences["hard"]
    assert worst <= 0.005
    ratio = found.config.kv_ratio
    assert worst >= NEAR * 0.005 or ratio == LEAST or curve(ratio - 1.01 * FINEST) > NEAR * 0.005
    assert len(tried) <= TRIALS and len(set(tried)) == len(tried)


def test_a_curve_with_a_step_ends_beside_it():
    found, _ = trials_of(lambda ratio: 1e-3 if ratio > 0.2 else 1.0, 0.005)
    assert 0.2 < found.config.kv_ratio < 0.2 + 2 * FINEST


def test_what_is_out_of_reach_says_what_is_not():
    with pytest.raises(
        EigenAttnError, match=r"cannot be met: the largest cache, a KV ratio of 0.5, has 1.0000 on hard"
    ):
        trials_of(lambda ratio: 1.0, 0.005)


@torch.no_grad()
def divergence(exact, model, ids):
    p, q = (x[:, ::4].float().log_softmax(-1) for x in (exact, model(ids, use_cache=False).logits))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_a_model_within_its_bound():
    held_out = {"first": [tokens(2, 60, seed=8)], "second": [tokens(1, 50, seed=9)]}
    exact = {name: tiny("llama")(ids, use_cache=False).logits.detach() for name, (ids,) in held_out.items()}
    ratios = []
    for bound in (6e-3, 3e-2):
        model = tiny("llama")
        config = EigenAttentionConfig(window=4)
        report = compress(model, [tokens(4, 60)], config, max_divergence=bound, held_out=held_out)
        found = {name: divergence(exact[name], model, ids) for name, (ids,) in held_out.items()}
        assert found == pytest.approx(report.divergences, rel=1e-3)
        assert max(found.values()) <= bound
        assert report.config["kv_ratio"] >= report.kv_ratio
        facts = model.config.quantization_config.provenance
        assert facts["max_divergence"] == bound and facts["divergences"] == report.divergences
        ratios.append(report.kv_ratio)
    assert ratios[0] > ratios[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_divergence": 0.0, "held_out": {"a": []}}, "above 0"),
        ({"max_divergence": True, "held_out": {"a": []}}, "above 0"),
        ({"max_divergence": 0.01}, "none was given"),
        ({"max_divergence": 0.01, "held_out": {"a": []}}, "no text"),
        ({"max_divergence": 0.01, "held_out": {"a": []}, "config": EigenAttentionConfig(energy=0.9)}, "other target"),
    ],
)
def test_what_is_no_bound_is_refused(options, words):
    model = tiny("llama")
    with pytest.raises(EigenAttnError, match=words):
        compress(model, [tokens(2, 60)], **options)
    assert model(tokens(1, 5)).logits.isfinite().all()
