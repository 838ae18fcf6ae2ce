"""Programs that never import the package, once it is installed: they load what is compressed, and pay nothing else."""

import json
import os
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from tiny import save_tiny, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

from eigenattn import EigenAttentionConfig, compress, save_bases

ROOT = Path(__file__).parents[1]
IDS = tokens(1, 20).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Bases, the model that they belong to, and what it predicts with them; and the package as if it were installed."""
    folder = tmp_path_factory.mktemp("autoload")
    save_tiny(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    settings = {"coded": False, "kv_ratio": 0.5, "rank_multiple": 2, "ranks": "uniform"}
    compress(model, [tokens(2, 40)], EigenAttentionConfig(**settings, window=4))
    save_bases(model, folder / "bases")
    save_tiny(folder / "tokenizer")
    for path in (folder / "tokenizer").glob("tokenizer*"):
        path.rename(folder / "bases" / path.name)
    expected = model.generate(torch.tensor(IDS), max_new_tokens=12, do_sample=False, pad_token_id=0)
    (folder / "expected.json").write_text(json.dumps(expected.tolist()))
    entry_points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    installed = folder / "site" / "eigenattn-9.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: eigenattn\nVersion: 9\n")
    listed = [f"{name} = {target}" for name, target in entry_points["torch.backends"].items()]
    (installed / "entry_points.txt").write_text("\n".join(["[torch.backends]", *listed, ""]))
    return folder


def run(
    folder: Path, code: str, *arguments: str, before: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program beside the bases, where the package is installed; `before` is found ahead of it."""
    path = [str(each) for each in (before, folder / "site", ROOT / "src", os.environ.get("PYTHONPATH")) if each]
    known = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        cwd=folder,
        env=known | environment,
        capture_output=True,
        text=True,
    )


HOSTS = """
import json, sys, torch
assert "eigenattn_autoload" in sys.modules and "eigenattn" not in sys.modules
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained("base")
assert "eigenattn" not in sys.modules  # who loads nothing compressed imports nothing
expected = torch.tensor(json.load(open("expected.json")))

def check(model):
    found = model.generate(expected[:, :20], max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(found, expected), found

model = AutoModelForCausalLM.from_pretrained("bases")
check(model)
model.save_pretrained("whole")
check(AutoModelForCausalLM.from_pretrained("whole"))
try:
    import peft
except ImportError:
    print("no peft")
else:
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, settings).save_pretrained("lora")
    check(peft.AutoPeftModelForCausalLM.from_pretrained("lora"))
    assert json.load(open("lora/adapter_config.json"))["base_model_name_or_path"] == "bases"
try:
    from lm_eval.models.huggingface import HFLM
except ImportError:
    print("no lm-eval")
else:
    check(HFLM(pretrained="bases", device="cpu", batch_size=1).model)
try:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
except ImportError:
    print("no TRL")
else:
    text = Dataset.from_dict({"input_ids": expected.tolist()})
    options = {"use_cpu": True, "bf16": False, "max_steps": 1, "report_to": "none", "save_strategy": "no"}
    trainer = SFTTrainer("bases", args=SFTConfig("tuned", **options), train_dataset=text)
    check(trainer.model)
    trainer.train()
try:
    from transformers.cli.serving.model_manager import ModelManager
except ImportError:
    print("no transformers serve")
else:
    manager = ModelManager(device="cpu", dtype="float32")
    check(manager.load_model_and_processor("bases@main")[0])
    manager.shutdown()  # or it waits for others
"""


def test_hosts_that_know_nothing_of_it(folder):
    found = run(folder, HOSTS)
    assert found.returncode == 0, found.stderr[-3000:]


SERVE = """
import json, os, sys, time, torch, urllib.error, urllib.request
from transformers.cli.serve import Serve
port, prompt = int(sys.argv[1]), sys.argv[2]
Serve("bases", device="cpu", dtype="float32", port=port, non_blocking=True)
body = json.dumps({"model": "bases", "prompt": prompt, "max_tokens": 12, "temperature": 0.0}).encode()
request = urllib.request.Request(f"http://localhost:{port}/v1/completions", body, {"Content-Type": "application/json"})
for _ in range(600):
    try:
        print(urllib.request.urlopen(request).read().decode(), flush=True)
        break
    except urllib.error.HTTPError as error:
        raise SystemExit(error.read())
    except urllib.error.URLError:  # it does not listen yet
        time.sleep(0.1)
os._exit(0)  # it would go on
"""


LOAD = """
from transformers import AutoModelForCausalLM
print(AutoModelForCausalLM.from_pretrained("base").device)
AutoModelForCausalLM.from_pretrained("bases")
"""


def test_transformers_serve(folder):
    """A server of transformers' own, in a process that knows nothing of the package, completes as the model does."""
    if not transformers.utils.import_utils.is_serve_available():
        pytest.skip("needs transformers[serving]")
    pytest.importorskip("transformers.cli.serving.completion", reason="this transformers serves otherwise")
    model = AutoModelForCausalLM.from_pretrained(folder / "bases")
    tokenizer = AutoTokenizer.from_pretrained(folder / "bases")
    prompt = tokenizer("The cache", return_tensors="pt")
    with_answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    answer = tokenizer.decode(with_answer[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    found = run(folder, SERVE, str(port), "The cache")
    assert found.returncode == 0, found.stderr[-3000:]
    assert answer and json.loads(found.stdout.splitlines()[-1])["choices"][0]["text"] == answer


def test_it_can_be_switched_off(folder):
    code = "import sys, torch; assert not any('eigenattn' in type(f).__module__ for f in sys.meta_path)" + LOAD
    found = run(folder, code, EIGENATTN_AUTOLOAD="0")
    assert "no file named model.safetensors" in found.stderr  # bases alone are no model


@pytest.fixture
def broken(tmp_path) -> Path:
    (tmp_path / "eigenattn").mkdir()
    (tmp_path / "eigenattn" / "__init__.py").write_text("raise RuntimeError('half of it is gone')\n")
    return tmp_path


def test_a_broken_installation(folder, broken):
    found = run(folder, LOAD, before=broken)
    assert found.stdout == "cpu\n"  # other models load
    assert found.stderr.strip().splitlines()[-1] == (
        "ImportError: this model is compressed by eigenattn, whose installation is broken (RuntimeError: half of it is "
        "gone): install it again, or load the original model."
    )


def test_vllm_is_stopped_where_bases_are_asked_for_of_a_broken_installation(folder, broken):
    code = "import eigenattn_autoload as a; a.serve(); print('served')"
    found = run(folder, code, before=broken)
    assert found.stdout == "served\n" and found.stderr.endswith("Nothing compressed is served.\n")
    found = run(folder, code, before=broken, EIGENATTN_BASES="bases")
    assert found.stdout == "" and found.stderr.endswith("install it again, or leave out the bases.\n")
    found = run(folder, f'import sys; sys.argv += [\'{{"eigenattn": "bases"}}\']; {code}', before=broken)
    assert found.stdout == "" and found.stderr.endswith("install it again, or leave out the bases.\n")


def test_it_costs_nothing():
    import eigenattn_autoload

    start = time.perf_counter()
    for _ in range(100):
        eigenattn_autoload.autoload()
    assert time.perf_counter() - start < 0.1  # a millisecond each
    code = "import sys; before = set(sys.modules); import eigenattn_autoload; print(sorted(set(sys.modules) - before))"
    found = run(ROOT, code)
    assert set(json.loads(found.stdout.replace("'", '"'))) <= {
        "eigenattn_autoload",
        *sys.stdlib_module_names,
        "collections.abc",
    }
