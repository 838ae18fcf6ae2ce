import pytest

from eigenattn import EigenAttentionConfig, EigenAttnError


def test_json_round_trip():
    config = EigenAttentionConfig(energy=0.9, rank_multiple=4)
    assert EigenAttentionConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("given", "ranks"),
    [
        ({}, "sensitivity"),
        ({"kv_ratio": 0.5}, "sensitivity"),
        ({"kv_ratio": 0.5, "ranks": "uniform"}, "uniform"),
        ({"energy": 0.9}, "energy"),
        ({"error_budget": 0.02}, "error_budget"),
        ({"bits_per_element": 3}, "sensitivity"),
    ],
)
def test_target_implies_the_rule(given, ranks):
    assert EigenAttentionConfig(**given).ranks == ranks


def test_default_target():
    assert EigenAttentionConfig().kv_ratio == 0.6


@pytest.mark.parametrize(
    "wrong",
    [
        {"kv_ratio": 0.0},
        {"kv_ratio": 1.5},
        {"kv_ratio": float("nan")},
        {"kv_ratio": "half"},
        {"energy": 0},
        {"energy": 1.01},
        {"error_budget": -1.0},
        {"rank_multiple": 0},
        {"kv_ratio": 0.5, "energy": 0.9},
        {"energy": 0.9, "ranks": "uniform"},
        {"bits_per_element": 0},
        {"bits_per_element": 9},
        {"bits_per_element": 3, "kv_ratio": 0.5},
        {"bits_per_element": 3, "ranks": "uniform"},
        {"bits_per_element": 3, "basis": "eigen"},
        {"version": 99},
    ],
)
def test_wrong_values_are_one_line(wrong):
    with pytest.raises(EigenAttnError) as error:
        EigenAttentionConfig(**wrong)
    assert "\n" not in str(error.value)


def test_unknown_names_are_refused():
    with pytest.raises(EigenAttnError, match="colour"):
        EigenAttentionConfig.from_dict({"colour": "red"})


@pytest.mark.parametrize("shrinkage", [-0.1, 1, "0.3", True])
def test_shrinkage_is_a_share(shrinkage):
    with pytest.raises(EigenAttnError, match="shrinkage"):
        EigenAttentionConfig(shrinkage=shrinkage)


def test_what_goes_with_the_attention_basis_only():
    with pytest.raises(EigenAttnError, match="shrinkage"):
        EigenAttentionConfig(basis="eigen", shrinkage=0.3)


def test_decoders_are_refitted_without_a_window():
    assert EigenAttentionConfig(window=0).refit
    assert not EigenAttentionConfig().refit
    assert not EigenAttentionConfig(window=0, basis="eigen", ranks="error_budget").refit
    assert EigenAttentionConfig(refit=True).refit
    with pytest.raises(EigenAttnError, match="refit"):
        EigenAttentionConfig(refit=1)
