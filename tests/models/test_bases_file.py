import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny, tokens
from transformers import AutoModelForCausalLM

import eigenattn
from eigenattn import EigenAttentionConfig, EigenAttnError, compress
from eigenattn.models.bases_file import save_bases
from eigenattn.models.conversion import eigen_layers
from eigenattn.models.loading import Source, load_model
from eigenattn.report.inspection import inspect_checkpoint

IDS = tokens(2, 30)


def compressed(window=4):
    model = tiny("llama")
    config = EigenAttentionConfig(kv_ratio=0.5, rank_multiple=2, window=window, ranks="uniform")
    return model, compress(model, [IDS], config, provenance={"base_model": "base"})


@pytest.fixture
def bases(tmp_path) -> Path:
    folder = tmp_path / "bases"
    folder.mkdir()
    save_bases(compressed()[0], folder)
    return folder


def test_attached_bases_are_the_compressed_model(bases):
    model, _ = compressed()
    again = eigenattn.attach(tiny("llama"), bases)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert sum(path.stat().st_size for path in bases.iterdir()) < 120_000
    assert {path.suffix for path in bases.iterdir()} == {".json", ".safetensors"}


def test_attached_bases_can_be_saved_as_a_whole(bases, tmp_path):
    model = eigenattn.attach(tiny("llama"), bases)
    model.save_pretrained(tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype="auto")
    assert torch.equal(whole(IDS).logits, model(IDS).logits)


def test_attached_in_half_precision(bases):
    model = eigenattn.attach(tiny("llama").to(torch.bfloat16), bases)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(IDS).logits.isfinite().all()


def test_a_folder_of_bases_loads_with_its_base_model(bases, tmp_path):
    config = json.loads((bases / "eigenattn_config.json").read_text())
    config["provenance"]["base_model"] = str(save_tiny(tmp_path / "base"))
    (bases / "eigenattn_config.json").write_text(json.dumps(config))
    model = load_model(Source.of(str(bases)))
    assert len(eigen_layers(model)) == 3
    assert inspect_checkpoint(str(bases)).compressed


def test_without_a_window_there_is_nothing_to_attach(tmp_path):
    with pytest.raises(EigenAttnError, match="folded"):
        save_bases(compressed(window=0)[0], tmp_path)


@pytest.mark.parametrize("name", ["opt", "qwen3_moe"])
def test_bases_of_another_model_leave_the_model_as_it_was(bases, name):
    other = tiny(name, num_hidden_layers=2)
    exact = other(IDS).logits
    with pytest.raises(EigenAttnError, match="ranks for 3 layers"):
        eigenattn.attach(other, bases)
    assert torch.equal(other(IDS).logits, exact)
    assert not eigen_layers(other)


def test_bases_of_another_shape(bases):
    with pytest.raises(EigenAttnError, match="made for another model"):
        eigenattn.attach(tiny("opt"), bases)


def test_missing_and_broken_files(bases, tmp_path):
    with pytest.raises(EigenAttnError, match="neither a folder of bases nor a hub id"):
        eigenattn.attach(tiny("llama"), "nobody/nothing")
    with pytest.raises(EigenAttnError, match="has no eigenattn_config"):
        eigenattn.attach(tiny("llama"), tmp_path)
    tensors = load_file(bases / "eigenattn.safetensors")
    del tensors["layers.1.key_decoder"]
    save_file(tensors, bases / "eigenattn.safetensors")
    with pytest.raises(EigenAttnError, match=r"lacks layers\.1\.key_decoder"):
        eigenattn.attach(tiny("llama"), bases)
    content = (bases / "eigenattn.safetensors").read_bytes()
    (bases / "eigenattn.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(EigenAttnError, match="could not be read"):
        eigenattn.attach(tiny("llama"), bases)
    (bases / "eigenattn_config.json").write_text("{")
    with pytest.raises(EigenAttnError, match="not a configuration"):
        eigenattn.attach(tiny("llama"), bases)
