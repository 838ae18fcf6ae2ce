"""Latents in vLLM, against our own `generate`. Needs an environment with vLLM: `make test-vllm`."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from drafts import WIDE as DRAFTED
from drafts import options_of
from safetensors.torch import load_file, save_file
from tiny import PROJECTIONS, WIDTHS, character_tokenizer, compressed, tiny, tokens, write_eight_bits
from transformers import AutoModelForCausalLM

from eigenattn import EigenAttentionConfig
from eigenattn.cache.packing import Widths
from eigenattn.cache.size import cache_bytes
from eigenattn.models.bases_file import save_bases
from eigenattn.models.checkpoint_format import EigenAttnCheckpointConfig, mark_compressed
from eigenattn.models.conversion import layouts_of

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
NGRAM = {
    "speculative_config": {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 2,
        "prompt_lookup_min": 1,
    }
}
# Prompts fit together, and what is decoded behind them does not.
SHORT_OF_CACHE = {"kv_cache_memory_bytes": 60_000, "max_num_batched_tokens": 8, "new_tokens": 100}
# Five layers that slide for each that does not, as Gemma 3 has it.
SLIDING = {
    "num_hidden_layers": 12,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2,
    "sliding_window": 512,
    "max_position_embeddings": 4096,
}
SHORTER_OF_CACHE = SHORT_OF_CACHE | {"kv_cache_memory_bytes": 42_000}
SHORT_BESIDE_DRAFTS = SHORT_OF_CACHE | {
    "kv_cache_memory_bytes": 1_000_000,
    "block_size": 32,
    "max_num_batched_tokens": 64,
    "drafts": "draft_model",
}
SHORT_BESIDE_STATES = SHORT_OF_CACHE | {"kv_cache_memory_bytes": 600_000}
# Attention heads of 32 dimensions, the smallest that vLLM's own attention has.
WIDE = {"hidden_size": 128, "num_hidden_layers": 4, "max_position_embeddings": 4096}

# Given with the engine's options: how many tokens are decoded and what the model has, where these are not the usual
# ones, and what drafts.
OURS = ("new_tokens", "model", "drafts")
# name -> (tiny model, window, whether latents are coded, what is shared, whether bases lie in a folder of their own,
# options)
SERVED = {
    "coded": ("llama3", 32, True, "1", False, {}),
    "bases": ("llama3", 8, True, "1", True, {}),
    "plain": ("llama", 8, False, "1", False, {}),
    "in-chunks": ("llama-bias", 32, True, "1", True, {"max_num_batched_tokens": 32}),
    "short-of-cache": ("llama", 8, True, "1", True, SHORT_OF_CACHE),
    "drafts": ("llama", 8, True, "1", True, NGRAM),
    "drafts-short-of-cache": ("qwen2", 8, True, "1", True, NGRAM | SHORT_OF_CACHE),
    "shared": ("llama", 8, True, "1-2", False, {}),
    "shared-without-window": ("opt", 0, False, "2-4", False, {}),
    "joint": ("qwen3", 8, True, "1kv", False, {}),
    "joint-as-cached": ("opt", 8, True, "1kv", True, {}),
    "qwen2": ("qwen2", 32, True, "1", True, {}),
    "qwen3": ("qwen3", 32, True, "1", True, {}),
    "mistral": ("mistral", 8, True, "1", True, {}),
    "opt": ("opt", 32, True, "1", True, {}),
    "gpt2": ("gpt2", 8, True, "1", True, {}),
    "granite": ("granite", 8, True, "1", True, {}),
    "stablelm": ("stablelm", 8, True, "1", True, {}),
    "cohere": ("cohere-norm", 8, True, "1", True, {}),
    "bloom": ("bloom", 8, True, "1", True, {}),
    "compiled": ("qwen2", 8, True, "1", True, {"enforce_eager": False}),
    "sliding": ("gemma3-served", 8, True, "1", True, {"max_num_batched_tokens": 32}),
    "sliding-short-of-cache": ("gemma3-served", 8, True, "1", True, SHORT_OF_CACHE),
    "sliding-drafts-short-of-cache": ("gemma3-served", 8, True, "1", True, NGRAM | SHORTER_OF_CACHE),
    "sliding-plain": ("gemma2-served", 8, False, "1", False, {}),
    "sliding-without-window": ("mistral-served", 0, True, "1kv", False, {}),
    "sliding-everywhere": ("mistral-served", 8, True, "1", True, {}),
    "sinks": ("gpt_oss-served", 8, True, "1", True, {}),
    "sinks-drafts": ("gpt_oss-served", 8, True, "1", True, NGRAM),
    "cohere2": ("cohere2-served", 8, True, "1", True, {}),
    "granite_swa": ("granite_swa-served", 8, True, "1", True, {}),
    "model-drafts": ("llama", 8, True, "1", True, {"model": DRAFTED, "drafts": "draft_model", "block_size": 32}),
    "sliding-model-drafts-short-of-cache": ("gemma3-served", 8, True, "1", True, SHORT_BESIDE_DRAFTS),
    "eagle-drafts": ("llama", 8, True, "1", True, {"model": DRAFTED, "drafts": "eagle3", "block_size": 32}),
    "mtp-drafts": ("glm4_moe-served", 8, True, "1", True, {"drafts": "mtp", "block_size": 32}),
    "states": ("granitemoehybrid-served", 8, True, "1", True, {"max_num_batched_tokens": 32}),
    "states-short-of-cache": ("granitemoehybrid-served", 8, False, "1", True, SHORT_BESIDE_STATES),
    "states-in-each-layer": ("falcon_h1-served", 8, True, "1", True, {}),
}
LAST_IS_FULL = {"num_hidden_layers": 4, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
PARALLEL = {
    "tensor": ("llama", 8, True, "1", True, {"tensor_parallel_size": 2}),
    "tensor-values": ("opt", 8, False, "1-2", False, {"tensor_parallel_size": 2}),
    "data": ("llama", 8, True, "1", True, {"data_parallel_size": 2}),
    # With enforce_eager vLLM 0.32 fails here for its own models too.
    "pipeline": ("opt", 8, True, "1", True, {"pipeline_parallel_size": 2, "enforce_eager": False}),
    "tensor-sinks": ("granite_swa-served", 8, True, "1", True, {"tensor_parallel_size": 2}),
    # The first stage has no layer that sees everything.
    "pipeline-sliding": (
        "gemma3-served",
        8,
        True,
        "1",
        True,
        {"pipeline_parallel_size": 2, "enforce_eager": False, "model": LAST_IS_FULL},
    ),
}


def save(
    folder: Path, name: str, window: int, coded: bool, share: str = "1", apart: bool = False, build=tiny, **overrides
) -> list:
    """Write a tiny model with arbitrary bases, as a checkpoint or beside the model, and give its layouts."""
    sizes = [Widths.of(dict(each.counts), scaled=apart) for each in WIDTHS] if coded else None
    model = compressed(name, window, coded, share, sizes, build, **overrides)
    method = EigenAttentionConfig(coded=coded, window=window, share=share).to_dict()
    layouts = layouts_of(model)
    mark_compressed(model, EigenAttnCheckpointConfig([layout.to_dict() for layout in layouts], True, method))
    if apart:
        (folder / "bases").mkdir(parents=True)
        save_bases(model, folder / "bases")
        model = build(name, **overrides)
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return layouts


def generated(folder: Path, new_tokens: int) -> list[list[int]]:
    """Greedy tokens of our own `generate`, one prompt at a time."""
    return continued(with_bases(folder), new_tokens)


def with_bases(folder: Path, kind=AutoModelForCausalLM) -> torch.nn.Module:
    from eigenattn.models.bases_file import attach

    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    return attach(model, folder / "bases") if (folder / "bases").exists() else model


def continued(model: torch.nn.Module, new_tokens: int) -> list[list[int]]:
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, use_cache=True, eos_token_id=None)
        found.append(out[0, len(prompt) :].tolist())
    return found


def run_engines(folder: Path, jobs: list[dict]) -> list[dict]:
    """Results of all, in order. Where an engine has drafted by ngrams, vLLM 0.32 starts no other."""
    alone = [each for each in jobs if each["options"].get("speculative_config", {}).get("method") == "ngram"]
    found = iter(_run(folder, [each for each in jobs if each not in alone])) if len(alone) < len(jobs) else iter(())
    return [_run(folder, [each])[0] if each in alone else next(found) for each in jobs]


def _run(folder: Path, jobs: list[dict]) -> list[dict]:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).with_name("engine.py")), "jobs.json", "results.json"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


def job(model: Path, prompts: list | None = None, **options) -> dict:
    options = {"model": str(model)} | options
    if (model / "bases").exists():
        options["additional_config"] = {"eigenattn": str(model / "bases")}
    return {"options": options, "prompts": prompts or [], "new_tokens": NEW_TOKENS}


def serve(root: Path, served: dict) -> dict[str, dict]:
    """Results by name, with what `generate` gives as `expected`."""
    expected, jobs = {}, []
    for name, (*model, options) in served.items():
        save(root / name, *model, **options.get("model", {}))
        new_tokens = options.get("new_tokens", NEW_TOKENS)
        expected[name] = generated(root / name, new_tokens)
        engine = {option: value for option, value in (SMALL | options).items() if option not in OURS}
        if "drafts" in options:
            engine |= options_of(options["drafts"], root / name)
        jobs.append(job(root / name, PROMPTS, **engine) | {"new_tokens": new_tokens})
    results = run_engines(root, jobs)
    return {name: result | {"expected": expected[name]} for name, result in zip(served, results, strict=True)}


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> dict[str, dict]:
    return serve(tmp_path_factory.mktemp("served"), SERVED)


class TestServed:
    pytestmark = NEEDS_VLLM

    @pytest.mark.parametrize("name", SERVED)
    def test_tokens_are_those_of_generate(self, served, name):
        """Eight requests of mixed lengths at once, chunked or preempted, and again out of the prefix cache."""
        result = served[name]
        assert "error" not in result, result
        assert result["tokens"] == result["expected"]
        assert result["again"] == result["expected"]

    @pytest.mark.parametrize(
        "name", [name for name in SERVED if SERVED[name][1] and "short" not in name and "each" not in name]
    )
    def test_prefixes_are_reused(self, served, name):
        """The last token of a prompt is always computed."""
        assert max(served[name]["reused"][1]) >= 64

    def test_requests_were_preempted_and_drafts_taken(self, served):
        for name in [name for name in served if "short" in name]:
            assert served[name]["preempted"] > 0
        for name in [name for name in served if "drafts" in name]:
            assert served[name]["drafts_taken"] > 0


@pytest.mark.vllm
@pytest.mark.skipif(SPEC is None or SPEC.origin is None, reason="vLLM is not installed")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="each process needs a core")
@pytest.mark.parametrize("kind", PARALLEL)
def test_parallel(tmp_path, kind):
    (result,) = serve(tmp_path, {kind: PARALLEL[kind]}).values()
    assert "error" not in result, result
    assert result["tokens"] == result["expected"]


@pytest.mark.vllm
@pytest.mark.skipif(SPEC is None or SPEC.origin is None, reason="vLLM is not installed")
@pytest.mark.parametrize("name", ["llama", "gemma3-served"])
def test_adapters(tmp_path, name):
    """Two of them at once, against the same bases on models that they were merged into."""
    save(tmp_path, name, 8, True, apart=True)
    merged = {}
    for adapter in ("one", "other"):
        model = with_bases(tmp_path)
        add_adapter(model, tmp_path / adapter)
        merged[adapter] = continued(model, NEW_TOKENS)
    names = [("one", "other")[i % 2] for i in range(len(PROMPTS))]
    served = job(tmp_path, PROMPTS, **SMALL, enable_lora=True, max_lora_rank=8, max_loras=2)
    (result,) = run_engines(tmp_path, [served | {"adapters": [str(tmp_path / adapter) for adapter in names]}])
    assert "error" not in result, result
    assert result["tokens"] == result["again"] == [merged[adapter][i] for i, adapter in enumerate(names)]
    assert all(one != other for one, other in zip(*merged.values(), strict=True))


def add_adapter(model: torch.nn.Module, folder: Path) -> None:
    """Write an arbitrary LoRA adapter of attention, as PEFT has it, and merge it into the model."""
    tensors, rank = {}, 4
    generator = torch.Generator().manual_seed(len(folder.name))
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in PROJECTIONS and "self_attn" in name:
            out, into = module.weight.shape
            a, b = 0.1 * torch.randn(rank, into, generator=generator), 0.3 * torch.randn(out, rank, generator=generator)
            tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
            module.weight.data += 2 * b @ a
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(PROJECTIONS[:4])}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"bias": "none", "task_type": "CAUSAL_LM"}))


SHARED_PREFIX = [tokens(1, 200, seed=0)[0].tolist() + tokens(1, 30, seed=end)[0].tolist() for end in (1, 2)]


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> dict[str, dict]:
    """Engines that are only started, or nearly so: what they count, or why they refuse."""
    root = tmp_path_factory.mktemp("engines")
    long = {"max_model_len": 4096, "max_num_batched_tokens": 512, "kv_cache_memory_bytes": 64 << 20}
    layouts = save(root / "wide", "llama", 32, True, apart=True, **WIDE)
    jobs = {"wide": job(root / "wide", **long)}
    jobs["original"] = {"options": {"model": str(root / "wide"), **long}, "prompts": []}
    sliding = save(root / "sliding", "gemma3-served", 32, True, apart=True, **SLIDING)
    jobs["sliding"] = job(root / "sliding", **long)
    save(root / "small", "llama", 8, True)
    small = root / "small"
    jobs["prefix"] = job(small, SHARED_PREFIX, **SMALL | {"max_num_seqs": 1}) | {"new_tokens": 1}
    jobs["float32"], jobs["bfloat16"] = (
        job(small, PROMPTS, **SMALL, dtype=dtype) | {"new_tokens": 1} for dtype in ("float32", "bfloat16")
    )
    # Nothing but exact tokens, so that what is stock can be compared.
    save(root / "eight-bits", "llama", 200, True, apart=True, **WIDE)
    write_eight_bits(root / "eight-bits", root / "eight-bits", "int")
    jobs["eight-bits"] = job(root / "eight-bits", PROMPTS, **SMALL, dtype="bfloat16") | {"new_tokens": 1}
    jobs["eight-bits-stock"] = copy.deepcopy(jobs["eight-bits"])
    del jobs["eight-bits-stock"]["options"]["additional_config"]
    jobs["no-room"] = job(root / "wide", **long | {"kv_cache_memory_bytes": 1_200_000})
    jobs["fp8"] = job(small, **SMALL, kv_cache_dtype="fp8")
    drafts = {"method": "draft_model", "model": str(small), "num_speculative_tokens": 2}
    jobs["compressed-drafts"] = job(small, **SMALL, speculative_config=drafts)
    plain = root / "plain"
    tiny("llama", **DRAFTED).save_pretrained(plain)
    character_tokenizer().save_pretrained(plain)
    drafts = {"speculative_config": drafts | {"model": str(plain)}}
    save(root / "sliding-everywhere", "mistral-served", 8, True)
    jobs["sliding-drafts"] = job(root / "sliding-everywhere", **SMALL, **drafts)
    save(root / "reading", "gemma3n-served", 8, True)
    jobs["reading"] = job(root / "reading", **SMALL)
    save(root / "states", "granitemoehybrid-served", 8, True)
    jobs["states-drafts"] = job(root / "states", **SMALL, **NGRAM)
    save(root / "on-gpus-alone", "jamba-served", 8, True)
    jobs["on-gpus-alone"] = job(root / "on-gpus-alone", **SMALL)
    save(root / "unbiased", "cohere", 8, True)
    jobs["unbiased"] = job(root / "unbiased", **SMALL)
    save(root / "folded", "llama", 0, False)
    jobs["folded"] = job(root / "folded", **SMALL)
    truncate(small, root / "truncated", "model.layers.1.self_attn.key_mean")
    jobs["truncated"] = job(root / "truncated", **SMALL)
    save(root / "other", "llama", 8, True, apart=True)
    save(root / "biased", "llama-bias", 8, True, apart=True)
    jobs["other-bases"] = job(root / "other", **SMALL)
    jobs["other-bases"]["options"]["additional_config"] = {"eigenattn": str(root / "biased" / "bases")}
    jobs["two"] = job(small, **SMALL, additional_config={"eigenattn": str(root / "biased" / "bases")})
    shutil.copytree(root / "other", root / "another")
    another = root / "another" / "config.json"
    another.write_text(another.read_text().replace("LlamaForCausalLM", "GPTJForCausalLM"))
    jobs["another"] = job(root / "another", **SMALL)
    jobs["another"]["options"]["additional_config"] = {"eigenattn": str(root / "other" / "bases")}
    jobs["bases-alone"] = job(root / "other" / "bases", **SMALL)
    jobs["no-bases"] = job(root / "other", **SMALL)
    jobs["no-bases"]["options"]["additional_config"] = {"eigenattn": str(root)}
    results = run_engines(root, list(jobs.values()))
    return dict(zip(jobs, results, strict=True)) | {"layouts": layouts, "sliding_layouts": sliding}


def truncate(source: Path, folder: Path, name: str) -> None:
    """A copy that lacks one tensor."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


class TestEngines:
    pytestmark = NEEDS_VLLM

    def test_the_engine_counts_as_many_tokens_more_as_planned(self, engines):
        layouts, length = engines["layouts"], 4096
        original = sum(layout.original_elements for layout in layouts) * 4 * length
        planned = original / cache_bytes(layouts, 4, length)
        found = engines["wide"]["cache_tokens"] / engines["original"]["cache_tokens"]
        assert found == pytest.approx(planned, rel=0.03)

    def test_layers_that_slide_take_what_they_see(self, engines):
        """But for what blocks of the same bytes waste, of which one has tokens of a few layers and another of many."""
        length, window = 4096, SLIDING["sliding_window"]
        seen = [length if kind == "full_attention" else window - 1 for kind in SLIDING["layer_types"]]
        planned = cache_bytes(engines["sliding_layouts"], 4, seen)
        found = (64 << 20) / engines["sliding"]["cache_tokens"] * length
        assert planned < found < 1.1 * planned

    def test_a_prefix_is_hit_by_the_second_prompt(self, engines):
        first, second = engines["prefix"]["reused"][0]
        assert first == 0 and second >= 96

    @pytest.mark.parametrize(("name", "like"), [("bfloat16", "float32"), ("eight-bits", "eight-bits-stock")])
    def test_other_numbers_give_nearly_the_same(self, engines, name, like):
        """Models that are sharp by chance answer a rounding with another token here and there, out of 128."""
        assert "error" not in engines[name], engines[name]
        pairs = zip(engines[name]["tokens"], engines[like]["tokens"], strict=True)
        assert sum(one == other for one, other in pairs) > len(PROMPTS) // 2

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("no-room", "give it more memory"),
            ("fp8", "leave --kv-cache-dtype at auto"),
            ("compressed-drafts", "give the original of this one"),
            ("sliding-drafts", "have to see all tokens"),
            ("reading", "over what others cache"),
            ("states-drafts", "speculative decoding is not supported"),
            ("on-gpus-alone", "CPU build is not right with Mamba 1"),
            ("unbiased", "leaves out biases"),
            ("folded", "compress with a window"),
            ("truncated", "lacks key_mean of layer 1"),
            ("other-bases", "made for another model"),
            ("two", "compressed already"),
            ("another", "GPTJForCausalLM is not served with latents"),
            ("bases-alone", "serve the model that they belong to"),
            ("no-bases", "has no config.json"),
        ],
    )
    def test_what_is_not_right_is_refused(self, engines, name, says):
        assert re.search(says, engines[name].get("error", "served"))
