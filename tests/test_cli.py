"""The command line as a user meets it: in a process of its own for exit codes, in this one for speed."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import run
from tiny import save_tiny, tiny
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from eigenattn.cli import app
from eigenattn.cli.common import emit
from eigenattn.errors import EigenAttnError
from eigenattn.models.loading import Source

TEXT = "The quick brown fox jumps over the lazy dog; it was not amused. " * 60
COMPRESS = ["--samples", "4", "--length", "48", "--rank-multiple", "2", "--window", "8"]
SHORT = ["--tokens", "128", "--length", "64", "--copies", "0"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def compressed(base, text, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "compressed"
    run("compress", base, out, "--text", text, *COMPRESS)
    return out


def run_json(*arguments) -> dict:
    return json.loads(run(*arguments, "--json", "-"))


def test_compress_writes_a_whole_checkpoint(compressed):
    names = {path.name for path in compressed.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md"} <= names
    card = (compressed / "README.md").read_text()
    assert "import eigenattn" in card
    assert "fox.txt" in card
    assert [path.name for path in compressed.parent.iterdir()] == ["compressed"]  # nothing partial is left


def test_compress_json(base, text, tmp_path):
    file = tmp_path / "report.json"
    run("compress", base, tmp_path / "out", "--text", text, "--kv-ratio", "0.5", *COMPRESS, "--json", file)
    report = json.loads(file.read_text())
    assert 0.3 < report["kv_ratio"] <= 0.5
    assert report["bytes_per_token"] < report["baseline_bytes_per_token"]
    assert all([latent["sides"] for latent in layer["latents"]] == [["key"], ["value"]] for layer in report["layers"])
    assert {"seconds", "forward_seconds", "peak_memory_bytes"} <= set(report)


@pytest.mark.parametrize(("target", "value"), [("energy", 0.9), ("error_budget", 0.05), ("kv_ratio", 1.0)])
def test_every_target(base, text, tmp_path, target, value):
    option = f"--{target.replace('_', '-')}"
    report = run_json("compress", base, tmp_path / "out", "--text", text, option, value, *COMPRESS)
    assert report["kv_ratio"] == 1 if target == "kv_ratio" else 0.3 < report["kv_ratio"] < 1
    assert run_json("inspect", tmp_path / "out")["method"][target] == value


def test_texts_mix_and_the_model_writes_its_own(base, text, tmp_path):
    run("compress", base, tmp_path / "out", "--text", text, "--text", "self", *COMPRESS)
    sources = run_json("inspect", tmp_path / "out")["provenance"]["text"]
    assert [(each["source"], each["sha256"] is None) for each in sources] == [("fox.txt", False), ("self", True)]


def test_evaluate(compressed, base, text, tmp_path):
    options = ("--text", text, "--tokens", "256", "--length", "64")
    plain = run_json("evaluate", compressed, "--baseline", base, *options)
    cached = run_json("evaluate", compressed, "--cached", *options)
    found = plain["texts"][0]
    assert found["perplexity"] == pytest.approx(cached["texts"][0]["perplexity"], rel=1e-4)
    assert found["relative_increase"] == pytest.approx(found["perplexity"] / found["baseline_perplexity"] - 1)
    assert found["tokens"] == 4 * 63
    assert found["divergence"] > 0
    assert 0 < found["top1_agreement"] < 1
    assert plain["kv_ratio"] <= 0.6
    assert plain["protocol"]["dtype"] == "float32"
    assert "baseline_perplexity" not in cached["texts"][0]
    original = run_json("evaluate", base, "--against", base, *options)
    assert original["texts"][0]["perplexity"] == pytest.approx(found["baseline_perplexity"])
    assert original["texts"][0]["divergence"] == pytest.approx(0, abs=1e-9)
    assert original["copying"]["difference_error"] == 0
    assert original["kv_ratio"] == 1


def test_evaluate_several_texts_and_needles(compressed, base, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(TEXT[::-1])
    options = ("--text", text, "--text", other, "--tokens", "96", "--length", "48", "--needles", "300", "--trials", "2")
    found = run_json("evaluate", compressed, "--baseline", base, *options)
    assert [row["text"] for row in found["texts"]] == ["fox.txt", "other.txt"]
    assert found["texts"][0]["perplexity"] != found["texts"][1]["perplexity"]
    assert [row["depth"] for row in found["needles"]] == [0, 0.25, 0.5, 0.75, 1]
    assert {row["items"] for row in found["needles"]} == {2}
    assert "other.txt" in run("evaluate", compressed, *options)


def test_sweep(base, text, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    options = ("--text", text, "--length", "48", "--tokens", "96", "--window", "8", "--ranks", "uniform")
    out = tmp_path / "sweep"
    found = run_json("sweep", base, out, "--kv-ratio", "0.75,0.5", "--samples", "4", *options)
    fox = "fox.txt, first part/4"
    assert list(found["cells"]) == [f"{fox}/attention/uniform/8/0.75", f"{fox}/attention/uniform/8/0.5"]
    assert {"statistics", "ranks", "baseline", "evaluation"} <= found["seconds"].keys()
    names = ["frontier.png", "frontier.svg", "seconds.json", "sweep.csv", "sweep.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    more = run_json("sweep", base, out, "--kv-ratio", "0.75,0.5,1", "--samples", "4", *options)
    assert len(more["cells"]) == 3
    assert more["cells"][f"{fox}/attention/uniform/8/1"]["texts"][0]["divergence"] == pytest.approx(0, abs=1e-6)
    assert "eigen/uniform" in run(
        "sweep", base, out, "--basis", "eigen", "--kv-ratio", "0.5", "--samples", "4", *options
    )
    assert "takes numbers" in fails("sweep", base, tmp_path / "new", "--kv-ratio", "half", *options)
    assert "must be 1 or more" in fails("sweep", base, tmp_path / "new", "--samples", "4,0", *options)
    assert "another length" in fails("sweep", base, out, *options, "--length", "32")
    assert not (tmp_path / "new").exists()


def test_sweep_of_calibrations(base, text, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    options = ("--text", text, "--text", "self", "--length", "48", "--tokens", "96", "--copies", "0", "--window", "8")
    out = tmp_path / "study"
    options = (*options, "--rivals", "plain-4", "--coded", "--kv-ratio", "0.25", "--each-text", "--samples", "2,4")
    said = run("sweep", base, out, *options)
    assert "calibration.png" in said
    assert "4 bits" in said
    cells = json.loads((out / "sweep.json").read_text())["cells"]
    assert [(cell.get("calibration"), cell.get("samples")) for cell in cells.values()] == [
        (None, None),
        ("fox.txt, first part", 2),
        ("fox.txt, first part", 4),
        ("self", 2),
        ("self", 4),
    ]
    assert (out / "calibration.svg").is_file()


def test_generate(compressed):
    once = run_json("generate", compressed, "The quick", "--max-new-tokens", "5")
    assert 1 <= once["tokens"] <= 5
    assert run("generate", compressed, "The quick", "--max-new-tokens", "5").startswith("The quick")
    sampled = [run_json("generate", compressed, "The", "--temperature", "1.5", "--seed", "3")["text"] for _ in range(2)]
    assert sampled[0] == sampled[1]


def test_evicting(compressed, base, text):
    options = ("--evict", "snapkv", "--budget")
    found = run_json("generate", compressed, TEXT[:100], "--max-new-tokens", "5", *options, "40")
    assert found["kept_tokens"] < found["cached_tokens"]
    reading = ("--text", text, "--tokens", "128", "--length", "128", "--copies", "0")
    kept, half = (run_json("evaluate", compressed, *reading, *options, budget) for budget in ("999", "0.5"))
    assert kept["texts"][0]["tokens"] == 64
    assert kept["texts"][0]["perplexity"] != half["texts"][0]["perplexity"]
    plain = run_json("evaluate", compressed, "--stride", "64", *reading)
    assert kept["texts"][0]["perplexity"] == pytest.approx(plain["texts"][0]["perplexity"], rel=1e-4)
    for arguments in ((*options, "lots"), (*options, "1.5"), ("--evict", "snapkv")):
        with pytest.raises(EigenAttnError, match="budget"):
            run("generate", compressed, "The", *arguments)
    with pytest.raises(EigenAttnError, match="not compressed"):
        run("generate", base, "The", *options, "40")


def test_latents_that_keys_and_values_share(base, text, tmp_path):
    options = ("--text", text, "--samples", "4", "--length", "64", "--window", "4", "--rank-multiple", "2")
    run("compress", base, tmp_path / "out", "--share", "2kv", "--kv-ratio", "0.5", *options)
    assert "latents of keys and values of 2 KV heads" in (tmp_path / "out" / "README.md").read_text()
    found = run_json("inspect", tmp_path / "out")
    assert 0.4 < found["kv_ratio"] <= 0.5
    latents = [latent for layer in found["layers"] for latent in layer["latents"]]
    assert [(latent["sides"], latent["heads"]) for latent in latents] == [(["key", "value"], 2)] * 3
    assert "rank of keys and values" in " ".join(run("inspect", tmp_path / "out").split())
    sweep = ("--kv-ratio", "0.5", "--share", "2kv", *options, "--tokens", "128", "--copies", "0")
    cells = run_json("sweep", base, tmp_path / "sweep", *sweep)["cells"]
    assert [cell["method"] for cell in cells.values()] == ["attention:2kv/sensitivity/4"]
    assert "'eigen' does not support" in fails("compress", base, tmp_path / "no", "--share", "2kv", "--basis", "eigen")
    assert "share is written" in fails("compress", base, tmp_path / "no", "--share", "2-3kv")


def test_the_text_need_not_be_given(base, tmp_path):
    options = (
        "--coded",
        "--kv-ratio",
        "0.25",
        "--samples",
        "7",
        "--length",
        "64",
        "--window",
        "4",
        "--rank-multiple",
        "4",
    )
    for source in ([], ["--text", "none"]):
        out = tmp_path / "-".join(["out", *source[1:]])
        run("compress", base, out, *source, *options)
        (found,) = run_json("inspect", out)["provenance"]["text"]
        assert found["source"] == ("none" if source else "mixture")
        assert (found["sha256"] is None) == bool(source)


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        (["--coded", "--text", "fox.txt"], True),
        (["--coded", "--text", "python-docs"], True),
        (["--coded", "--text", "fox.txt", "--text", "mixture"], False),
        (["--coded"], False),
        (["--coded", "--text", "none"], False),
        (["--text", "fox.txt"], True),
        (["--uncoded", "--text", "fox.txt"], False),
    ],
)
def test_codes_for_one_kind_of_text(tmp_path, options, warned):
    result = CliRunner().invoke(app, ["compress", str(tmp_path / "nothing"), str(tmp_path / "out"), *options])
    assert ("alone, codes lose more on text of other kinds" in result.stderr) == warned
    assert "alone" not in result.stdout


def test_coded_latents(base, text, tmp_path):
    options = ("--text", text, "--samples", "4", "--length", "64", "--window", "4", "--rank-multiple", "4")
    run("compress", base, tmp_path / "out", "--coded", "--kv-ratio", "0.1875", "--checkpoint", *options)
    run("compress", base, tmp_path / "bases", "--coded", "--kv-ratio", "0.1875", *options)
    for folder in (tmp_path / "out", tmp_path / "bases"):
        found = run_json("inspect", folder)
        assert 2.5 < found["kv_ratio"] * 16 <= 3
        assert sum(found["bytes_by_layer"]) == found["bytes_per_token"]
        latents = [latent for layer in found["layers"] for latent in layer["latents"]]
        assert all(sum(latent["widths"].values()) == latent["rank"] for latent in latents)
        assert re.search(r"\| keys, channels of [8654321, ]* bits \|", (folder / "README.md").read_text())
    assert "bits" in run("inspect", tmp_path / "out")
    whole, attached = (run("generate", tmp_path / name, "The quick brown") for name in ("out", "bases"))
    assert whole == attached


def test_a_size_for_a_loss(base, text, tmp_path):
    options = ("--text", text, "--samples", 4, "--length", 64, "--window", 8, "--held-out", text)
    found = run_json("compress", base, tmp_path / "within", *options, "--max-divergence", 0.02)
    assert list(found["divergences"]) == ["fox.txt"] and found["divergences"]["fox.txt"] <= 0.02
    assert found["kv_ratio"] <= 0.5
    refusal = fails("compress", base, tmp_path / "out", *options, "--max-divergence", 0.02, "--kv-ratio", 0.2)
    assert "leave out the other target" in refusal
    refusal = fails("compress", base, tmp_path / "out", *options, "--max-divergence", 1e-12)
    assert "cannot be met" in refusal and not (tmp_path / "out").exists()


def test_statistics_of_several_texts(base, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(TEXT[::-1])
    drawn = ("--samples", "4", "--length", "48")
    fox, rest = tmp_path / "fox", tmp_path / "rest"
    found = run_json("calibrate", base, fox, "--text", text, *drawn, "--window", "8")
    assert (found["tokens"], found["window"], found["share"]) == (192, 8, "1")
    assert found["text"][0]["source"] == "fox.txt"
    assert "96 tokens of other.txt, self" in run(
        *("calibrate", base, rest, "--text", other, "--text", "self", "--samples", "2", "--length", "48"),
        *("--window", "8", "--seed", "1"),
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fox", "other.txt", "rest"]
    run("compress", base, tmp_path / "of-text", "--text", text, *drawn, "--window", "8")
    run("compress", base, tmp_path / "of-file", "--statistics", fox)  # by whose window
    of_text, of_file = ((tmp_path / name / "eigenattn.safetensors").read_bytes() for name in ("of-text", "of-file"))
    assert of_text == of_file
    both = ("--statistics", fox, "--statistics", rest)
    assert run_json("compress", base, tmp_path / "both", *both, "--kv-ratio", "0.2")["tokens"] == 288
    card = (tmp_path / "both" / "README.md").read_text()
    assert "calibrated on 4 windows of 48 tokens, seed 0, of fox.txt (SHA-256" in card
    assert "calibrated on 2 windows of 48 tokens, seed 1, of other.txt (SHA-256" in card
    out = tmp_path / "out"
    for folders, warned in ((("--statistics", fox), True), (both, False)):
        result = CliRunner().invoke(app, ["compress", str(tmp_path / "nothing"), str(out), *map(str, folders)])
        assert ("Calibrated on fox.txt alone" in result.stderr) == warned
    assert "leave out --text" in fails("compress", base, out, *both, "--text", text)
    assert "of window 8, not 16" in fails("compress", base, out, *both, "--window", "16")
    assert "of share 1, not 2" in fails("compress", base, out, *both, "--share", "2")
    assert "for coded latents" in fails("compress", base, out, *both, "--uncoded")
    assert "drawn with seed 0" in fails("compress", base, out, "--statistics", fox, "--statistics", fox)
    assert "eigenattn calibrate" in fails("compress", base, out, "--statistics", base)
    assert "exists already" in fails("calibrate", base, fox, "--text", text, *drawn, "--window", "8")
    assert not out.exists()
    run("report", tmp_path / "both")
    page = (tmp_path / "both" / "report.html").read_text()
    assert "--statistics STATISTICS-1 --statistics STATISTICS-2" in page


def test_inspect(compressed, base):
    found = run_json("inspect", compressed)
    assert found["compressed"] is True
    assert len(found["layers"]) == 3
    assert found["provenance"]["text"][0]["source"] == "fox.txt"
    assert len(found["provenance"]["text"][0]["sha256"]) == 64
    assert "fox.txt" in run("inspect", compressed)
    original = run_json("inspect", base)
    assert original["compressed"] is False
    assert original["kv_ratio"] == 1


def test_help_has_examples():
    for verb in ("calibrate", "compress", "evaluate", "generate", "inspect", "demo", "sweep", "spectrum", "report"):
        assert f"eigenattn {verb}" in run(verb, "--help")


def fails(*arguments) -> str:
    with pytest.raises(EigenAttnError) as error:
        CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def broken(base, tmp_path) -> Path:
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_bad_input_is_one_line(base, text, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "exists").mkdir()
    (tmp_path / "short.txt").write_text("too short")
    assert "(0, 1]" in fails("compress", base, out, "--text", text, "--kv-ratio", "0")
    assert "(0, 1]" in fails("compress", base, out, "--text", text, "--kv-ratio", "1.2")
    assert "(0, 1]" in fails("compress", base, out, "--text", text, "--energy", "0")
    assert "together" in fails("compress", base, out, "--energy", "0.9", "--kv-ratio", "0.5")
    assert "exists already" in fails("compress", base, tmp_path / "exists", "--text", text)
    assert "neither a file nor" in fails("compress", base, out, "--text", "nowhere.txt")
    assert "--samples" in fails("compress", base, out, "--text", tmp_path / "short.txt")
    assert "cannot be shared" in fails("compress", base, out, "--text", text, "--text", text, "--samples", "1")
    assert "could not be loaded" in fails("compress", tmp_path / "nowhere", out, "--text", text)
    assert "could not be loaded" in fails("inspect", tmp_path / "exists")
    assert "unknown name 'cosine'" in fails("compress", base, out, "--text", text, "--basis", "cosine", *COMPRESS)
    assert "unknown dtype" in fails("evaluate", base, "--text", text, "--length", "64", "--dtype", "int3")
    assert "one window" in fails("evaluate", base, "--text", tmp_path / "short.txt")
    assert "two texts" in fails("evaluate", base, "--text", text, "--text", text)
    assert "stride" in fails("evaluate", base, "--text", text, "--length", "64", "--stride", "65")
    assert "--needles" in fails("evaluate", base, "--text", text, "--needles", "many")
    assert ".gguf" in fails("compress", tmp_path / "short.txt", out, "--text", text)
    assert not out.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exists", "short.txt"]


def test_kinds_of_files_are_told_whatever_the_case(base, text, tmp_path):
    (tmp_path / "MODEL.GGUF").touch()
    (tmp_path / "MAP.JSON").write_text("[]")
    assert Source.of(str(tmp_path / "MODEL.GGUF")).gguf_file == "MODEL.GGUF"
    assert "must map module names" in fails("evaluate", base, "--text", text, "--device", tmp_path / "MAP.JSON", *SHORT)


@pytest.fixture(scope="module")
def broken_head(base, tmp_path_factory):
    """Makes checkpoints whose head has one row multiplied by a number."""

    def spoil(value: float) -> Path:
        folder = tmp_path_factory.mktemp("broken") / "model"
        model = AutoModelForCausalLM.from_pretrained(base)
        with torch.no_grad():
            model.lm_head.weight[7] *= value
        model.save_pretrained(folder)
        for path in base.glob("tokenizer*"):
            (folder / path.name).write_bytes(path.read_bytes())
        return folder

    return spoil


@pytest.mark.parametrize("temperature", [0, 1])
def test_predictions_that_are_no_numbers_are_refused(broken_head, text, tmp_path, temperature):
    folder = broken_head(math.nan)
    assert "NaN or infinite" in fails("generate", folder, "The", "--temperature", temperature, "--json", "-")
    assert "NaN or infinite" in fails("evaluate", folder, "--text", text, *SHORT, "--json", "-")
    assert "NaN or infinite" in fails("compress", folder, tmp_path / "out", "--text", "self", *COMPRESS)


def test_a_loss_that_is_no_perplexity_is_refused(broken_head, text):
    assert "nats a token is no model's" in fails("evaluate", broken_head(1e4), "--text", text, *SHORT, "--json", "-")


def test_tasks_of_a_model_whose_predictions_are_no_numbers(broken_head, tmp_path):
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    (tmp_path / "quiz.jsonl").write_text('{"query": "a", "choices": ["b", "c"], "gold": 0}')
    assert "NaN or infinite" in fails("evaluate", broken_head(math.nan), "--tasks", tmp_path / "quiz.jsonl")


def test_results_hold_no_numbers_that_json_lacks(capsys):
    emit({"a": math.nan, "b": [math.inf, 1.5], "c": {"d": (-math.inf, "NaN")}}, "-")
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found == {"a": None, "b": [None, 1.5], "c": {"d": [None, "NaN"]}}


@pytest.mark.parametrize("temperature", ["1e-300", "inf"])
def test_temperatures_that_are_no_numbers_to_divide_by(base, temperature):
    assert "the temperature must be 0, or lie in" in fails("generate", base, "The", "--temperature", temperature)


def test_plans_of_sizes_that_are_no_numbers(base):
    for memory in ("nan", "inf"):
        assert "numbers above 0" in fails("plan", base, "--gpu-memory", memory, "--context", "4k")
    assert "32768 or 32k" in fails("plan", base, "--gpu-memory", "80", "--context", "9" * 400)


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> Path:
    """A model with 512 positions, which end."""
    return save_tiny(tmp_path_factory.mktemp("learned"), "opt")


@pytest.mark.parametrize(
    "command",
    [
        ("compress", "MODEL", "OUT", "--text", "TEXT", "--length", "600", "--samples", "2", "--ranks", "uniform"),
        ("compress", "MODEL", "OUT", "--text", "self", "--length", "600", "--samples", "2", "--ranks", "uniform"),
        ("spectrum", "MODEL", "OUT", "--text", "TEXT", "--length", "600", "--samples", "2"),
        ("sweep", "MODEL", "OUT", "--text", "TEXT", "--length", "600", "--samples", "2", "--tokens", "600"),
        ("evaluate", "MODEL", "--text", "TEXT", "--length", "600", "--tokens", "600"),
        ("evaluate", "MODEL", "--text", "TEXT", "--length", "64", "--tokens", "64", "--needles", "600", "--cached"),
        ("generate", "MODEL", "a" * 500),
        ("plan", "MODEL", "--gpu-memory", "80", "--context", "600"),
        ("benchmark", "prefill", "MODEL", "--against", "MODEL", "--length", "600"),
        ("benchmark", "decode", "MODEL", "--against", "MODEL", "--length", "500", "--new-tokens", "100"),
        ("benchmark", "calibration", "MODEL", "--length", "600"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_more_tokens_than_positions(learned, text, tmp_path, command):
    names = {"MODEL": learned, "TEXT": text, "OUT": tmp_path / "out"}
    assert "512 positions, too few for" in fails(*(names.get(part, part) for part in command))


def test_positions_that_end_in_training(learned, text, tmp_path):
    run("compress", learned, tmp_path / "out", "--text", text, "--ranks", "uniform", "--kv-ratio", "0.5", *COMPRESS)
    training = ("--text", text, "--length", "600", "--validation-windows", "1", "--steps", "1")
    assert "512 positions, too few for" in fails("finetune", tmp_path / "out", tmp_path / "tuned", *training)


def test_prompts_that_cannot_be_read(base, broken, tmp_path):
    assert "the prompt is empty" in fails("generate", base, "")
    assert "not UTF-8" in fails("generate", base, "caf\udce9")
    tiny("llama", vocab_size=64).save_pretrained(broken)
    assert "the model knows tokens 0 to 63" in fails("generate", broken, "abc")


@pytest.mark.parametrize("name", [".", "/", "n" * 250, "n" * 300, "caf\udce9"])
def test_names_that_nothing_can_be_written_by(base, text, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for verb in ("compress", "finetune", "spectrum"):
        assert "name" in fails(verb, base, name, "--text", text)
    assert "name" in fails("inspect", base, "--json", name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["n" * 300, "caf\udce9"])
def test_names_that_nothing_can_have(base, text, tmp_path, name):
    for command in (("inspect", name), ("report", name), ("evaluate", name, "--text", text, "--save")):
        assert "the name" in fails(*command)
    assert "neither a file nor" in fails("compress", base, tmp_path / "out", "--text", name)


def test_a_model_card_that_is_not_utf_8(base, broken, text, tmp_path):
    (broken / "README.md").write_bytes(b"caf\xe9")
    assert "README.md is not UTF-8" in fails("evaluate", broken, "--text", text, "--save")
    assert "README.md is not UTF-8" in fails("finetune", broken, tmp_path / "out", "--text", text)


def test_a_seed_that_is_too_large(base):
    assert CliRunner().invoke(app, ["generate", str(base), "a", "--seed", "9" * 30]).exit_code == 2


def test_a_plan_for_a_model_that_reads_pictures(tmp_path):
    AutoConfig.for_model("llava").save_pretrained(tmp_path)
    assert "could not be loaded" in fails("plan", tmp_path, "--gpu-memory", "80", "--context", "4k")


def test_unknown_model_type(broken, text, tmp_path):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "ctrl"}))
    assert "'ctrl' is not supported" in fails("compress", broken, tmp_path / "out", "--text", text, *COMPRESS)


def test_model_without_a_tokenizer(broken, text, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (broken / name).unlink()
    assert "tokenizer" in fails("compress", broken, tmp_path / "out", "--text", text, *COMPRESS)


def test_truncated_checkpoint(compressed, text, tmp_path):
    folder = tmp_path / "truncated"
    folder.mkdir()
    for path in compressed.iterdir():
        content = path.read_bytes()
        (folder / path.name).write_bytes(content[: len(content) // 2] if path.suffix == ".safetensors" else content)
    assert "could not be loaded" in fails("evaluate", folder, "--text", text, "--length", "64")


def test_exit_codes_of_the_program(tmp_path):
    program = [sys.executable, "-m", "eigenattn.cli"]
    wrong = subprocess.run(
        [*program, "compress", "x", str(tmp_path), "--kv-ratio", "0"], capture_output=True, text=True
    )
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("eigenattn: kv_ratio must lie in (0, 1]")
    assert wrong.stderr.count("\n") == 1
    assert wrong.stdout == ""
    assert subprocess.run([*program, "squeeze"], capture_output=True).returncode == 2
