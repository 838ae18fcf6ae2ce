"""What a plan says is what weights and caches take."""

import json

import pytest
import torch
from tiny import save_tiny, tiny, tokens
from transformers import AutoConfig
from typer.testing import CliRunner

from eigenattn import EigenAttentionConfig, EigenAttnError, compress
from eigenattn.cache.size import allocated_bytes
from eigenattn.cli import app
from eigenattn.cli.plan import tokens as read_tokens
from eigenattn.models.bases_file import save_bases
from eigenattn.report.planning import GIB, plan_capacity

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
EXACT = 33  # tokens that a window of 32 holds in decoding


def llama_8b(folder) -> str:
    AutoConfig.for_model("llama", **LLAMA_8B).save_pretrained(folder)
    return str(folder)


def test_llama_8b_by_hand(tmp_path):
    found = plan_capacity(
        llama_8b(tmp_path),
        gpu_memory=80,
        context=131072,
        config=EigenAttentionConfig(kv_ratio=0.5, coded=False),
    )
    # Embeddings and head, then a layer's q and o, k and v, gate, up and down, and norms.
    parameters = 2 * 128256 * 4096 + 32 * (2 * 4096**2 + 2 * 1024 * 4096 + 3 * 14336 * 4096 + 2 * 4096) + 4096
    assert parameters == 8_030_261_248  # as published
    assert found.budget == 72 * GIB
    assert found.original.weights == 2 * parameters
    assert found.original.cache == 72 * GIB - 2 * 8_030_261_248
    assert found.original.bytes_per_token == 2 * 8 * 128 * 2 * 32 == 131_072
    assert found.original.sequence == 16 * GIB
    assert found.original.sequences == 3  # 57.04 / 16
    # Two encoders and two decoders [8 * 64, 128], and two means [8 * 128], in each layer.
    assert found.compressed.weights == 2 * (parameters + 32 * (4 * 512 * 128 + 2 * 1024))
    assert found.compressed.bytes_per_token == 65_536
    # 131,040 latents in rooms of 64 are 131,072; 33 tokens exactly.
    assert found.compressed.sequence == 131_072 * 65_536 + EXACT * 131_072
    assert found.compressed.sequences == 7  # 57.03 / 8.004
    rooms = (found.compressed.cache - EXACT * 131_072) // (64 * 65_536)
    assert found.compressed.longest == 64 * rooms + 32


def test_groups_of_gpus(tmp_path):
    name = llama_8b(tmp_path)
    options = {
        "gpu_memory": 24,
        "context": 32768,
        "config": EigenAttentionConfig(coded=True, kv_ratio=0.1875, window=0),
    }
    one = plan_capacity(name, **options, tensor_parallel_size=2)
    many = plan_capacity(name, **options, tensor_parallel_size=2, gpus=16)
    matrices = 8_030_261_248 - 65 * 4096
    assert one.original.weights == 2 * (matrices // 2 + 65 * 4096)
    assert one.original.bytes_per_token == 65_536
    assert one.original.sequences == one.original.cache // (32768 * 65_536)
    assert one.compressed.bytes_per_token == 65_536 * 3 // 16
    assert many.compressed.sequences == 8 * one.compressed.sequences
    assert many.compressed.weights == one.compressed.weights


@pytest.mark.parametrize("name", ["llama", "qwen3", "opt", "phi3", "mistral-sliding", "gemma3"])
@pytest.mark.parametrize("config", [{"kv_ratio": 0.5, "window": 8}, {"kv_ratio": 0.5, "window": 0}])
def test_planned_is_allocated(name, config, tmp_path):
    original = tiny(name)
    model = tiny(name)
    compress(model, tokens(3, 40).split(1), EigenAttentionConfig(rank_multiple=2, ranks="uniform", **config))
    model.save_pretrained(tmp_path / name)
    length, slides = 150, name in ("mistral-sliding", "gemma3")
    ids = tokens(1, length)
    with torch.no_grad():
        caches = []
        for each in (original, model):
            # What slid out of sight is let go as a store grows.
            first, *rest = ids.split([16] * 9 + [1] * 6 if slides else [length - 1, 1], dim=1)
            cache = each(first, use_cache=True).past_key_values
            for piece in rest:
                each(piece, past_key_values=cache, use_cache=True)
            caches.append(cache)
    found = plan_capacity(str(tmp_path / name), gpu_memory=1, context=length)
    assert not found.hypothetical
    for side, cache, each in zip((found.original, found.compressed), caches, (original, model), strict=True):
        assert side.weights == sum(parameter.nbytes for parameter in each.parameters())
        if slides:
            # Up to a token more is held by the model's own cache, and up to a room more by ours.
            assert side.sequence <= allocated_bytes(cache) <= 1.6 * side.sequence
        else:
            assert side.sequence == allocated_bytes(cache)


def test_bases_are_planned_with_their_model(tmp_path):
    base = save_tiny(tmp_path / "base")
    model = tiny("llama")
    config = EigenAttentionConfig(kv_ratio=0.5, rank_multiple=2, window=8, coded=False)
    report = compress(model, tokens(3, 40).split(1), config, provenance={"base_model": str(base)})
    (tmp_path / "bases").mkdir()
    save_bases(model, tmp_path / "bases")
    found = plan_capacity(str(tmp_path / "bases"), gpu_memory=1, context=100)
    assert found.compressed.bytes_per_token == report.bytes_per_token
    assert found.window == 8


@pytest.mark.parametrize(
    "config",
    [
        {"kv_ratio": 0.6},
        {"kv_ratio": 0.37, "coded": False, "window": 0},
        {"kv_ratio": 0.37, "coded": False, "share": "1-4"},
        {"kv_ratio": 0.5, "coded": False, "share": "8kv"},
        {"kv_ratio": 0.1875, "coded": True},
        {"kv_ratio": 0.1875, "coded": True, "share": "2kv"},
    ],
)
def test_supposed_ratio_is_met(config, tmp_path):
    found = plan_capacity(llama_8b(tmp_path), gpu_memory=80, context=4096, config=EigenAttentionConfig(**config))
    ratio = config["kv_ratio"]
    assert 0.999 * ratio < found.compressed.bytes_per_token / found.original.bytes_per_token <= ratio
    assert found.hypothetical


def test_no_room(tmp_path):
    result = CliRunner().invoke(app, ["plan", llama_8b(tmp_path), "--gpu-memory", "8", "--context", "4k"])
    assert result.exit_code == 0, result.output
    assert "leave no memory" in result.output
    found = plan_capacity(llama_8b(tmp_path), gpu_memory=8, context=4096)
    assert found.original.sequences == found.original.longest == 0


def test_command(tmp_path):
    arguments = ["plan", llama_8b(tmp_path / "model"), "--gpu-memory", "80", "--context", "128k", "--kv-ratio", "0.5"]
    for options in ((), ("--share", "4kv"), ("--coded", "--share", "1-2")):
        result = CliRunner().invoke(app, [*arguments, *options, "--json", str(tmp_path / "plan.json")])
        assert result.exit_code == 0, result.output
        assert "not compressed" in result.output
        found = json.loads((tmp_path / "plan.json").read_text())
        assert (found["original"]["sequences"], found["compressed"]["sequences"]) == (3, 7)


@pytest.mark.parametrize("text, expected", [("4096", 4096), ("128k", 131072), ("1.5K", 1536), ("1m", 2**20)])
def test_contexts(text, expected):
    assert read_tokens(text) == expected


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tensor_parallel_size": 3}, "8 KV heads cannot be split evenly over 3 devices"),
        ({"tensor_parallel_size": 2, "gpus": 3}, "3 GPUs cannot be split into groups"),
        ({"gpu_memory": -1}, "above 0"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
        ({"dtype": "int3"}, "unknown dtype"),
        ({"config": EigenAttentionConfig(error_budget=0.1)}, "needs a kv_ratio"),
        ({"config": EigenAttentionConfig(share="3kv", coded=False)}, "3 KV heads cannot share a latent, of 8"),
        (
            {"config": EigenAttentionConfig(share="8kv", coded=False), "tensor_parallel_size": 2},
            "8 to a latent, cannot be split",
        ),
    ],
)
def test_bad_numbers_are_one_line(options, message, tmp_path):
    with pytest.raises(EigenAttnError, match=message):
        plan_capacity(llama_8b(tmp_path), **{"gpu_memory": 80, "context": 4096, **options})
    with pytest.raises(EigenAttnError, match="32768 or 32k"):
        read_tokens("many")


def test_a_compressed_model_has_its_own_ratio(tmp_path):
    model = tiny("llama")
    compress(model, tokens(3, 40).split(1), EigenAttentionConfig(rank_multiple=2, ranks="uniform"))
    model.save_pretrained(tmp_path)
    with pytest.raises(EigenAttnError, match="compressed already"):
        plan_capacity(str(tmp_path), gpu_memory=1, context=100, config=EigenAttentionConfig(kv_ratio=0.5, coded=False))
