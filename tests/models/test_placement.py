"""Models whose weights lie partly on disk: compressed, saved and run as in memory."""

import json

import pytest
import torch
from helpers import Killed, same
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny, tokens
from transformers import AutoModelForCausalLM

from eigenattn import EigenAttentionConfig, EigenAttnError, attach, compress
from eigenattn.compression import measure, resuming
from eigenattn.journal import Journal
from eigenattn.models.bases_file import save_bases
from eigenattn.models.conversion import eigen_layers
from eigenattn.models.loading import Source, load_model
from eigenattn.models.placement import loaded, offloaded, save_model
from eigenattn.workflows.calibrate import CalibrationText
from eigenattn.workflows.compress import compress_checkpoint

# transformers before 5.23 takes the meta device of embeddings on disk for the model's.
pytestmark = pytest.mark.filterwarnings(
    "ignore:You are calling .generate.. with the `input_ids` being on a device type"
)

BATCHES = list(tokens(4, 40).split(1))
LAYERS = 4
TOP = {
    "llama": ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"),
    "opt": ("model.decoder.embed_tokens", "model.decoder.layers", "model.decoder.embed_positions", "lm_head"),
    "gpt2": ("transformer.wte", "transformer.h", "transformer.wpe", "transformer.ln_f", "lm_head"),
}
TOP["phi3"] = TOP["qwen3"] = TOP["llama"]
TOP["opt"] += ("model.decoder.final_layer_norm",)


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level("ERROR")


def spread_map(name: str) -> dict[str, str]:
    """The first layer in memory, with all that is small; the others and the embeddings on disk."""
    first, layers, *rest = TOP[name]
    places = {**dict.fromkeys(rest, "cpu"), **{f"{layers}.{i}": "disk" if i else "cpu" for i in range(LAYERS)}}
    # Tied weights stay together.
    return {first: "cpu" if name in ("opt", "gpt2") else "disk", **places}


def made(name: str, folder, dtype=torch.float32):
    layers = {"n_layer": LAYERS} if name == "gpt2" else {"num_hidden_layers": LAYERS}
    tiny(name, **layers).to(dtype).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(
        folder, device_map=spread_map(name)
    )


def weights(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(
    "name, config",
    [
        ("llama", {"kv_ratio": 0.5, "window": 8}),
        ("llama", {"kv_ratio": 0.5, "window": 0}),
        ("llama", {"coded": True, "kv_ratio": 0.1875, "window": 8}),
        ("llama", {"error_budget": 0.05, "window": 0}),
        ("phi3", {"kv_ratio": 0.5, "window": 0}),
        ("qwen3", {"kv_ratio": 0.5, "window": 0, "share": "2"}),
        ("llama", {"kv_ratio": 0.5, "window": 8, "share": "2kv"}),
        ("opt", {"kv_ratio": 0.5, "window": 0}),
        ("gpt2", {"kv_ratio": 0.5, "window": 0, "basis": "eigen"}),
    ],
)
def test_compressed_as_in_memory(name, config, tmp_path):
    settings = EigenAttentionConfig(rank_multiple=2, **config)
    whole, spread = made(name, tmp_path / "base")
    assert any(map(offloaded, spread.modules()))
    reports = [compress(model, BATCHES, settings) for model in (whole, spread)]
    assert reports[0].layers == reports[1].layers
    save_model(whole, tmp_path / "whole")
    save_model(spread, tmp_path / "spread")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "spread"))
    ids = tokens(2, 24)
    with torch.no_grad():
        expected = whole(ids).logits
        assert torch.equal(spread(ids).logits, expected)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "spread", device_map=spread_map(name))
        assert torch.equal(again(ids).logits, expected)
    options = {"max_new_tokens": 12, "do_sample": False, "min_new_tokens": 12}
    written = whole.generate(ids, **options)
    assert torch.equal(again.generate(ids, **options), written)
    # Between forward passes nothing that was offloaded is in memory.
    layer = eigen_layers(again)[2]
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert all(module.weight.is_meta for module in eigen_layers(spread)[2].children() if offloaded(module))


def test_layers_measured_together_cost_what_they_cost_alone(tmp_path, monkeypatch):
    whole, spread = made("llama", tmp_path / "base", torch.bfloat16)
    config = EigenAttentionConfig(kv_ratio=0.4, rank_multiple=2, window=8, coded=False)
    expected = compress(whole, BATCHES, config)
    monkeypatch.setattr(measure, "LAYERS_A_PASS", 3)
    assert compress(spread, BATCHES, config).layers == expected.layers


def test_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(resuming, "SAVE_SECONDS", 0.0)
    config = EigenAttentionConfig(kv_ratio=0.5, rank_multiple=2, window=0, refit=False, coded=False)
    whole, spread = made("llama", tmp_path / "base")
    compress(whole, BATCHES, config)

    def interrupted():
        yield from BATCHES[:3]
        raise Killed

    with pytest.raises(Killed), Journal(tmp_path / "out", {}) as journal:
        compress(spread, interrupted(), config, journal=journal)
    assert offloaded(spread.model.layers[1].self_attn.q_proj)
    with Journal(tmp_path / "out", {}) as journal:
        assert journal.read("statistics")[1]["batches"] == 3
        compress(spread, BATCHES, config, journal=journal)
    save_model(whole, tmp_path / "whole")
    save_model(spread, tmp_path / "spread")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "spread"))


def test_command(tmp_path):
    base = save_tiny(tmp_path / "base")
    (tmp_path / "fox.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i else "cpu" for i in range(3)}
    (tmp_path / "places.json").write_text(json.dumps(places))
    config = EigenAttentionConfig(kv_ratio=0.5, rank_multiple=2, window=0, coded=False)
    text = CalibrationText([str(tmp_path / "fox.txt"), "self"], samples=4, length=32)
    found = []
    for name, device in (("whole", "cpu"), ("spread", str(tmp_path / "places.json"))):
        compress_checkpoint(str(base), tmp_path / name, config, text, device=device)
        found.append(weights(tmp_path / name))
    assert same(*found)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "fox.txt", "places.json", "whole", "spread"}


def test_bases_attach_to_a_spread_model(tmp_path):
    whole, spread = made("llama", tmp_path / "base")
    compress(whole, BATCHES, EigenAttentionConfig(kv_ratio=0.5, rank_multiple=2, window=8, coded=False))
    (tmp_path / "bases").mkdir()
    save_bases(whole, tmp_path / "bases")
    attach(spread, tmp_path / "bases")
    ids = tokens(1, 24)
    with torch.no_grad():
        assert torch.equal(spread(ids).logits, whole(ids).logits)


def test_missing_map_on_disk_is_found(tmp_path):
    whole, _ = made("llama", tmp_path / "base")
    compress(whole, BATCHES, EigenAttentionConfig(kv_ratio=0.5, rank_multiple=2, window=8, coded=False))
    whole.save_pretrained(tmp_path / "small")
    path = tmp_path / "small" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.2.self_attn.key_encoder"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(EigenAttnError, match="lacks layer 2's key_encoder"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small", device_map=spread_map("llama"))


def test_damaged_weight_on_disk_is_named(tmp_path):
    model = tiny("llama", num_hidden_layers=LAYERS)
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "base")
    spread = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=spread_map("llama"))
    with pytest.raises(EigenAttnError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        compress(spread, BATCHES, EigenAttentionConfig(window=8, coded=False))


def test_loaded_stays_loaded_and_goes_again(tmp_path):
    _, spread = made("llama", tmp_path / "base")
    layer = spread.model.layers[1]
    ids = tokens(1, 8)
    with torch.no_grad(), loaded(layer):
        weight = layer.mlp.up_proj.weight
        spread(ids)
        assert layer.mlp.up_proj.weight is weight and not weight.is_meta
    assert layer.mlp.up_proj.weight.is_meta
    spread(ids)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"device": "cpu", "max_memory": {"cpu": "1GB"}}, "max_memory shapes a device map"),
        ({"device": "absent.json"}, "could not be read"),
        ({"device": "auto", "max_memory": {"cpu": "1 parsec"}}, "could not be loaded"),
    ],
)
def test_bad_placement_is_one_line(arguments, message, tmp_path):
    base = save_tiny(tmp_path / "base")
    with pytest.raises(EigenAttnError, match=message):
        load_model(Source.of(str(base)), **arguments)


def test_made_map_spills_to_disk(tmp_path):
    base = save_tiny(tmp_path / "base")
    with safe_open(base / "model.safetensors", framework="pt") as file:
        assert any("lm_head" in name for name in file.keys())  # noqa: SIM118 (not a mapping)
    model = load_model(Source.of(str(base)), device="auto", max_memory={"cpu": "200KB"})
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
