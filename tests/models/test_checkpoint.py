import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import character_tokenizer, tiny, tokens
from transformers import AutoModel, AutoModelForCausalLM, pipeline

from eigenattn import EigenAttentionConfig, EigenAttnError, compress
from eigenattn.models.checkpoint import EigenAttnCheckpointConfig
from eigenattn.models.conversion import eigen_layers

IDS = tokens(2, 20)


@pytest.fixture(params=[0, 4], ids=["folded", "windowed"])
def window(request) -> int:
    return request.param


@pytest.fixture
def checkpoint(tmp_path, window) -> Path:
    model = tiny("llama")
    compress(
        model,
        [IDS],
        EigenAttentionConfig(kv_ratio=0.6, rank_multiple=2, window=window, ranks="uniform"),
        provenance={"seed": 0},
    )
    model.save_pretrained(tmp_path / "checkpoint")
    torch.save(model(IDS).logits, tmp_path / "logits.pt")
    return tmp_path / "checkpoint"


LOAD = """
import sys, torch
{imports}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({path!r}, dtype="auto").eval()
logits = torch.load({logits!r}, weights_only=True)
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from tiny import tokens
print("EQUAL" if torch.equal(model(tokens(2, 20)).logits, logits) else "DIFFERENT")
"""


def in_new_process(checkpoint: Path, imports: str) -> subprocess.CompletedProcess:
    code = LOAD.format(
        imports=imports,
        path=str(checkpoint),
        logits=str(checkpoint.parent / "logits.pt"),
        tests=str(Path(__file__).parents[1]),
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_a_new_process_gives_equal_bits(checkpoint):
    done = in_new_process(checkpoint, "import eigenattn")
    assert "EQUAL" in done.stdout, done.stderr


def test_without_the_import_transformers_says_so(checkpoint, window):
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(checkpoint)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    # Folded weights do not fit the original. With a window its weights are all there, and it runs uncompressed.
    assert (done.returncode == 0) == bool(window)
    assert "Unknown quantization type, got eigenattn" in done.stderr


def test_nothing_is_pickled(checkpoint):
    assert {path.suffix for path in checkpoint.iterdir()} == {".json", ".safetensors"}


def test_dtype_device_map_and_base_model(checkpoint):
    half = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, device_map="cpu")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(IDS).logits.isfinite().all()
    base = AutoModel.from_pretrained(checkpoint)
    assert len(eigen_layers(base)) == 3
    assert base(IDS).last_hidden_state.isfinite().all()


def test_pipeline(checkpoint):
    generate = pipeline("text-generation", model=str(checkpoint), tokenizer=character_tokenizer())
    (out,) = generate("hello", max_new_tokens=4, do_sample=False)
    assert out["generated_text"].startswith("hello")


def test_saved_again_it_is_the_same(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    model.save_pretrained(tmp_path / "again", max_shard_size="50KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.config.quantization_config.provenance["seed"] == 0


def edit(checkpoint: Path, change) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    change(config["quantization_config"])
    (checkpoint / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda q: q["layers"].pop(), "ranks for 2 layers"),
        (lambda q: q["layers"][0].update(rank_k=99), "above full rank"),
        (lambda q: q["layers"][0].update(rank_k=-2), "whole positive ranks"),
        (lambda q: q["layers"][0].update(rank_k="8"), "whole positive ranks"),
        (lambda q: q.update(layers=[]), "whole positive ranks"),
        (lambda q: q.update(layers={"rank_k": 1}), "whole positive ranks"),
        (lambda q: q.update(format_version=99), "format 99"),
        (lambda q: q["method"].update(version=99), "version 99"),
    ],
)
def test_wrong_configurations_are_refused(checkpoint, change, says):
    edit(checkpoint, change)
    with pytest.raises(EigenAttnError, match=says):
        AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.mark.parametrize("side", ["rank_k", "rank_v"])
def test_ranks_that_are_not_the_weights(checkpoint, side):
    edit(checkpoint, lambda q: q["layers"][1].update({side: q["layers"][1][side] - 2}))
    with pytest.raises((EigenAttnError, RuntimeError), match=r"shape|mismatch"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_missing_tensors_are_refused(checkpoint):
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.key_decoder"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(EigenAttnError, match="lacks layer 1's key_decoder"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_missing_projections_are_refused(checkpoint):
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(EigenAttnError, match="lacks layer 1's k_proj"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_configuration_round_trip():
    config = EigenAttnCheckpointConfig([{"rank_k": 4, "rank_v": 2}], provenance={"seed": 1})
    assert EigenAttnCheckpointConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
