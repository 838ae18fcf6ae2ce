"""Models and texts that are not as they should be: a right result, or an error that names layer and cause."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from tiny import character_tokenizer, save_tiny, tiny, tokens
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from eigenattn import EigenAttentionConfig, EigenAttnError, compress
from eigenattn.calibration.text import load_text
from eigenattn.compression.methods import BASES
from eigenattn.compression.ranks import RANK_RULES
from eigenattn.evaluation.reading import read
from eigenattn.models.conversion import eigen_layers
from eigenattn.workflows.calibrate import CalibrationText
from eigenattn.workflows.compress import compress_checkpoint

SETTINGS = {"kv_ratio": 0.5, "rank_multiple": 2}
IDS = tokens(4, 40)


def refused(model, batches=(IDS,), **options) -> str:
    classes = [type(m) for m in model.modules()]
    with pytest.raises(EigenAttnError) as error:
        compress(model, batches, EigenAttentionConfig(**{**SETTINGS, "window": 4, **options}))
    assert "\n" not in str(error.value)
    assert [type(m) for m in model.modules()] == classes  # as it was
    return str(error.value)


def finite(model) -> bool:
    return bool(model(IDS).logits.isfinite().all()) and all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.weight", "lm_head.weight", "model.norm.weight"])
@torch.no_grad()
def test_weights_that_are_not_numbers(name, value):
    model = tiny("llama")
    model.get_parameter(name).view(-1)[7] = value
    assert f"{name} of this model holds NaN" in refused(model)


@pytest.mark.parametrize("basis", sorted(BASES))
@torch.no_grad()
def test_activations_that_overflow_name_their_layer(basis):
    """Finite weights whose products leave fp32."""
    model = tiny("llama")
    model.model.layers[1].self_attn.v_proj.weight.fill_(1e38)
    assert "layer 1 gives NaN or infinite" in refused(model, basis=basis)


@torch.no_grad()
def test_predictions_that_are_not_numbers():
    """Attention is sound, and what is measured at the output is not."""
    model = tiny("llama")
    model.lm_head.weight.fill_(3e38)
    assert "NaN or infinitely much" in refused(model, coded=False)
    assert "gives NaN or infinite" in refused(model)


@torch.no_grad()
def test_scores_past_the_range_of_half_precision():
    """Scores before scaling pass 65,504; the model itself works, and so do its statistics."""
    model = tiny("llama").half()
    for layer in model.model.layers:
        layer.self_attn.scaling = 1e-4
        layer.self_attn.q_proj.weight.mul_(30)
        layer.self_attn.k_proj.weight.mul_(30)
    assert model(IDS).logits.isfinite().all()
    compress(model, [IDS], EigenAttentionConfig(**SETTINGS, window=4, ranks="uniform"))
    assert finite(model)


@torch.no_grad()
def test_bases_past_the_range_of_half_precision(monkeypatch):
    model = tiny("llama").half()
    method = BASES["eigen"]

    def huge(moments):
        return tuple(replace(b, encoder=b.encoder * 1e6, decoder=b.decoder / 1e6) for b in method.build(moments))

    monkeypatch.setitem(BASES, "eigen", replace(method, build=huge))
    message = refused(model, basis="eigen", ranks="uniform")
    assert "layer 0's key_encoder does not fit float16" in message
    assert not eigen_layers(model)


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("basis", sorted(BASES))
@pytest.mark.parametrize("ranks", sorted(RANK_RULES))
@torch.no_grad()
def test_dead_heads(ranks, basis, window):
    """Keys, queries and values that are zero: nothing to keep, and nothing lost."""
    model = tiny("llama")
    for layer in model.model.layers[:2]:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.weight[:16] = 0  # the first head
    model.model.layers[0].self_attn.v_proj.weight.zero_()
    report = compress(model, [IDS], EigenAttentionConfig(**SETTINGS, window=window, basis=basis, ranks=ranks))
    assert 0.3 < report.kv_ratio <= 0.5
    assert finite(model)


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("basis", sorted(BASES))
@torch.no_grad()
def test_fewer_tokens_than_dimensions(basis, window):
    """Moments of rank 6 of 16: directions never seen are free, and the text itself is kept."""
    model, ids = tiny("opt"), tokens(1, 6 + window, seed=3)
    exact = model(ids).logits
    compress(model, [ids], EigenAttentionConfig(kv_ratio=0.75, ranks="uniform", basis=basis, window=window))
    assert finite(model)
    error = (model(ids).logits - exact).abs().max() / exact.std()
    # Queries and keys of 10 tokens fill more than the 12 dimensions that stay, and `eigen` holds both alike.
    assert error < (0.2 if basis == "eigen" and window else 1e-4)


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("basis", sorted(BASES))
@torch.no_grad()
def test_one_token_again_and_again(basis, window):
    model = tiny("llama")
    ids = torch.full((2, 40), 5)
    exact = model(ids).logits
    compress(model, [ids], EigenAttentionConfig(**SETTINGS, ranks="uniform", basis=basis, window=window))
    assert finite(model)
    torch.testing.assert_close(model(ids).logits, exact, rtol=0, atol=1e-3)  # there is one key to keep


def test_texts_of_one_token():
    assert "at least 2" in refused(tiny("llama"), [tokens(1, 1)])
    assert "no tokens" in refused(tiny("llama"), [{"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}])


def test_tokens_of_another_model():
    assert "token 128, and the model knows tokens 0 to 127" in refused(tiny("llama"), [IDS, torch.full((1, 40), 128)])
    assert "token -1" in refused(tiny("llama"), [torch.full((1, 40), -1)])
    with pytest.raises(EigenAttnError, match="token 128"):
        read(tiny("llama"), torch.full((1, 40), 128))


def test_a_tokenizer_of_another_model(tmp_path):
    tiny("llama", vocab_size=64).save_pretrained(tmp_path / "base")
    character_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "fox.txt").write_text("the quick brown fox " * 30)
    with pytest.raises(EigenAttnError, match="is the tokenizer another model's"):
        compress_checkpoint(
            str(tmp_path / "base"),
            tmp_path / "out",
            EigenAttentionConfig(**SETTINGS, window=4),
            CalibrationText([str(tmp_path / "fox.txt")], samples=2, length=40),
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "fox.txt"]


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "is empty"), (b" \n\t", "is empty"), (b"\xff\xfe\x00", "UTF-8"), (b"MZ\x00\x01" * 9, "zero bytes")],
)
def test_texts_that_are_none(tmp_path, content, says):
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(EigenAttnError, match=says):
        load_text(str(tmp_path / "text.txt"))


@pytest.mark.parametrize("window", [0, 4])
@torch.no_grad()
def test_tied_embeddings(tmp_path, window):
    model = tiny("llama", tie_word_embeddings=True)
    compress(model, [IDS], EigenAttentionConfig(**SETTINGS, window=window, ranks="uniform"))
    model.save_pretrained(tmp_path / "tied")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "tied", dtype="auto")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("window", [0, 4])
@torch.no_grad()
def test_layers_whose_projections_are_one_tensor(window):
    model, twin = tiny("llama"), tiny("llama")
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    second.k_proj.weight, second.o_proj.weight = first.k_proj.weight, first.o_proj.weight
    twin.load_state_dict(model.state_dict())
    for each in (model, twin):
        compress(each, [IDS], EigenAttentionConfig(**SETTINGS, window=window, ranks="uniform"))
    torch.testing.assert_close(model(IDS).logits, twin(IDS).logits, rtol=0, atol=1e-5)


def test_layers_that_share_one_attention():
    model = tiny("llama")
    model.model.layers[2].self_attn = model.model.layers[1].self_attn
    assert "share one attention module" in refused(model)


def test_models_without_a_language_head():
    model = tiny("llama").model
    assert "this LlamaModel has no language head" in refused(model)
    assert "load it with AutoModelForCausalLM" in refused(model, share="1kv", ranks="uniform")
    classifier = AutoModelForSequenceClassification.from_config(tiny("llama").config)
    assert "this LlamaForSequenceClassification has no language head" in refused(classifier)
    compress(model, [IDS], EigenAttentionConfig(**SETTINGS, window=0, ranks="uniform"))  # decoders are refitted, too
    assert model(IDS).last_hidden_state.isfinite().all()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_model_that_carries_an_adapter():
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=2, target_modules=["k_proj", "o_proj"], init_lora_weights=False)
    adapted = get_peft_model(tiny("llama"), settings)
    assert "this model carries an adapter" in refused(adapted)
    exact = adapted(IDS).logits
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, exact, rtol=0, atol=1e-3)
    compress(merged, [IDS], EigenAttentionConfig(**SETTINGS, window=4, ranks="uniform"))
    late = get_peft_model(merged, LoraConfig(r=2, target_modules=["k_proj"]))  # and one can be added afterwards
    torch.testing.assert_close(late(IDS).logits, merged(IDS).logits)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("PrefixTuningConfig", {"num_virtual_tokens": 5}),
        ("PromptTuningConfig", {"num_virtual_tokens": 5}),
        ("AdaptionPromptConfig", {"adapter_len": 4, "adapter_layers": 2}),
        ("LoraConfig", {"target_modules": ["up_proj"]}),
    ],
)
def test_adapters_that_are_not_in_attention(kind, settings):
    import peft

    settings = getattr(peft, kind)(task_type="CAUSAL_LM", **settings)
    assert "this model carries an adapter" in refused(peft.get_peft_model(tiny("llama"), settings))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("window", [0, 4])
def test_prefixes_on_a_compressed_model(window):
    """A prefix is of whole keys, which were rotated already where there are rotary positions; a prompt is of tokens."""
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    model = tiny("llama")
    compress(model, [IDS], EigenAttentionConfig(**SETTINGS, window=window, ranks="uniform"))
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
    with pytest.raises(EigenAttnError, match=r"peft's prefix tuning.* tune prompts or LoRA"):
        get_peft_model(model, PrefixTuningConfig(**settings))(IDS)
    prompted = get_peft_model(model, PromptTuningConfig(**settings))
    prompted(IDS, labels=IDS).loss.backward()
    assert prompted.prompt_encoder.default.embedding.weight.grad.isfinite().all()


def test_layers_that_are_no_projections():
    model = tiny("llama")
    model.model.layers[0].self_attn.q_proj = torch.nn.Identity()
    assert "layers.0.self_attn.q_proj is a Identity, not a linear layer of transformers" in refused(model)


def held_by(method) -> SimpleNamespace:
    return SimpleNamespace(quantization_config=SimpleNamespace(quant_method=method))


@pytest.mark.parametrize("place", ["quantizer", "configuration", "dequantised"])
def test_models_that_a_quantizer_holds(place):
    """As quanto's with `modules_to_not_convert`, whose attention is plain, and what was dequantised on loading."""
    model = tiny("llama")
    if place == "quantizer":
        model.hf_quantizer = held_by("quanto")
    elif place == "configuration":  # transformers passes over methods that it does not know
        model.config.quantization_config = {"quant_method": "quanto"}
    else:
        model._weight_conversions = [SimpleNamespace(operations=[SimpleNamespace(hf_quantizer=held_by("quanto"))])]
    compress(model, [IDS], EigenAttentionConfig(**SETTINGS, window=0, ranks="uniform"))
    assert all(attention.layout.beside for attention in eigen_layers(model))  # nothing is folded


def test_a_checkpoint_in_fp8(tmp_path):
    """Without a GPU transformers dequantises it, and before 5.24 quantises again what is saved."""
    folder = save_tiny(tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        rows, columns = (size // 16 for size in tensors[name].shape)
        blocks = tensors[name].view(rows, 16, columns, 16)
        scale = blocks.abs().amax((1, 3)) / 448
        tensors[name] = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    quantised = Version(transformers.__version__).release < (5, 24)
    compress(model, [IDS], EigenAttentionConfig(**SETTINGS, window=0, ranks="uniform"))
    assert all(attention.layout.beside == quantised for attention in eigen_layers(model))
    if not quantised:
        model.save_pretrained(tmp_path / "out")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_gguf_file_whose_weights_are_unpacked(tmp_path):
    model = tiny("llama")
    model.hf_quantizer = held_by("gguf")
    compress(model, [IDS], EigenAttentionConfig(**SETTINGS, window=4, ranks="uniform"))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_nothing_is_kept_of_what_was_refused(tmp_path):
    base = save_tiny(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = math.nan
    model.save_pretrained(base)
    (tmp_path / "fox.txt").write_text("the quick brown fox " * 30)
    with pytest.raises(EigenAttnError, match=r"layers\.2\.mlp\.up_proj\.weight of this model holds NaN"):
        compress_checkpoint(
            str(base),
            tmp_path / "out",
            EigenAttentionConfig(**SETTINGS, window=4),
            CalibrationText([str(tmp_path / "fox.txt")], samples=2, length=40),
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "fox.txt"]
