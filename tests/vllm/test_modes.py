"""Ways to run an engine that are refused, without vLLM."""

from types import SimpleNamespace

import pytest

from eigenattn import EigenAttnError
from eigenattn.vllm.bases import OPTION, VARIABLE
from eigenattn.vllm.modes import check_modes, check_served, check_states, positions_in_rows

PLAIN = {
    "cache_config.cache_dtype": "auto",
    "parallel_config.decode_context_parallel_size": 1,
    "parallel_config.pipeline_parallel_size": 1,
    "scheduler_config.disable_chunked_mm_input": False,
    "scheduler_config.disable_hybrid_kv_cache_manager": False,
    "speculative_config.method": "ngram",
    "kv_transfer_config": None,
    "model_config.is_mm_prefix_lm": False,
    "model_config.uses_mrope": False,
    "model_config.mrope_num_dims": 3,
    "model_config.multimodal_config": None,
}


IMAGES_IN_ROWS = {
    "model_config__uses_mrope": True,
    "model_config__multimodal_config": SimpleNamespace(language_model_only=False),
}


def engine(**options) -> SimpleNamespace:
    """An engine's configuration; a name's dots are two underscores here."""
    config = SimpleNamespace()
    for name, value in (PLAIN | {name.replace("__", "."): value for name, value in options.items()}).items():
        part, _, field = name.partition(".")
        if field:
            vars(config).setdefault(part, SimpleNamespace())
            setattr(getattr(config, part), field, value)
        else:
            setattr(config, part, value)
    return config


def test_images_are_served():
    check_modes(engine(**IMAGES_IN_ROWS))
    check_modes(engine(model_config__is_mm_prefix_lm=True, scheduler_config__disable_chunked_mm_input=True))
    assert positions_in_rows(engine(**IMAGES_IN_ROWS)) == 3
    options = IMAGES_IN_ROWS | {"model_config__multimodal_config": SimpleNamespace(language_model_only=True)}
    text = engine(**options, parallel_config__pipeline_parallel_size=2)
    check_modes(text)
    assert positions_in_rows(text) is positions_in_rows(engine()) is None


@pytest.mark.parametrize("method", ["ngram", "draft_model", "eagle", "eagle3", "mtp"])
def test_drafts_are_served(method):
    check_modes(engine(speculative_config__method=method))
    no_drafts = engine()
    no_drafts.speculative_config = None
    check_modes(no_drafts)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"cache_config__cache_dtype": "fp8"}, "leave --kv-cache-dtype at auto"),
        ({"parallel_config__decode_context_parallel_size": 2}, "use tensor or pipeline parallel"),
        ({"speculative_config__method": "medusa"}, "by medusa is not supported .*: use ngram, or one of draft_model"),
        (
            {"speculative_config__method": "eagle", "parallel_config__pipeline_parallel_size": 2},
            "in pipelines only ngram drafts",
        ),
        ({"kv_transfer_config": SimpleNamespace()}, "KV connectors"),
        ({"model_config__is_mm_prefix_lm": True}, "with --disable-chunked-mm-input, or text alone by --language"),
        (IMAGES_IN_ROWS | {"parallel_config__pipeline_parallel_size": 2}, "use tensor parallel, or --language"),
        (IMAGES_IN_ROWS | {"speculative_config__method": "eagle"}, "only ngram drafts"),
        (IMAGES_IN_ROWS | {"model_config__mrope_num_dims": 4}, "in 4 rows are not served"),
        ({"scheduler_config__disable_hybrid_kv_cache_manager": True}, "leave it on"),
    ],
)
def test_other_modes_are_refused(options, says):
    with pytest.raises(EigenAttnError, match=says):
        check_modes(engine(**options))


def test_states_that_cpus_do_not_compute_are_refused():
    check_states(["MAMBA2", "LINEAR"], "cpu")
    check_states(["SHORT_CONV", "MAMBA1"], "cuda")
    with pytest.raises(EigenAttnError, match="not right with Mamba 1 and short convolutions"):
        check_states(["SHORT_CONV", "MAMBA1"], "cpu")


def test_bases_for_a_class_without_them_are_refused(monkeypatch):
    """What is served as it is, drafts, and a part of a model whose whole was looked at, are not."""
    monkeypatch.delenv(VARIABLE, raising=False)
    config = SimpleNamespace(architecture="Another", hf_config=SimpleNamespace(), is_submodel_config=False)
    engine = SimpleNamespace(model_config=config, additional_config={}, speculative_config=None)
    check_served(engine, {"Served"})
    engine.additional_config = {OPTION: "bases"}
    check_served(engine, {"Another"})
    with pytest.raises(EigenAttnError, match="Another is not served with latents"):
        check_served(engine, {"Served"})
    config.is_submodel_config = True
    check_served(engine, {"Served"})
    config.is_submodel_config = False
    engine.speculative_config = SimpleNamespace(method="eagle", draft_model_config=config)
    check_served(engine, {"Served"})
    engine.speculative_config, engine.additional_config = None, {}
    monkeypatch.setenv(VARIABLE, "bases")
    with pytest.raises(EigenAttnError, match="generate by transformers"):
        check_served(engine, {"Served"})
