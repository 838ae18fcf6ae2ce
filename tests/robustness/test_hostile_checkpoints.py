"""Checkpoints that somebody tampered with: refused with a clear error, before any large allocation, or harmless."""

import copy
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny, tokens

import eigenattn
from eigenattn import EigenAttentionConfig, EigenAttnError, compress
from eigenattn.models.bases_file import BASES_FILE, CONFIG_FILE, save_bases
from eigenattn.models.checkpoint_format import EigenAttnCheckpointConfig, allocate
from eigenattn.models.conversion import convert_attention, eigen_layers
from eigenattn.models.loading import Source, load_model
from eigenattn.models.maps import MAPS, QUANTISERS

# Ten thousand inputs in all; `make fuzz` doubles it. Configurations are the cheapest, whole checkpoints the dearest.
EXAMPLES = int(os.environ.get("EIGENATTN_FUZZ", "5000"))
IDS = tokens(2, 20)


def fuzz(share: int):
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=max(EXAMPLES // share, 1),
        derandomize="EIGENATTN_FUZZ" not in os.environ,
        database=None,
        deadline=None,
        suppress_health_check=quiet,
    )


@pytest.fixture(scope="module")
def model():
    model = tiny("llama")
    config = EigenAttentionConfig(kv_ratio=0.5, rank_multiple=2, window=4, ranks="uniform")
    compress(model, [tokens(2, 40)], config, provenance={"base_model": "base", "seed": 0})
    return model


@pytest.fixture(scope="module")
def coded():
    model = tiny("llama")
    compress(model, [tokens(4, 40)], EigenAttentionConfig(coded=True, kv_ratio=0.1875, window=4))
    return model


@pytest.fixture(scope="module")
def bases(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    save_bases(model, folder)
    return folder


@pytest.fixture(scope="module")
def original():
    return tiny("llama")


NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**63, -(2**63), 10**300, 10**4000, 1e308, float("nan"), float("inf"), 0.5, -0.0]),
)
WORDS = st.sampled_from(
    ["", "8", "rank_k", "latents", "self", "../../etc/passwd", "/dev/zero", "\x00", "eigenattn", "a" * 300, "NaN"]
)
VALUES = st.recursive(
    st.one_of(NUMBERS, WORDS, st.booleans(), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=6,
)


def places(tree, path=()):
    """Every place in a tree of JSON values."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


@st.composite
def tampered(draw, tree):
    """A tree of JSON values with one to three changes: a value replaced, removed, doubled or added."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(tree))))
        if not path:
            if draw(st.integers(0, 20)) == 0:
                return draw(VALUES)
            continue
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        change = draw(st.sampled_from(["replace", "replace", "remove", "double", "add"]))
        if change == "replace":
            parent[path[-1]] = draw(VALUES)
        elif change == "remove":
            del parent[path[-1]]
        elif change == "double" and isinstance(parent, list):
            parent.insert(path[-1], parent[path[-1]])
        elif isinstance(parent, dict):
            parent[draw(WORDS)] = draw(VALUES)
    return tree


def in_format_1(values: dict) -> dict:
    """The same configuration as versions before format 2 wrote it."""
    layers = []
    for layer in values["layers"]:
        entry = {f"rank_{latent['sides'][0][0]}": latent["rank"] for latent in layer["latents"]}
        for latent in layer["latents"]:
            if "widths" in latent:
                widths = [latent["widths"].get(bits, 0) for bits in ("8", "6", "4", "2")]
                entry[f"widths_{latent['sides'][0][0]}"] = widths
        layers.append(entry)
    method = {name: value for name, value in values["method"].items() if name not in ("coded", "share", "version")}
    if values["method"]["coded"]:
        method |= {"kv_ratio": None, "bits_per_element": 16 * method["kv_ratio"]}
    old = {"shared_heads": 1, "shared_values": 1, "joint": False, "version": 1}
    return {**values, "layers": layers, "method": method | old, "format_version": 1}


def test_configurations(model, coded):
    valid = [each.config.quantization_config.to_dict() for each in (model, coded)]
    valid += [in_format_1(each) for each in valid]
    with torch.device("meta"):
        empty = tiny("llama")
    convert_attention(empty)
    layers = eigen_layers(empty)
    outcomes = {"refused": 0, "taken": 0}

    @fuzz(1)
    @given(st.one_of(*map(tampered, valid)))
    def attempt(values):
        if not isinstance(values, dict):
            return
        for attention in layers:
            for name in (*MAPS, *QUANTISERS):
                setattr(attention, name, None)
        try:
            config = EigenAttnCheckpointConfig.from_dict(values)
            allocate(layers, config)
        except EigenAttnError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
            return
        json.dumps(config.to_dict())
        outcomes["taken"] += 1
        for attention in layers:
            sizes = {n: p.numel() for n, p in attention.named_parameters() if n in (*MAPS, *QUANTISERS)}
            assert all(size <= 2 * (2 * 16) ** 2 for size in sizes.values())  # both sides of both heads in one latent

    attempt()
    assert min(outcomes.values()) > EXAMPLES // 50


def attach_or_refuse(folder: Path, original) -> bool:
    """Whether bases were refused; if so the model is as it was, and if not they are numbers."""
    victim = copy.deepcopy(original)
    try:
        eigenattn.attach(victim, folder)
    except EigenAttnError as error:
        assert "\n" not in str(error)
        assert not eigen_layers(victim)
        return True
    for attention in eigen_layers(victim):
        for name in (*MAPS, *QUANTISERS):
            parameter = getattr(attention, name)
            assert parameter is None or parameter.isfinite().all()
    return False


def copied(bases: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    for path in bases.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_configuration_files_of_bases(bases, original, tmp_path_factory):
    folder = copied(bases, tmp_path_factory)
    valid = json.loads((bases / CONFIG_FILE).read_text())

    refused = set()

    @fuzz(4)
    @given(tampered(valid["quantization_config"]), st.binary(max_size=3), st.integers(0, 2000))
    def attempt(values, noise, where):
        content = json.dumps({"quantization_config": values}).encode()
        if noise:
            content = content[:where] + noise + content[where + 1 :]
        (folder / CONFIG_FILE).write_bytes(content)
        refused.add(attach_or_refuse(folder, original))

    attempt()
    assert refused == {True, False}  # inputs of both kinds were tried


def test_headers_of_bases(bases, original, tmp_path_factory):
    """The header of a safetensors file: its length in 8 bytes, then JSON of shapes, dtypes and offsets."""
    folder = copied(bases, tmp_path_factory)
    content = (bases / BASES_FILE).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]

    refused = set()

    @fuzz(4)
    @given(tampered(header), st.sampled_from([0, 0, 0, 1, -1, 2**40, 2**63]))
    def attempt(values, off):
        text = json.dumps(values).encode()
        announced = max(len(text) + off, 0)
        (folder / BASES_FILE).write_bytes(struct.pack("<Q", announced) + text + data)
        refused.add(attach_or_refuse(folder, original))

    attempt()
    assert refused == {True, False}  # inputs of both kinds were tried


def test_coded_bases(coded, original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("coded")
    save_bases(coded, folder)
    valid = json.loads((folder / CONFIG_FILE).read_text())

    refused = set()

    @fuzz(4)
    @given(tampered(valid["quantization_config"]["layers"]))
    def attempt(layers):
        values = {**valid["quantization_config"], "layers": layers}
        (folder / CONFIG_FILE).write_text(json.dumps({**valid, "quantization_config": values}))
        refused.add(attach_or_refuse(folder, original))

    attempt()
    assert refused == {True, False}  # inputs of both kinds were tried


def test_bytes_of_bases(bases, original, tmp_path_factory):
    folder = copied(bases, tmp_path_factory)
    content = (bases / BASES_FILE).read_bytes()

    refused = set()

    @fuzz(4)
    @given(st.integers(0, len(content) - 1), st.binary(min_size=1, max_size=16), st.booleans())
    def attempt(where, noise, cut):
        changed = content[:where] if cut else content[:where] + noise + content[where + len(noise) :]
        (folder / BASES_FILE).write_bytes(changed)
        refused.add(attach_or_refuse(folder, original))

    attempt()
    assert refused == {True, False}  # inputs of both kinds were tried


def test_whole_checkpoints(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    model.save_pretrained(folder)
    valid = json.loads((folder / "config.json").read_text())

    refused = set()

    @fuzz(20)
    @given(tampered(valid["quantization_config"]))
    def attempt(values):
        (folder / "config.json").write_text(json.dumps({**valid, "quantization_config": values}))
        try:
            loaded = load_model(Source.of(str(folder)), device="cpu")
        except EigenAttnError as error:
            assert "\n" not in str(error)
            refused.add(True)
            return
        refused.add(False)
        assert loaded(IDS).logits.isfinite().all()

    attempt()
    assert refused == {True, False}


def refuses(folder, original) -> str:
    victim = copy.deepcopy(original)
    with pytest.raises(EigenAttnError) as error:
        eigenattn.attach(victim, folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def hostile(bases, tmp_path_factory) -> Path:
    return copied(bases, tmp_path_factory)


def change(folder: Path, edit) -> None:
    values = json.loads((folder / CONFIG_FILE).read_text())
    edit(values["quantization_config"])
    (folder / CONFIG_FILE).write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda v: v["method"].update(window=2**40), "window of 1099511627776 tokens, and its model reads 512"),
        (lambda v: v["method"].update(window=-1), "0 or more"),
        (lambda v: v["method"].update(window=True), "whole number"),
        (lambda v: v["method"].update(window=0), "without a window"),
        (lambda v: v["method"].update(basis=["eigen"]), "basis must be a name"),
        (lambda v: v["method"].update(nonsense=1), "unknown configuration name"),
        (lambda v: v.update(method=[1]), "method"),
        (lambda v: v.update(provenance="x"), "provenance"),
        (lambda v: v.update(centred="no"), "centred"),
        (lambda v: v.update(format_version=True), "format True"),
        (lambda v: v.update(quant_method="gptq"), "holds no bases"),
        (lambda v: v.pop("layers"), "has no layers"),
        (lambda v: v["layers"][0]["latents"][1].update(rank=10**30), "above full rank"),
        (lambda v: v.update(layers=v["layers"] * 100_000), "larger than any configuration"),
    ],
)
def test_configurations_that_lie(hostile, original, edit, says):
    change(hostile, edit)
    assert says in refuses(hostile, original)


@pytest.mark.parametrize("content", ["[" * 100_000, "1" * 10_000, '"', "[]", "null", "\ufeff{}"])
def test_configurations_that_are_not_tables(hostile, original, content):
    (hostile / CONFIG_FILE).write_text(content)
    assert "not a configuration of bases" in refuses(hostile, original)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda t: t.update({"layers.9.key_encoder": torch.ones(2)}), "'layers.9.key_encoder', which"),
        (lambda t: t.update({"../../outside": torch.ones(2)}), "'../../outside', which"),
        (lambda t: t.pop("layers.2.value_mean"), "lacks layers.2.value_mean"),
        (lambda t: t["layers.0.key_mean"].fill_(float("nan")), "NaN or infinite"),
        (lambda t: t["layers.0.key_mean"].fill_(float("inf")), "NaN or infinite"),
        (lambda t: t.update({"layers.0.key_mean": torch.zeros(32, dtype=torch.int64)}), "is of I64"),
        (lambda t: t.update({"layers.0.key_mean": torch.zeros(8, 4)}), "has shape (8, 4)"),
    ],
)
def test_tensors_that_lie(hostile, original, edit, says):
    tensors = load_file(hostile / BASES_FILE)
    edit(tensors)
    save_file(tensors, hostile / BASES_FILE)
    assert says in refuses(hostile, original)


def test_numbers_that_do_not_fit_the_model(hostile):
    tensors = load_file(hostile / BASES_FILE)
    tensors["layers.1.key_encoder"][0, 0] = 1e30
    save_file(tensors, hostile / BASES_FILE)
    assert "NaN or infinite numbers in torch.float16" in refuses(hostile, tiny("llama").half())


def test_maps_that_are_not_numbers_in_a_whole_checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.self_attn.value_decoder"][3] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EigenAttnError, match="layer 1's value_decoder holds NaN"):
        load_model(Source.of(str(tmp_path)))


@pytest.mark.parametrize("base", ["../../../etc", "/dev/null", "nobody/../nothing", "", None, 7, "itself"])
def test_base_models_that_are_none(hostile, base):
    change(hostile, lambda v: v["provenance"].update(base_model=str(hostile) if base == "itself" else base))
    with pytest.raises(EigenAttnError) as error:
        load_model(Source.of(str(hostile)))
    assert "\n" not in str(error.value)


def test_bases_of_bases_of_bases(hostile, bases, tmp_path):
    """Two folders that name each other end nowhere."""
    other = tmp_path / "other"
    other.mkdir()
    for path in bases.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    change(hostile, lambda v: v["provenance"].update(base_model=str(other)))
    change(other, lambda v: v["provenance"].update(base_model=str(hostile)))
    with pytest.raises(EigenAttnError, match="another folder of bases"):
        Source.of(str(hostile))


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"model_type": 7}', "[" * 100_000, '{"model_type": "llama", "hidden_size": "x"}']
)
def test_configurations_of_models(tmp_path, content):
    folder = save_tiny(tmp_path / "base")
    (folder / "config.json").write_text(content)
    with pytest.raises(EigenAttnError) as error:
        load_model(Source.of(str(folder)))
    assert "\n" not in str(error.value)
