"""Benchmarks measure what they say; nothing here asserts a time."""

import dataclasses
import json

import pytest
import torch
from tiny import TINY, save_tiny, tiny, tokens
from typer.testing import CliRunner

from eigenattn import EigenAttnError
from eigenattn.benchmark import shapes
from eigenattn.benchmark.decode import benchmark_decode, step_seconds
from eigenattn.benchmark.kernel import Inputs, StepShape, baselines, benchmark_kernel, layouts
from eigenattn.benchmark.memory import benchmark_memory, fill, largest
from eigenattn.benchmark.prefill import read
from eigenattn.benchmark.timing import device_of, file_name, in_turns
from eigenattn.cache.layout import SIDES, Latent, Layout
from eigenattn.cli import app
from eigenattn.kernels.decoding import decode
from eigenattn.kernels.native_library import unavailable
from eigenattn.models.conversion import layouts_of

CPU = torch.device("cpu")
KERNELS = ["torch"] if unavailable() else ["torch", "native"]
SHAPE = StepShape(batch=2, heads=4, kv_heads=2, head_dim=16, length=40, window=8)


def test_functions_take_turns():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    assert set(in_turns(functions, CPU, rounds=3)) == {"a", "b"}
    assert calls[-6:] == ["a", "b"] * 3


def test_kernel_rows():
    found = benchmark_kernel(SHAPE, ranks=[(8, 4)], dtype="float32", device="cpu", rounds=2)
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["sdpa", *(f"{name}, {where}, (8, 4)" for where in ("none", "rotary") for name in KERNELS)]
    assert rows["sdpa"]["bytes"] == 2 * 2 * 2 * 40 * 16 * 4
    assert rows["torch, rotary, (8, 4)"]["bytes"] == 2 * 2 * (32 * 12 + 8 * 32) * 4
    done = {name: row["arithmetic_share"] * row["seconds"] * found["peak_arithmetic"] for name, row in rows.items()}
    heads, far = SHAPE.heads, 32
    window = 2 * 8 * heads * 16
    assert done["sdpa"] == pytest.approx(2 * 2 * 2 * 40 * heads * 16)
    assert done["torch, none, (8, 4)"] == pytest.approx(2 * 2 * (far * heads * (8 + 4) + window))
    assert done["torch, rotary, (8, 4)"] == pytest.approx(2 * 2 * (far * (2 * 8 * 16 + heads * (16 + 4)) + window))
    assert found["best_baseline"] == "sdpa" and rows["sdpa"]["speed_against_best"] == 1
    assert found["shape"]["dtype"] == "float32"


def test_kernel_rows_of_shared_latents():
    options = {"dtype": "float32", "device": "cpu", "rounds": 1}
    found = benchmark_kernel(SHAPE, ranks=[(8, 4)], share=["1-2", "1kv"], **options)
    rows = {row["name"]: row["bytes"] for row in found["rows"] if "rotary" in row["name"]}
    cases = ("(8, 4)", "(8, 4), share 1-2", "(8, 4), share 1kv")
    assert list(rows) == [f"{name}, rotary, {case}" for case in cases for name in KERNELS]
    assert len(set(rows.values())) == 1


@pytest.mark.parametrize("window", [0, 8])
def test_steps_that_are_timed_give_attention(window):
    """By all ways to compute it, whatever is shared or coded, and again with what was kept of the first."""
    shape = dataclasses.replace(SHAPE, window=window)
    inputs = Inputs(shape, CPU, torch.float32)
    for layout in layouts(shape, [(8, 4)], 2.5, ["2", "1-2", "2kv"]).values():
        step = dataclasses.replace(inputs.step(layout), rotary=inputs.rotary)
        expected = decode(step, "reference")
        for kernel in KERNELS * 2:
            torch.testing.assert_close(decode(step, kernel), expected, rtol=1e-3, atol=1e-4)


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
    assert json.loads((tmp_path / "results" / file_name(found, CPU)).read_text()) == found


@pytest.fixture
def tiny_shape(monkeypatch):
    """A preset that takes no time."""
    model_type, sizes = TINY["llama"]
    monkeypatch.setitem(shapes.SHAPES, "tiny", (model_type, sizes))
    return "tiny"


def test_shapes_are_those_of_the_models():
    found = {name: shapes.head_shape(name) for name in shapes.SHAPES}
    assert found["llama-3-8b"] == {"heads": 32, "kv_heads": 8, "head_dim": 128}
    assert found["llama-2-7b"] == found["opt-6.7b"] == found["mpt-7b"] == {"heads": 32, "kv_heads": 32, "head_dim": 128}
    assert shapes.uniform_ranks(0.6, 128) == (72, 80)
    assert shapes.uniform_ranks(0.5, 128) == (64, 64)


@pytest.mark.parametrize("window", [0, 4])
def test_a_shape_is_compressed_and_not(tiny_shape, window):
    options = {"kv_ratio": 0.5, "window": window, "dtype": "float32", "device": "cpu"}
    contest = shapes.Contest(shape=tiny_shape, **options)
    loaders = contest.loaders()
    assert (contest.name, contest.baseline, list(loaders)) == ("tiny-50", "tiny", ["tiny", "tiny-50"])
    model = loaders["tiny-50"]()
    latents = tuple(Latent((side,), 1, 8, 16) for side in SIDES)
    assert layouts_of(model) == [Layout(2, latents, window)] * 3
    assert not layouts_of(loaders["tiny"]())
    assert model(tokens(1, 20)).logits.isfinite().all()


def test_decode_prefill_and_calibration_of_a_shape(tiny_shape, tmp_path):
    shared = ["--shape", tiny_shape, "--rounds", "1", "--device", "cpu", "--json", "-", "--results", str(tmp_path)]
    found = {}
    for verb, arguments in (
        ("decode", ["--length", "8", "--new-tokens", "3", "--kv-ratio", "0.5"]),
        ("prefill", ["--length", "9", "--length", "20", "--chunk", "6", "--kv-ratio", "0.5"]),
        ("calibration", ["--samples", "4", "--length", "64"]),
    ):
        done = CliRunner().invoke(app, ["benchmark", verb, *arguments, *shared], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        found[verb] = json.loads(done.stdout)
        assert (tmp_path / file_name(found[verb], CPU)).exists()
    assert [row["cache"] for row in found["decode"]["rows"]] == ["dynamic", "static"]
    assert [row["length"] for row in found["prefill"]["rows"]] == [9, 20]
    assert found["decode"]["kv_ratio"] == found["prefill"]["kv_ratio"] == 0.5
    assert found["calibration"]["model"] == "tiny" and found["calibration"]["seconds"] > 0


def test_reading_in_pieces_fills_the_cache():
    model, seen = tiny("llama"), []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    assert read(model, tokens(1, 20), 8).get_seq_length() == 20
    assert seen == [8, 8, 4]


def test_packed_latents_are_measured_too():
    found = benchmark_kernel(SHAPE, ranks=[], bits=2.5, dtype="float32", device="cpu", rounds=1, label="x")
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["sdpa", *(f"{name}, {where}, 2.5 bits" for where in ("none", "rotary") for name in KERNELS)]
    assert rows["torch, none, 2.5 bits"]["bytes"] == 2 * 2 * (32 * 2 * 5 + 8 * 32 * 4)
    assert file_name(found, CPU).endswith("-x.json")


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
        benchmark_memory(shapes.Contest("smollm2", "smollm2", device="cpu"), length=8, longest=8)
    with pytest.raises(EigenAttnError, match="between 1 and the head dimension"):
        benchmark_kernel(SHAPE, ranks=[(17, 4)], device="cpu")
    with pytest.raises(EigenAttnError, match="no device"):
        device_of("nowhere")
    with pytest.raises(EigenAttnError, match="2 new tokens"):
        benchmark_decode(shapes.Contest("x", "y"), batch=1, length=8, new_tokens=1, rounds=1)
    with pytest.raises(EigenAttnError, match="bits an element"):
        benchmark_kernel(SHAPE, ranks=[], bits=8, device="cpu")
    for arguments, message in (
        (["kernel", "--ranks", "8"], "R_k,R_v"),
        (["kernel", "--share", "1-3"], "3 KV heads cannot share"),
        (["kernel", "--shape", "z"], "unknown shape 'z'"),
        (["decode"], "--against"),
        (["prefill", "x", "--shape", "llama-3-8b"], "give no others"),
        (["calibration"], "give a model"),
        (["decode", "x", "--against", "y", "--cache", "z"], "'z'"),
    ):
        with pytest.raises(EigenAttnError, match=message):
            CliRunner().invoke(app, ["benchmark", *arguments], catch_exceptions=False)
