"""Benchmarks measure what they say; nothing here asserts a time."""

import json

import pytest
import torch
from tiny import save_tiny, tiny, tokens
from typer.testing import CliRunner

from eigenattn import EigenAttnError
from eigenattn.benchmark.decode import benchmark_decode, step_seconds
from eigenattn.benchmark.kernel import baselines, benchmark_kernel
from eigenattn.benchmark.memory import benchmark_memory, fill, largest
from eigenattn.benchmark.timing import device_of, file_name, in_turns
from eigenattn.cli import app

CPU = torch.device("cpu")
SHAPE = {"batch": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "length": 40, "window": 8}


def test_functions_take_turns():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    assert set(in_turns(functions, CPU, rounds=3)) == {"a", "b"}
    assert calls[-6:] == ["a", "b"] * 3


def test_kernel_rows():
    found = benchmark_kernel(**SHAPE, ranks=[(8, 4)], dtype="float32", device="cpu", rounds=2)
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["sdpa", "torch, none, (8, 4)", "torch, rotary, (8, 4)"]
    assert rows["sdpa"]["bytes"] == 2 * 2 * 2 * 40 * 16 * 4
    assert rows["torch, rotary, (8, 4)"]["bytes"] == 2 * 2 * (32 * 12 + 8 * 32) * 4
    assert found["best_baseline"] == "sdpa" and rows["sdpa"]["speed_against_best"] == 1
    assert found["shape"]["dtype"] == "float32"


def test_baselines_are_attention():
    q, k = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 5, 8)
    grouped = k.repeat_interleave(2, dim=1)
    expected = torch.softmax(q @ grouped.mT / 8**0.5, dim=-1) @ grouped
    for function in baselines(q, k, k).values():
        torch.testing.assert_close(function(), expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_every_step_but_the_first_is_timed(cache):
    assert len(step_seconds(tiny("llama"), tokens(2, 10), 5, cache)) == 4


def test_decode_command(tmp_path):
    model = save_tiny(tmp_path / "model")
    arguments = ["--against", model, "--length", 8, "--new-tokens", 3, "--rounds", 1, "--cache", "dynamic"]
    arguments += ["--device", "cpu", "--results", tmp_path / "results", "--json", "-"]
    done = CliRunner().invoke(app, ["benchmark", "decode", str(model), *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [row["cache"] for row in found["rows"]] == ["dynamic"]
    assert json.loads((tmp_path / "results" / file_name("decode", CPU, "model")).read_text()) == found


def test_the_largest_that_fits():
    for border in (0, 1, 2, 31, 100, 4097):
        tried = []
        found = largest(lambda n, border=border, tried=tried: tried.append(n) or n <= border, 5000)
        assert found <= border <= found + max(found // 16, 0)
        assert len(tried) < 40
    assert largest(lambda n: True, 100) == 100


def test_filling_reads_every_token():
    model, seen = tiny("llama"), []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:2]))
    fill(model, 2, 600)
    assert seen == [(2, 512), (2, 88), (2, 1)]


def test_mistakes_are_told():
    with pytest.raises(EigenAttnError, match="measured on a GPU"):
        benchmark_memory("smollm2", against="smollm2", length=8, longest=8, device="cpu")
    with pytest.raises(EigenAttnError, match="between 1 and the head dimension"):
        benchmark_kernel(**SHAPE, ranks=[(17, 4)], device="cpu")
    with pytest.raises(EigenAttnError, match="no device"):
        device_of("nowhere")
    with pytest.raises(EigenAttnError, match="2 new tokens"):
        benchmark_decode("x", against="y", batch=1, length=8, new_tokens=1, rounds=1)
    for arguments, message in (
        (["kernel", "--ranks", "8"], "R_k,R_v"),
        (["decode", "x", "--against", "y", "--cache", "z"], "'z'"),
    ):
        with pytest.raises(EigenAttnError, match=message):
            CliRunner().invoke(app, ["benchmark", *arguments], catch_exceptions=False)
