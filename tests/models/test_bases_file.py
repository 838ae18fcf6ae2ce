import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny import compressed as arbitrary
from tiny import save_tiny, tiny, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import eigenattn
from eigenattn import EigenAttentionConfig, EigenAttnError, compress
from eigenattn.models.bases_file import save_bases
from eigenattn.models.checkpoint_format import EigenAttnCheckpointConfig, checkpoint_of, mark_compressed
from eigenattn.models.conversion import eigen_layers, layouts_of
from eigenattn.models.loading import Source, load_model
from eigenattn.report.card import model_card
from eigenattn.report.inspection import inspect_checkpoint
from eigenattn.workflows.calibrate import CalibrationText
from eigenattn.workflows.compress import compress_checkpoint

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


def change(folder: Path, edit) -> None:
    values = json.loads((folder / "config.json").read_text())
    edit(values["quantization_config"])
    (folder / "config.json").write_text(json.dumps(values))


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


def test_attached_where_only_some_layers_have_attention(tmp_path):
    """Whose decoder layers, besides, hand no positions to attention."""
    name, rope = "granitemoehybrid-served", {"position_embedding_type": "rope"}
    model = arbitrary(name, window=4, **rope)
    method = EigenAttentionConfig(coded=False, window=4).to_dict()
    mark_compressed(model, EigenAttnCheckpointConfig([layout.to_dict() for layout in layouts_of(model)], True, method))
    save_bases(model, tmp_path)
    again = eigenattn.attach(tiny(name, **rope), tmp_path)
    logits = again(IDS, use_cache=False).logits
    assert torch.equal(logits, model(IDS, use_cache=False).logits)
    cache = again(IDS[:, :-1], use_cache=True).past_key_values
    last = again(IDS[:, -1:], past_key_values=cache).logits
    torch.testing.assert_close(last, logits[:, -1:], rtol=1e-4, atol=1e-4)


def test_attached_in_half_precision(bases):
    model = eigenattn.attach(tiny("llama").to(torch.bfloat16), bases)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(IDS).logits.isfinite().all()


def test_a_folder_of_bases_loads_with_its_base_model(bases, tmp_path):
    change(bases, lambda told: told["provenance"].update(base_model=str(save_tiny(tmp_path / "base"))))
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


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
def test_bases_know_their_base_in_any_dtype(tmp_path, dtype, other):
    model = tiny("llama").to(dtype)
    compress(model, [IDS], EigenAttentionConfig(kv_ratio=0.5, rank_multiple=2, window=4, ranks="uniform"))
    save_bases(model, tmp_path)
    eigenattn.attach(tiny("llama").to(other), tmp_path)
    eigenattn.attach(tiny("llama").to(dtype).to(other).float(), tmp_path)
    with pytest.raises(EigenAttnError, match="another model, whose weights differ"):
        eigenattn.attach(nudged(1e-3).to(other), tmp_path)


@torch.no_grad()
def nudged(size: float, name: str = "proj") -> torch.nn.Module:
    """The base model trained further: some of its parameters have moved by so much of their size."""
    model = tiny("llama")
    generator = torch.Generator().manual_seed(0)
    for each, parameter in model.named_parameters():
        if name in each:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std() * size)
    return model


@pytest.mark.parametrize("name", ["q_proj", "v_proj", "layers.2.self_attn.o_proj"])
def test_bases_of_a_model_that_was_trained_further(bases, name):
    model = nudged(1e-2, name)
    exact = model(IDS).logits
    with pytest.raises(EigenAttnError, match="load 'base', or compress this one"):
        eigenattn.attach(model, bases)
    assert torch.equal(model(IDS).logits, exact)


@pytest.mark.parametrize("value", [7, "", "zz", "00", "00 " * 9, ["0"], {}])
def test_fingerprints_that_are_none(bases, value):
    change(bases, lambda told: told["base"].update(weights=value))
    with pytest.raises(EigenAttnError, match="another model"):
        eigenattn.attach(tiny("llama"), bases)


def compress_bases(name: str, out: Path, text: Path) -> dict:
    text.write_text("the quick brown fox " * 30)
    config = EigenAttentionConfig(kv_ratio=0.5, rank_multiple=2, window=4, ranks="uniform")
    calibration = CalibrationText([str(text)], samples=2, length=40)
    compress_checkpoint(name, out, config, calibration, checkpoint=False)
    return json.loads((out / "config.json").read_text())["quantization_config"]["provenance"]


def test_a_base_model_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "base")
    assert compress_bases("base", tmp_path / "bases", tmp_path / "fox.txt")["base_model"] == str(tmp_path / "base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    nudged(1).save_pretrained("base")
    assert len(eigen_layers(load_model(Source.of("../bases")))) == 3
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(EigenAttnError, match="is gone: put it back, or load it"):
        Source.of("../bases")


def test_a_base_model_of_a_hub_is_loaded_at_its_commit(tmp_path, monkeypatch):
    commits = ["a" * 40, "b" * 40]
    repository = tmp_path / "hub" / "models--some--base"
    for commit in commits:
        save_tiny(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commits[0])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    facts = compress_bases("some/base", tmp_path / "bases", tmp_path / "fox.txt")
    assert (facts["base_model"], facts["base_model_revision"]) == ("some/base", commits[0])
    nudged(1).save_pretrained(repository / "snapshots" / commits[1])  # the hub moves on
    (repository / "refs" / "main").write_text(commits[1])
    source = Source.of(str(tmp_path / "bases"))
    assert source.revision == commits[0]
    assert len(eigen_layers(load_model(source))) == 3
    with pytest.raises(EigenAttnError, match=f"load 'some/base' at revision '{commits[0]}'"):
        eigenattn.attach(load_model(Source.of("some/base")), tmp_path / "bases")


def test_missing_and_broken_files(bases, tmp_path):
    with pytest.raises(EigenAttnError, match="neither a folder of bases nor a hub id"):
        eigenattn.attach(tiny("llama"), "nobody/nothing")
    with pytest.raises(EigenAttnError, match=r"has no config\.json"):
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
    (bases / "config.json").write_text("{")
    with pytest.raises(EigenAttnError, match="not a configuration"):
        eigenattn.attach(tiny("llama"), bases)


@pytest.fixture
def made(tmp_path) -> Path:
    """Bases as the command writes them."""
    save_tiny(tmp_path / "base")
    compress_bases(str(tmp_path / "base"), tmp_path / "bases", tmp_path / "fox.txt")
    return tmp_path / "bases"


def test_transformers_loads_bases_with_their_model(made, tmp_path):
    names = {"README.md", "config.json", "eigenattn.safetensors", "generation_config.json", "tokenizer.json"}
    assert names <= {path.name for path in made.iterdir()}
    attached = eigenattn.attach(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), made)
    model = AutoModelForCausalLM.from_pretrained(made, attn_implementation="eager")
    torch.testing.assert_close(model(IDS).logits, attached(IDS).logits)
    assert model.config._attn_implementation == "eager"
    assert model.name_or_path == str(made)  # by which an adapter finds it again
    loaded, told = LlamaForCausalLM.from_pretrained(made, dtype=torch.bfloat16, output_loading_info=True)
    assert loaded.dtype == torch.bfloat16
    assert not told["missing_keys"]
    assert checkpoint_of(loaded).provenance["base_model"] == str(tmp_path / "base")
    assert AutoTokenizer.from_pretrained(made)("fox")["input_ids"]
    nudged(1).save_pretrained(tmp_path / "base")
    with pytest.raises(EigenAttnError, match="another model, whose weights differ"):
        AutoModelForCausalLM.from_pretrained(made)


def test_bases_without_a_window(tmp_path):
    """Latents that heads share are never folded, so that their bases can stand alone."""
    model = tiny("llama")
    settings = {"coded": False, "kv_ratio": 0.5, "rank_multiple": 2, "ranks": "uniform"}
    compress(model, [IDS], EigenAttentionConfig(**settings, window=0, share="2"))
    save_bases(model, tmp_path)
    assert torch.equal(eigenattn.attach(tiny("llama"), tmp_path)(IDS).logits, model(IDS).logits)


def test_a_whole_checkpoint_is_written_where_maps_are_folded(tmp_path):
    save_tiny(tmp_path / "base")
    (tmp_path / "fox.txt").write_text("the quick brown fox " * 30)
    config = EigenAttentionConfig(kv_ratio=0.5, rank_multiple=2, window=0, ranks="uniform")
    text = CalibrationText([str(tmp_path / "fox.txt")], samples=2, length=40)
    compress_checkpoint(str(tmp_path / "base"), tmp_path / "out", config, text)
    assert (tmp_path / "out" / "model.safetensors").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(EigenAttnError, match="folded into the weights: save the whole model"):
        save_bases(model, tmp_path / "bases")
    with pytest.raises(EigenAttnError, match="is not compressed, and has no bases"):
        save_bases(tiny("llama"), tmp_path / "bases")


def test_a_hub_understands_the_model_card(tmp_path):
    report = compressed()[1]
    facts = {"base_model": "some/model", "dtype": "float32", "versions": {}, "text": [], "samples": 1, "length": 2}
    checkpoint = EigenAttnCheckpointConfig(report.layers, True, report.config, facts | {"seed": 0})
    card = ModelCard(model_card(checkpoint, report, layouts_of(compressed()[0]), whole=False))
    assert (card.data.base_model, card.data.library_name) == ("some/model", "transformers")
    assert {"eigenattn", "kv-cache"} <= set(card.data.tags)


def packed(model):
    """Four bits of each projection's rows, in codes."""
    for name, module in list(model.named_modules()):
        if name.endswith("_proj"):
            model.set_submodule(name, Packed(module))
    return model


class Packed(torch.nn.Module):
    def __init__(self, original):
        super().__init__()
        self.in_features, self.bias = original.in_features, None
        weight = original.weight.detach()
        self.register_buffer("scales", weight.abs().amax(1, keepdim=True) / 7)
        self.register_buffer("qweight", (weight / self.scales).round().to(torch.int32))

    def forward(self, x):
        return x @ (self.qweight.to(x.dtype) * self.scales).T


def test_bases_know_their_base_in_few_bits(bases, tmp_path):
    model = eigenattn.attach(packed(tiny("llama")), bases)
    assert model(IDS).logits.isfinite().all()
    with pytest.raises(EigenAttnError, match="another model, whose weights differ"):
        eigenattn.attach(packed(nudged(1)), bases)
    with pytest.raises(EigenAttnError, match=r"save its bases, with eigenattn\.save_bases"):
        model.save_pretrained(tmp_path / "whole")
    (tmp_path / "packed").mkdir()
    save_bases(model, tmp_path / "packed")
    eigenattn.attach(tiny("llama"), tmp_path / "packed")  # the other way round
    with pytest.raises(EigenAttnError, match="another model, whose weights differ"):
        eigenattn.attach(nudged(1), tmp_path / "packed")
