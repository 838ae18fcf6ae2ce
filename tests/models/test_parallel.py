"""Tensor parallelism: two processes, each with half of the heads, give what one gives."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny, tokens
from transformers import AutoModelForCausalLM

import eigenattn
from eigenattn import EigenAttentionConfig, EigenAttnError, compress
from eigenattn.cache.size import allocated_bytes
from eigenattn.models import parallel
from eigenattn.models.conversion import eigen_layers
from eigenattn.models.maps import MAPS, QUANTISERS

SIZE = 2
RATIO = {"kv_ratio": 0.5, "rank_multiple": 2, "ranks": "uniform"}
CODED = {"coded": True, "kv_ratio": 0.1875}
CASES = {
    **{f"{name}-32": (name, {**RATIO, "window": 32}) for name in ("llama", "qwen3", "phi3", "olmo2", "opt", "mpt")},
    **{f"{name}-0": (name, {**RATIO, "window": 0}) for name in ("llama", "qwen3", "phi3", "olmo2", "opt", "mpt")},
    **{f"{name}-8": (name, {**RATIO, "window": 8}) for name in ("gpt_neox", "stablelm-norm", "cohere-norm", "mixtral")},
    "llama-coded": ("llama", {**CODED, "window": 8}),
    "llama-coded-0": ("llama", {**CODED, "window": 0}),
    "opt-shared": ("opt", {**RATIO, "window": 8, "share": "2"}),
    "opt-values": ("opt", {**RATIO, "window": 8, "share": "1-2"}),
    "llama-both": ("llama", {**RATIO, "window": 8, "share": "1kv"}),
    "opt-both": ("opt", {**CODED, "window": 0, "share": "2kv"}),
}
NO_MAPS = {"opt-0", "mpt-0"}  # all of them are folded
REFUSED = {
    "llama-values": ("llama", {**RATIO, "window": 8, "share": "1-2"}, "2 KV heads, 2 to a latent, cannot be split"),
    "llama-shared": ("llama", {**RATIO, "window": 8, "share": "2"}, "2 KV heads, 2 to a latent, cannot be split"),
    "gpt2": ("gpt2", {**RATIO, "window": 8}, "no tensor-parallel plan for GPT-2"),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, tuple[dict, list[dict]]]:
    """For each case what one process gives, and what each of two gives."""
    folder, single = tmp_path_factory.mktemp("parallel"), {}
    for case, (name, config, *_) in {**CASES, **REFUSED}.items():
        model = tiny(name)
        compress(model, tokens(3, 48).split(1), EigenAttentionConfig(**config))
        model.save_pretrained(folder / case)
        ids = tokens(2, 44)
        torch.save(ids, folder / case / "ids.pt")
        with torch.no_grad():
            first = model(ids, use_cache=True)
            following = model(ids[:, :3], past_key_values=first.past_key_values, use_cache=True)
        single[case] = {
            "logits": first.logits,
            "following": following.logits,
            "generated": model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False),
            "cache_bytes": allocated_bytes(following.past_key_values),
            "heads": [(attention.heads, attention.kv_heads) for attention in eigen_layers(model)],
            "sizes": {name: parameter.numel() for name, parameter in model.named_parameters()},
        }
    run(folder, list(single))
    return {
        case: (one, [torch.load(folder / f"{case}-{rank}.pt") for rank in range(SIZE)]) for case, one in single.items()
    }


def run(folder: Path, cases: list[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    worker = Path(__file__).with_name("parallel_worker.py")
    source = str(Path(eigenattn.__file__).parents[1])
    common = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(SIZE),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(folder), *cases],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(SIZE)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("case", CASES)
def test_equals_one_process(case, found):
    one, parts = found[case]
    for part in parts:
        assert "error" not in part, part.get("error")
        torch.testing.assert_close(part["logits"], one["logits"], atol=1e-4, rtol=0)
        torch.testing.assert_close(part["following"], one["following"], atol=1e-4, rtol=0)
        assert torch.equal(part["generated"], one["generated"])


@pytest.mark.parametrize("case", CASES)
def test_each_holds_its_share(case, found):
    one, parts = found[case]
    for part in parts:
        assert part["cache_bytes"] * SIZE == one["cache_bytes"]
        maps = [name for name in one["sizes"] if name.split(".")[-1] in (*MAPS, *QUANTISERS)]
        weights = [name for name in one["sizes"] if ".layers." in name and name.endswith("proj.weight")]
        assert maps or case in NO_MAPS
        assert any(name.endswith(QUANTISERS) for name in maps) == CASES[case][1].get("coded", False)
        assert all(part["own"][name] * SIZE == one["sizes"][name] for name in (*maps, *weights))
        assert part["heads"] == [(heads // SIZE, kv_heads // SIZE) for heads, kv_heads in one["heads"]]


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_split_is_refused(case, found):
    _, parts = found[case]
    for part in parts:
        assert REFUSED[case][2] in part["error"]
        assert "\n" not in part["error"]


def test_compressing_a_split_model_is_refused(monkeypatch, tmp_path):
    model = tiny("llama")
    compressed = tiny("llama")
    compress(compressed, tokens(3, 48).split(1), EigenAttentionConfig(**RATIO, window=8))
    (tmp_path / "bases").mkdir()
    eigenattn.models.bases_file.save_bases(compressed, tmp_path / "bases")
    monkeypatch.setattr(model, "_tp_size", 2)
    with pytest.raises(EigenAttnError, match="split over 2 processes"):
        compress(model, tokens(3, 48).split(1), EigenAttentionConfig(**RATIO))
    with pytest.raises(EigenAttnError, match="split over 2 processes"):
        eigenattn.attach(model, tmp_path / "bases")


def test_one_process_has_no_plan_of_ours(tmp_path):
    model = tiny("opt")
    compress(model, tokens(3, 48).split(1), EigenAttentionConfig(**RATIO, window=8))
    model.save_pretrained(tmp_path / "opt")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "opt")
    assert parallel.parallel_size(loaded) == 1
    assert not any("key_encoder" in rule for rule in loaded._tp_plan or {})
