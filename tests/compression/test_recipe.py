"""Every basis with every rank rule and every feature: it works, or is refused by name. New ones come from outside."""

import dataclasses

import pytest
import torch
from tiny import converted, tiny, tokens

from eigenattn import EigenAttentionConfig, EigenAttnError, compress
from eigenattn.calibration.statistics import LayerMoments
from eigenattn.compression.basis import Basis
from eigenattn.compression.methods import BASES, BasisMethod
from eigenattn.compression.ranks import RANK_RULES, RankRule
from eigenattn.compression.recipe import FEATURES, Recipe, Text, check_supported
from eigenattn.evaluation.grid import Grid
from eigenattn.models.conversion import layouts_of
from eigenattn.progress import Clock, TokenProgress

PLAIN = {"kv_ratio": 0.5, "coded": False, "rank_multiple": 4, "window": 0, "refit": False}
# What asks for a feature; coded latents leave the rank rule to the configuration.
ASKING = {
    "window": {"window": 4},
    "coded": {"coded": True, "kv_ratio": 0.2, "ranks": None},
    "shared heads": {"share": "1-2"},
    "both sides": {"share": "1kv"},
    "shrinkage": {"shrinkage": 0.3},
    "refit": {"refit": True},
}
BATCHES = [tokens(2, 40), tokens(2, 40, seed=5)]


def test_every_feature_is_asked_for():
    assert list(ASKING) == list(FEATURES)
    for feature, asking in ASKING.items():
        config = EigenAttentionConfig(**{**PLAIN, **asking})
        assert [name for name, asks in FEATURES.items() if asks(config)] == [feature]


@torch.no_grad()
@pytest.mark.parametrize("feature", [None, *FEATURES])
@pytest.mark.parametrize("ranks", sorted(RANK_RULES))
@pytest.mark.parametrize("basis", sorted(BASES))
def test_it_works_or_is_refused_by_name(basis, ranks, feature):
    config = EigenAttentionConfig(**{**PLAIN, "basis": basis, "ranks": ranks, **ASKING.get(feature, {})})
    if feature is not None and feature not in BASES[basis].features:
        with pytest.raises(EigenAttnError, match=f"{basis!r} does not support {feature}") as error:
            compress(tiny("llama"), BATCHES, config)
        assert "\n" not in str(error.value)
        with pytest.raises(EigenAttnError, match=f"does not support {feature}"):
            check_supported(config)
        return
    model = tiny("llama")
    report = compress(model, BATCHES, config)
    assert 0 < report.kv_ratio <= config.kv_ratio
    assert model(tokens(2, 30)).logits.isfinite().all()
    sharing = config.sharing
    for layout in layouts_of(model):
        assert layout.window == config.window and layout.coded == config.coded
        for latent in layout.latents:
            assert latent.verbatim or latent.heads == (sharing.keys if "key" in latent.sides else sharing.values)
            assert latent.verbatim or (len(latent.sides) == 2) == (feature == "both sides")


@pytest.mark.parametrize("ranks", sorted(RANK_RULES))
@pytest.mark.parametrize("target", ["kv_ratio", "energy", "error_budget"])
def test_rank_rules_take_their_targets(target, ranks):
    options = {"rank_multiple": 4, "window": 0, target: 0.5}
    if target in RANK_RULES[ranks].targets:
        assert layouts_of(compressed(EigenAttentionConfig(**options, ranks=ranks)))
        return
    with pytest.raises(EigenAttnError, match=target):
        check_supported(EigenAttentionConfig(**options, ranks=ranks))


def compressed(config):
    model = tiny("llama")
    compress(model, BATCHES, config)
    return model


def identity(moments):
    """A basis that looks at nothing: the first dimensions of every head."""
    unit = torch.eye(moments.key.shape[-1], dtype=torch.float64).expand_as(moments.key)
    falling = torch.arange(unit.shape[-1], 0, -1, dtype=torch.float64).expand(len(unit), -1)
    return Basis(unit, unit, falling), Basis(unit, unit, falling, sides=("value",))


def pyramid(problem):
    """Early layers keep more than late ones."""
    layers = len(problem.spectra)
    full = [spectrum.shape[-1] for spectrum in problem.flat]
    for base in range(max(full), 0, -1):
        shares = [base - 2 * layer for layer in range(layers) for _ in problem.spectra[layer]]
        ranks = [
            max((rank for rank in problem.allowed(spectrum) if rank <= share), default=problem.allowed(spectrum)[0])
            for spectrum, share in zip(problem.flat, shares, strict=True)
        ]
        if problem.ratio(problem.by_layer(ranks)) <= problem.kv_ratio:
            return problem.by_layer(ranks)
    return problem.smallest()


@pytest.fixture
def _outside(monkeypatch):
    """What another package does when it is imported."""
    method = BasisMethod(lambda attention, *_: LayerMoments.of(attention), identity, frozenset({"window"}))
    monkeypatch.setitem(BASES, "first-dimensions", method)
    monkeypatch.setitem(RANK_RULES, "pyramid", RankRule(pyramid))


@torch.no_grad()
@pytest.mark.usefixtures("_outside")
def test_a_basis_and_a_rank_rule_from_outside(monkeypatch):
    options = {"kv_ratio": 0.5, "rank_multiple": 2, "basis": "first-dimensions", "ranks": "pyramid"}
    model = compressed(EigenAttentionConfig(**options, window=4))
    ranks = [[latent.rank for latent in layout.latents] for layout in layouts_of(model)]
    assert ranks == [[10, 10], [8, 8], [6, 6]]
    decoder = model.model.layers[0].self_attn.key_decoder
    assert torch.equal(decoder.view(2, 10, 16)[0], torch.eye(16)[:10])
    assert [cell.key for cell in Grid([0.5], bases=["first-dimensions"], ranks=["pyramid"]).cells()] == [
        "first-dimensions/pyramid/32/0.5"
    ]
    with pytest.raises(EigenAttnError, match="does not support shrinkage: leave it out, or choose one of attention"):
        compress(tiny("llama"), BATCHES, EigenAttentionConfig(**options, shrinkage=0.1))
    monkeypatch.setitem(RANK_RULES, "energy", RankRule(pyramid))
    with pytest.raises(EigenAttnError, match="'energy' takes kv_ratio, not energy"):
        check_supported(EigenAttentionConfig(energy=0.9))


def test_a_stream_is_read_once_and_held_if_need_be():
    model, _ = converted()
    for again, source in ((False, iter(BATCHES)), (True, iter(BATCHES)), (False, BATCHES)):
        text = Text(source, model, again)
        first = [batch.input_ids for batch in text.first_pass()]
        assert len(first) == 2 and (text.tokens, text.longest) == (160, 40)
        second = [batch.input_ids for batch in text]
        expected = first if again or source is BATCHES else []
        assert len(second) == len(expected) and all(map(torch.equal, second, expected))


def test_steps_are_made_once():
    model, layers = converted()
    clock = Clock()
    config = EigenAttentionConfig(kv_ratio=0.5, rank_multiple=4, window=4, coded=False)
    recipe = Recipe(model, layers, config, BATCHES, TokenProgress(False), clock=clock)
    assert not clock.seconds
    recipe.choose(config)
    spent = clock.seconds["statistics"]
    chosen = recipe.choose(dataclasses.replace(config, kv_ratio=0.25, coded=True))
    assert clock.seconds["statistics"] == spent and clock.seconds["quantisers"] > 0
    assert all(basis.quantiser is not None for bases in chosen for basis in bases)
