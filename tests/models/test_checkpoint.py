import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import character_tokenizer, compressed, tiny, tokens
from torch import multiprocessing
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, pipeline

from eigenattn import EigenAttentionConfig, EigenAttnError, compress
from eigenattn.cache.layout import SIDES, Latent, Layout
from eigenattn.cache.packing import Widths
from eigenattn.models.checkpoint_format import EigenAttnCheckpointConfig
from eigenattn.models.conversion import eigen_layers

# Of a model with one layer of two KV heads.
ONE_LAYER, ORIGINALS = LlamaConfig(num_hidden_layers=1), [Layout.full(2, 16)]
IDS = tokens(2, 20)


@pytest.fixture(params=[0, 4], ids=["folded", "windowed"])
def window(request) -> int:
    return request.param


def small(window: int) -> torch.nn.Module:
    model = tiny("llama")
    config = EigenAttentionConfig(kv_ratio=0.6, rank_multiple=2, window=window, ranks="uniform")
    compress(model, [IDS], config, provenance={"seed": 0})
    return model


@pytest.fixture
def checkpoint(tmp_path, window) -> Path:
    model = small(window)
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


LOAD_WHOLE = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
model, logits = (torch.load(Path(sys.argv[1]) / name, weights_only=False) for name in ("model.pt", "logits.pt"))
ids = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(1))
print("EQUAL" if torch.equal(model(ids).logits, logits) else "DIFFERENT")
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


def test_without_the_package_transformers_says_so(checkpoint, window):
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(checkpoint)!r})"
    alone = os.environ | {"EIGENATTN_AUTOLOAD": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=alone)
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


@pytest.mark.parametrize("loaded", [False, True])
def test_half_and_float(checkpoint, window, loaded):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto") if loaded else small(window)
    expected = small(window).to(torch.float16)
    assert torch.equal(model.half()(IDS).logits, expected(IDS).logits)
    assert {p.dtype for p in model.float().parameters()} == {torch.float32}


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


@pytest.mark.parametrize("name", ["llama", "falcon", "gpt2", "gemma3"])
@pytest.mark.parametrize("coded", [False, True])
def test_pickled(name, coded):
    """Also after it has decoded, when what follows from its weights is memoised."""
    model = compressed(name, 4, coded)
    model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    own, original = eigen_layers(again)[0], eigen_layers(model)[0]
    assert type(own) is type(original) and own.layout == original.layout
    assert torch.equal(copy.deepcopy(again)(IDS).logits, model(IDS).logits)


def test_whole_models_load_in_a_new_process(tmp_path):
    model = small(window=4)
    torch.save(model, tmp_path / "model.pt")
    torch.save(model(IDS).logits, tmp_path / "logits.pt")
    done = subprocess.run([sys.executable, "-c", LOAD_WHOLE, tmp_path], capture_output=True, text=True)
    assert "EQUAL" in done.stdout, done.stderr


def test_spawned_processes_get_models():
    model = small(window=4)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert torch.equal(pool.apply(logits_of, (model,)), model(IDS).logits)


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    torch.set_num_threads(1)
    return model(IDS).logits.detach()


def edit(checkpoint: Path, change) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    change(config["quantization_config"])
    (checkpoint / "config.json").write_text(json.dumps(config))


def key_latent(quantization_config: dict) -> dict:
    """The first layer's latents of keys."""
    return quantization_config["layers"][0]["latents"][0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda q: q["layers"].pop(), "ranks for 2 layers"),
        (lambda q: key_latent(q).update(rank=99), "layer 0 of the checkpoint: rank 99 is above full rank, 16"),
        (lambda q: key_latent(q).update(rank=-2), "layer 0 of the checkpoint: no heads and rank"),
        (lambda q: key_latent(q).update(rank="8"), "no heads and rank"),
        (lambda q: key_latent(q).update(heads=3), "3 KV heads share a latent, and the model has 2"),
        (lambda q: key_latent(q).update(sides=["query"]), "no sides"),
        (lambda q: key_latent(q).update(sides=["value"]), "keys and values are not each in one latent"),
        (lambda q: key_latent(q).update(widths={"8": 1}), "widths of 1 channels and rank"),
        (lambda q: key_latent(q).update(widths={"7": 8}), "no widths"),
        (lambda q: key_latent(q).update(scaled=1), "no scale"),
        (lambda q: q["layers"][0].update(latents=7), "no latents"),
        (lambda q: q.update(layers=[]), "has no layers"),
        (lambda q: q.update(layers={"latents": 1}), "has no layers"),
        (lambda q: q.update(format_version=99), "format 99"),
        (lambda q: q["method"].update(version=99), "version 99"),
    ],
)
def test_wrong_configurations_are_refused(checkpoint, change, says):
    edit(checkpoint, change)
    with pytest.raises(EigenAttnError, match=says):
        AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.mark.parametrize("side", [0, 1])
def test_ranks_that_are_not_the_weights(checkpoint, side):
    def lower(quantization_config: dict) -> None:
        quantization_config["layers"][1]["latents"][side]["rank"] -= 2

    edit(checkpoint, lower)
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
    layer = {"latents": [{"sides": ["key", "value"], "heads": 2, "rank": 4, "widths": {"6": 1, "3": 3}}]}
    config = EigenAttnCheckpointConfig([layer], provenance={"seed": 1})
    again = EigenAttnCheckpointConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert again.layouts(ONE_LAYER, ORIGINALS) == [Layout(2, (Latent(SIDES, 2, 4, 16, Widths.of({6: 1, 3: 3})),), 32)]


@pytest.mark.parametrize(
    ("layer", "method", "expected"),
    [
        ({"rank_k": 8, "rank_v": 4}, {}, (Latent(("key",), 1, 8, 16), Latent(("value",), 1, 4, 16))),
        (
            {"rank_k": 24, "rank_v": 32},
            {"shared_heads": 2},
            (Latent(("key",), 2, 24, 16), Latent(("value",), 1, 16, 16)),
        ),
        (
            {"rank_k": 16, "rank_v": 20},
            {"shared_values": 2},
            (Latent(("key",), 1, 16, 16), Latent(("value",), 2, 20, 16)),
        ),
        ({"rank_k": 24, "rank_v": 0}, {"shared_heads": 2, "joint": True}, (Latent(SIDES, 2, 24, 16),)),
        ({"rank_k": 16, "rank_v": 16}, {"joint": True}, Layout.full(2, 16).latents),
        (
            {"rank_k": 16, "rank_v": 6, "widths_k": [0, 4, 4, 8], "widths_v": [1, 0, 0, 5]},
            {"kv_ratio": None, "bits_per_element": 3.0},
            (
                Latent(("key",), 1, 16, 16, Widths.of({6: 4, 4: 4, 2: 8})),
                Latent(("value",), 1, 6, 16, Widths.of({8: 1, 2: 5})),
            ),
        ),
        (
            {"rank_k": 8, "rank_v": 0, "widths_k": [0, 0, 8, 0], "widths_v": [0, 0, 0, 0]},
            {"joint": True},
            (Latent(SIDES, 1, 8, 16, Widths.of({4: 8})),),
        ),
    ],
)
def test_format_1_is_read(layer, method, expected):
    method = {"kv_ratio": 0.5, "window": 8, **method, "version": 1}
    config = EigenAttnCheckpointConfig([layer], method=method, format_version=1)
    shares = bool(method.keys() & {"shared_heads", "shared_values"})
    assert config.layouts(ONE_LAYER, ORIGINALS) == [Layout(2, expected, 8, beside=shares)]
    again = EigenAttnCheckpointConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.format_version == 2
    assert again.layouts(ONE_LAYER, ORIGINALS) == config.layouts(ONE_LAYER, ORIGINALS)


@pytest.mark.parametrize(
    "layer",
    [
        {},
        [],
        {"rank_k": 8},
        {"rank_k": 0, "rank_v": 8},
        {"rank_k": 8, "rank_v": False},
        {"rank_k": 8, "rank_v": 8, "widths_k": [8, 0, 0]},
        {"rank_k": 8, "rank_v": 8, "widths_k": [4, 0, 0, 0], "widths_v": [8, 0, 0, 0]},
        {"rank_k": 8, "rank_v": 8, "widths_k": [9, 0, -1, 0], "widths_v": [8, 0, 0, 0]},
    ],
)
def test_malformed_layers_of_format_1_are_one_line(layer):
    config = EigenAttnCheckpointConfig([layer], format_version=1)
    with pytest.raises(EigenAttnError, match="layer 0 of the checkpoint") as error:
        config.layouts(ONE_LAYER, ORIGINALS)
    assert "\n" not in str(error.value)
