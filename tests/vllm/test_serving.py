"""Compressed checkpoints in vLLM, against our own `generate`. Needs an environment with vLLM: `make test-vllm`."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny import character_tokenizer, compressed, tiny, tokens
from transformers import AutoModelForCausalLM

from eigenattn import EigenAttentionConfig, EigenAttnError, compress
from eigenattn.models.checkpoint_format import EigenAttnCheckpointConfig, mark_compressed
from eigenattn.models.conversion import layouts_of
from eigenattn.vllm import SUPPORTED, check_version

# This folder is a namespace package of the same name, which has no origin.
SPEC = find_spec("vllm")
NEEDS_VLLM = [
    pytest.mark.vllm,
    pytest.mark.skipif(SPEC is None or SPEC.origin is None, reason="vLLM is not installed"),
]

LENGTHS = (5, 90, 17, 64, 33, 1, 128, 40)
PROMPTS = [tokens(1, length, seed=length)[0].tolist() for length in LENGTHS]
NEW_TOKENS = 24
SMALL = {"max_model_len": 256, "max_num_seqs": 8}
# Attention heads of 32 dimensions, the smallest that vLLM's own attention has.
WIDE = {"hidden_size": 128, "num_hidden_layers": 4, "max_position_embeddings": 4096}

# name -> (tiny model, window, rank rule, options of the engine, and what is shared if anything)
SERVED = {
    "llama-folded": ("llama", 0, "uniform", {}),
    "llama": ("llama3", 32, "sensitivity", {}),
    "llama-bias": ("llama-bias", 8, "uniform", {}),
    "llama-in-chunks": ("llama", 32, "uniform", {"max_num_batched_tokens": 32}),
    "llama-short-of-cache": ("llama", 0, "uniform", {"kv_cache_memory_bytes": 250_000, "block_size": 16}),
    "mistral": ("mistral", 8, "uniform", {}),
    "qwen2": ("qwen2", 32, "uniform", {}),
    "qwen3-folded": ("qwen3", 0, "uniform", {}),
    "qwen3": ("qwen3", 32, "sensitivity", {}),
    "opt-folded": ("opt", 0, "sensitivity", {}),
    "opt": ("opt", 32, "sensitivity", {}),
    "mpt-folded": ("mpt", 0, "uniform", {}),
    "mpt": ("mpt", 8, "uniform", {"max_num_batched_tokens": 32}),
    "mpt-clip-folded": ("mpt-clip", 0, "uniform", {}),
    "llama-shared": ("llama", 8, "sensitivity", {}, "2"),
    "opt-shared-0": ("opt", 0, "uniform", {}, "2-4"),
    "llama-values": ("llama3", 32, "sensitivity", {}, "1-2"),
    "opt-values": ("opt", 8, "uniform", {"max_num_batched_tokens": 32}, "1-2"),
    "qwen3-joint": ("qwen3", 8, "sensitivity", {}, "1kv"),
    "mpt-joint-0": ("mpt", 0, "uniform", {}, "4kv"),
}
PARALLEL = {
    "tensor": ("llama", 8, "uniform", {"tensor_parallel_size": 2}),
    "tensor-values": ("opt", 8, "uniform", {"tensor_parallel_size": 2}, "1-2"),
    # With enforce_eager vLLM 0.32 fails here for its own models too.
    "pipeline": ("opt", 8, "uniform", {"pipeline_parallel_size": 2, "enforce_eager": False}),
}


def save(folder: Path, name: str, window: int, ranks: str, share: str = "1", **overrides) -> float:
    """Write a compressed tiny model, and give its KV ratio."""
    model = tiny(name, **overrides)
    method = EigenAttentionConfig(kv_ratio=0.6, rank_multiple=2, window=window, ranks=ranks, share=share)
    report = compress(model, [tokens(4, 96)], method)
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return report.kv_ratio


def generated(folder: Path) -> list[list[int]]:
    """Greedy tokens of our own `generate`, one prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True, eos_token_id=None)
        found.append(out[0, len(prompt) :].tolist())
    return found


def run_engines(folder: Path, jobs: list[dict]) -> list[dict]:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).with_name("engine.py")), "jobs.json", "results.json"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


def job(model: Path | str, prompts: list | None = None, **options) -> dict:
    options = {"model": str(model)} | options
    return {"options": options, "prompts": prompts or [], "new_tokens": NEW_TOKENS}


def serve(root: Path, served: dict) -> dict[str, dict]:
    """Results by name, with what `generate` gives as `expected`."""
    expected, jobs = {}, []
    for name, (model, window, ranks, options, *share) in served.items():
        save(root / name, model, window, ranks, *share)
        expected[name] = generated(root / name)
        jobs.append(job(root / name, PROMPTS, **SMALL | options))
    results = run_engines(root, jobs)
    return {name: result | {"expected": expected[name]} for name, result in zip(served, results, strict=True)}


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> dict[str, dict]:
    return serve(tmp_path_factory.mktemp("served"), SERVED)


@pytest.mark.parametrize("name", SERVED)
class TestServed:
    pytestmark = NEEDS_VLLM

    def test_tokens_are_those_of_generate(self, served, name):
        """Eight requests of mixed lengths at once, chunked or preempted, and again out of the prefix cache."""
        result = served[name]
        assert "error" not in result, result
        assert result["tokens"] == result["expected"]
        assert result["again"] == result["expected"]


@pytest.mark.vllm
@pytest.mark.skipif(SPEC is None or SPEC.origin is None, reason="vLLM is not installed")
@pytest.mark.parametrize("name", [name for name in SERVED if SERVED[name][1]])
def test_prefixes_are_reused(served, name):
    """Without a window the blocks have 128 tokens on a CPU, and the last token of a prompt is always computed."""
    assert max(served[name]["reused"]) >= 80


@pytest.mark.vllm
@pytest.mark.skipif(SPEC is None or SPEC.origin is None, reason="vLLM is not installed")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="each process needs a core")
@pytest.mark.parametrize("kind", PARALLEL)
def test_parallel(tmp_path, kind):
    (result,) = serve(tmp_path, {kind: PARALLEL[kind]}).values()
    assert "error" not in result, result
    assert result["tokens"] == result["expected"]


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> dict[str, dict]:
    """Engines that are only started: what they count, or why they refuse."""
    root = tmp_path_factory.mktemp("engines")
    long = {"max_model_len": 4096, "max_num_batched_tokens": 512, "kv_cache_memory_bytes": 64 << 20}
    tiny("llama", **WIDE).save_pretrained(root / "original")
    character_tokenizer().save_pretrained(root / "original")
    jobs = {"original": job(root / "original", **long)}
    ratios = {}
    for window in (0, 32):
        name = f"window-{window}"
        ratios[name] = save(root / name, "llama", window, "sensitivity", **WIDE)
        jobs[name] = job(root / name, **long)
    jobs["no-room"] = job(root / "window-32", **long | {"kv_cache_memory_bytes": 5_700_000})
    jobs["fp8"] = job(root / "window-32", **SMALL, kv_cache_dtype="fp8")
    save(root / "sliding", "mistral-wide", 8, "uniform")
    jobs["sliding"] = job(root / "sliding", **SMALL)
    save(root / "family", "granite", 0, "uniform")
    jobs["family"] = job(root / "family", **SMALL)
    save_coded(root / "coded")
    jobs["coded"] = job(root / "coded", **SMALL)
    truncate(root / "window-32", root / "truncated")
    jobs["truncated"] = job(root / "truncated", **SMALL)
    results = run_engines(root, list(jobs.values()))
    found = dict(zip(jobs, results, strict=True))
    return found | {"ratios": ratios}


def save_coded(folder: Path) -> None:
    model = compressed("llama", 4, coded=True)
    method = EigenAttentionConfig(coded=True, window=4).to_dict()
    layers = [layout.to_dict() for layout in layouts_of(model)]
    mark_compressed(model, EigenAttnCheckpointConfig(layers, True, method))
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)


def truncate(source: Path, folder: Path) -> None:
    """A copy that lacks one tensor."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.key_mean"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


class TestEngines:
    pytestmark = NEEDS_VLLM

    @pytest.mark.parametrize("name", ["window-0", "window-32"])
    def test_the_engine_counts_more_tokens(self, engines, name):
        more = engines[name]["cache_tokens"] / engines["original"]["cache_tokens"]
        assert more >= 0.95 / engines["ratios"][name]

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("no-room", "give it more memory"),
            ("fp8", "leave --kv-cache-dtype at auto"),
            ("sliding", "sliding window of their own"),
            ("family", "compressed GraniteForCausalLM is not served"),
            ("coded", "coded latents are not served"),
            ("truncated", r"lacks model.layers.1.self_attn.key_mean"),
        ],
    )
    def test_what_is_not_supported_is_refused(self, engines, name, says):
        import re

        assert re.search(says, engines[name].get("error", "served"))


def test_other_versions_are_refused_with_those_that_are_supported():
    check_version(f"{SUPPORTED[-1]}.1")
    with pytest.raises(EigenAttnError, match=rf"vLLM {SUPPORTED[-1]}, not 0\.1\.2"):
        check_version("0.1.2")
