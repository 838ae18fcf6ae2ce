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
        ({"coded": True}, "sensitivity"),
    ],
)
def test_target_implies_the_rule(given, ranks):
    assert EigenAttentionConfig(**given).ranks == ranks


def test_default_target():
    assert EigenAttentionConfig().kv_ratio == EigenAttentionConfig(coded=True).kv_ratio == 0.25
    assert EigenAttentionConfig(coded=False).kv_ratio == 0.6


@pytest.mark.parametrize(
    "other", [{"kv_ratio": 0.6}, {"basis": "eigen"}, {"ranks": "uniform"}, {"energy": 0.9}, {"error_budget": 0.02}]
)
def test_latents_are_coded_unless_something_else_is_asked_for(other):
    assert EigenAttentionConfig().coded and EigenAttentionConfig(kv_ratio=0.5).coded
    assert EigenAttentionConfig().basis == EigenAttentionConfig(kv_ratio=0.1, share="3kv").basis == "fisher"
    config = EigenAttentionConfig(**other)
    assert not config.coded
    assert config.basis == other.get("basis", "attention")


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
        {"coded": True, "kv_ratio": 0.51},
        {"coded": True, "energy": 0.9},
        {"coded": True, "ranks": "uniform"},
        {"coded": 1},
        {"share": "3-2"},
        {"share": "0"},
        {"share": "3vk"},
        {"share": 3},
        {"share": "2kv", "refit": True},
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


@pytest.mark.parametrize(
    ("settings", "turns_keys", "share"),
    [
        ({}, False, "1kv"),
        ({"kv_ratio": 0.14}, False, "1kv"),
        ({}, True, "1"),
        ({"window": 0}, False, "1"),
        ({"coded": False}, False, "1"),
        ({"coded": True, "basis": "attention"}, False, "1"),
        ({"share": "1"}, False, "1"),
        ({"share": "2"}, False, "2"),
    ],
)
def test_what_is_shared_by_default_follows_from_the_model(settings, turns_keys, share):
    config = EigenAttentionConfig(**settings)
    assert config.share == settings.get("share")
    chosen = config.for_model(turns_keys)
    assert chosen.share == share
    assert chosen.to_dict() == config.to_dict() | {"share": share}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1", (1, 1, False)), ("3", (3, 3, False)), ("1-3", (1, 3, False)), ("2-6", (2, 6, False)), ("3kv", (3, 3, True))],
)
def test_what_is_shared_is_read_and_written(text, expected):
    sharing = EigenAttentionConfig(share=text).sharing
    assert sharing == expected
    assert str(sharing) == text
    assert [heads for _, heads in sharing.kinds] == ([3] if expected[2] else list(expected[:2]))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"kv_ratio": 0.5}, {"kv_ratio": 0.5}),
        ({"bits_per_element": 3.0}, {"coded": True, "kv_ratio": 0.1875}),
        ({"energy": 0.9, "shared_heads": 2}, {"energy": 0.9, "share": "2"}),
        ({"kv_ratio": 0.5, "shared_heads": 1, "shared_values": 3}, {"kv_ratio": 0.5, "share": "1-3"}),
        ({"kv_ratio": 0.5, "shared_heads": 3, "shared_values": 3, "joint": True}, {"kv_ratio": 0.5, "share": "3kv"}),
    ],
)
def test_version_1_is_read(old, new):
    nothing = {"kv_ratio": None, "error_budget": None, "energy": None, "bits_per_element": None}
    read = EigenAttentionConfig.from_dict({**nothing, **old, "version": 1})
    assert read == EigenAttentionConfig(**({"coded": False, "basis": "attention", "share": "1"} | new))


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits_per_element": 0},
        {"bits_per_element": 10**400},
        {"bits_per_element": "3"},
        {"shared_heads": 0},
        {"shared_heads": True},
        {"shared_heads": 2, "shared_values": 3},
        {"joint": 1},
    ],
)
def test_wrong_values_of_version_1_are_one_line(wrong):
    with pytest.raises(EigenAttnError) as error:
        EigenAttentionConfig.from_dict({**wrong, "version": 1})
    assert "\n" not in str(error.value)


def test_decoders_are_refitted_without_a_window():
    assert EigenAttentionConfig(window=0, coded=False).refit
    assert not EigenAttentionConfig(window=0).refit
    assert not EigenAttentionConfig(coded=False).refit
    assert not EigenAttentionConfig(window=0, basis="eigen", ranks="error_budget").refit
    assert EigenAttentionConfig(refit=True).refit
    with pytest.raises(EigenAttnError, match="refit"):
        EigenAttentionConfig(refit=1)
