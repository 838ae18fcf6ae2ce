"""What `tests/every_type.py` finds, for some types; and that those it has found to work are still claimed to."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from every_type import TABLE, built, default_of, error, failure, names, with_bases
from helpers import generate, in_pieces, padded
from tiny import tokens
from transformers import AutoConfig, DynamicCache, StaticCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from eigenattn.compression.folding import attach
from eigenattn.errors import EigenAttnError
from eigenattn.models.conversion import convert_attention, eigen_layers
from eigenattn.models.families import family_of
from eigenattn.models.recognition import recognised

TYPES = json.loads(TABLE.read_text(encoding="utf-8"))["types"]
WORKING = sorted({name.partition(" (")[0] for name, each in TYPES.items() if each["verdict"] == "works"})
# One of each kind that `tests/tiny.py` has none of.
SOME = ["gemma4_text", "gpt_oss", "qwen3_next", "llama4_text", "hunyuan_v1_dense", "granitemoehybrid", "falcon_h1"]
SOME += ["deepseek_v2", "bailing_hybrid"]


def skip_without(model_type: str) -> None:
    """Skip where transformers does not have a type."""
    if model_type not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {model_type}")


@pytest.mark.parametrize("name", SOME)
def test_a_type_works(name):
    skip_without(name)
    assert failure(built(name).double()) is None


@pytest.mark.parametrize("name", WORKING)
def test_none_that_worked_is_refused(name):
    skip_without(name)
    family_of(AutoConfig.for_model(name))


def test_the_table_is_of_all_types():
    if json.loads(TABLE.read_text(encoding="utf-8"))["transformers"] != transformers.__version__:
        pytest.skip("the table is of another transformers: run python tests/every_type.py --write")
    assert list(TYPES) == [f"{name} (wrapper)" if wrapped else name for name, wrapped in names()]
    assert {each["verdict"] for each in TYPES.values()} <= {"works", "refused", "not built"}


def test_a_drafter_is_refused_by_what_it_is():
    """Its text model alone would pass for one that works."""
    skip_without("gemma4_assistant")
    with pytest.raises(EigenAttnError, match="it reads the cache of another model"):
        family_of(default_of("gemma4_assistant"))


def test_a_copy_is_recognised_by_its_code():
    known = {"qwen3": "Qwen3Attention", "cohere": "CohereAttention", "llama": "LlamaAttention"}
    assert recognised(type(AutoConfig.for_model("granite")), known) == ("llama", "GraniteAttention")
    inside = {"qwen3_vl_text": "Qwen3VLTextAttention"}  # of a wrapper, and no model of its own
    experts = type(AutoConfig.for_model("qwen3_vl_moe").get_text_config())
    assert recognised(experts, inside) == ("qwen3_vl_text", "Qwen3VLMoeTextAttention")
    assert recognised(type(AutoConfig.for_model("qwen2")), known) is None  # it passes a sliding window
    assert recognised(type(AutoConfig.for_model("glm")), known) is None  # it rotates otherwise


def test_what_runs_known_code_and_computes_something_else_is_refused(monkeypatch):
    skip_without("arcee")
    model = built("arcee")
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, output: output)
        layer.self_attn.register_forward_hook(lambda module, args, output: (2 * output[0], output[1]))
    before = model(tokens(1, 8)).logits
    with pytest.raises(EigenAttnError, match="computes something else"):
        convert_attention(model)
    assert not eigen_layers(model)
    assert torch.equal(model(tokens(1, 8)).logits, before)


@torch.no_grad()
def test_rows_of_positions_that_differ_are_kept_with_the_tokens():
    """As in images: three rows, which jump, and differ by token."""
    skip_without("qwen3_vl_text")
    model = built("qwen3_vl", wrapped=True).double()
    ids = tokens(2, 12) % 100
    rows = torch.randint(0, 30, (3, 2, 12), generator=torch.Generator().manual_seed(0))
    expected = model(ids, position_ids=rows, use_cache=False).logits
    convert_attention(model)
    for attention in eigen_layers(model):
        attach(attention, (), 4)
    assert (model(ids, position_ids=rows, use_cache=False).logits - expected).abs().max() < 1e-6 * expected.abs().max()
    cache, found = DynamicCache(config=model.config), []
    for start, stop in ((0, 7), (7, 8), (8, 12)):
        part = rows[..., start:stop]
        out = model(ids[:, start:stop], position_ids=part, past_key_values=cache, use_cache=True)
        found.append(out.logits)
    assert (torch.cat(found, 1) - expected).abs().max() < 1e-6 * expected.abs().max()
    text = in_pieces(model, ids, DynamicCache(config=model.config), [7, 1, 4])
    assert (text - model(ids, use_cache=False).logits).abs().max() < 1e-6 * expected.abs().max()


def test_layers_of_several_shapes():
    """As the larger Gemma 4 have them: layers that see everything have other heads, whose values the keys' projection
    makes too. Such a configuration answers for no layer but a given one."""
    skip_without("gemma4_text")
    larger = {"attention_k_eq_v": True, "global_head_dim": 32, "num_global_key_value_heads": 1}
    model = built("gemma4_text", **larger, num_kv_shared_layers=0, hidden_size_per_layer_input=0).double()
    converted = copy.deepcopy(model)
    convert_attention(converted)
    assert {(layer.kv_heads, layer.head_dim) for layer in eigen_layers(converted)} == {(2, 16), (1, 32)}
    assert failure(model) is None


@torch.no_grad()
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("keep", [1, 3])
def test_where_the_last_predictions_alone_are_asked_for(keep, window):
    """As `generate` does: layers that read an earlier one's cache are then given the queries of these alone."""
    skip_without("gemma4_text")
    model = with_bases(built("gemma4_text").double(), (12, 8), window)
    ids = tokens(2, 20) % 100
    left, mask = padded(ids, 3)
    exact = model(ids, use_cache=False).logits[:, -keep:]
    for cache in (None, DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=32)):
        options = {"past_key_values": cache, "use_cache": cache is not None, "logits_to_keep": keep}
        assert error(model(left, attention_mask=mask, **options).logits, exact) < 1e-5
        if cache is not None:
            cache.reset()
            assert error(model(ids, **options).logits, exact) < 1e-5
    assert torch.equal(generate(model, left, mask)[:, 3:], generate(model, left, mask, use_cache=False)[:, 3:])
