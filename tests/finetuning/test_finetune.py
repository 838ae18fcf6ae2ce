import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import Killed, run, same, state
from tiny import save_tiny, tiny, tokens
from transformers import AutoModelForCausalLM

import eigenattn
from eigenattn import EigenAttentionConfig, EigenAttnError, compress
from eigenattn.finetuning import FinetuneConfig, finetune, trainable, training
from eigenattn.finetuning.trainable import Trainable
from eigenattn.journal import Journal
from eigenattn.kernels import blocks
from eigenattn.models.conversion import eigen_layers
from eigenattn.models.maps import MAPS, QUANTISERS

# peft still reads an attribute that transformers retires.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TRAINING, VALIDATION = tokens(8, 40), tokens(2, 40, seed=7)
QUICK = FinetuneConfig(steps=6, batch_size=2, validate_every=3, lora_rank=4, lora_alpha=4)
# What is trained of a Llama whose projections are folded.
FOLDED_LLAMA = {"k_proj.weight", "v_proj.weight", "o_proj.weight", "key_decoder", "key_mean"}


def small(name="llama", window=4, **overrides):
    model = tiny(name, **overrides)
    config = EigenAttentionConfig(kv_ratio=0.5, rank_multiple=2, window=window, ranks="uniform")
    compress(model, [tokens(4, 40, seed=3)], config, provenance={"base_model": "base"})
    return model


@pytest.mark.parametrize(
    ("name", "backend"), [("llama", "sdpa"), ("llama", "eager"), ("opt", "sdpa"), ("qwen3", "sdpa"), ("mpt-clip", None)]
)
def test_gradients_through_the_window_are_those_of_finite_differences(name, backend, monkeypatch):
    monkeypatch.setattr(blocks, "QUERY_BLOCK", 7)  # several blocks of queries
    model = tiny(name, attn_implementation=backend).double()
    compress(model, [tokens(2, 40)], EigenAttentionConfig(kv_ratio=0.5, rank_multiple=2, window=4, ranks="uniform"))
    attention, ids = eigen_layers(model)[1], tokens(1, 20, seed=5)

    def loss():
        return F.cross_entropy(model(ids, use_cache=False).logits[0], ids[0])

    loss().backward()
    for map_name in MAPS:
        parameter = getattr(attention, map_name)
        where, size = parameter.grad.abs().argmax(), 2e-3
        with torch.no_grad():
            flat = parameter.view(-1)
            flat[where] += size
            above = loss()
            flat[where] -= 2 * size
            below = loss()
            flat[where] += size
        # Norms and the softmax of the eager backend run in fp32 whatever the model's dtype.
        torch.testing.assert_close(parameter.grad.flatten()[where], (above - below) / (2 * size), rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gpt_neox", "qwen3", "mpt-clip"])
def test_distillation_wins_back_what_was_lost(name, window):
    config = FinetuneConfig(steps=6, batch_size=8, validate_every=3, learning_rate=1e-3, lora_rank=4, lora_alpha=4)
    model, report = finetune(small(name, window), TRAINING, TRAINING, config, baseline=tiny(name))
    assert report.measure == "divergence"
    assert report.after < report.before
    assert [entry["step"] for entry in report.curve] == [0, 3, 6]
    assert not any("lora" in key for key in model.state_dict())
    assert model(TRAINING).logits.isfinite().all()


@pytest.mark.parametrize("window", [0, 4])
def test_coded_latents_train_through_their_quantisers(window):
    model = tiny("llama")
    compress(model, [tokens(4, 40, seed=3)], EigenAttentionConfig(coded=True, kv_ratio=0.1875, window=window))
    before = state(model)
    config = FinetuneConfig(steps=6, batch_size=8, validate_every=3, learning_rate=1e-3, lora_rank=4, lora_alpha=4)
    model, report = finetune(model, TRAINING, TRAINING, config, baseline=tiny("llama"))
    assert report.after < report.before
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.split("attn.", 1)[1] for name in changed} == (set(MAPS) if window else FOLDED_LLAMA)
    assert set(QUANTISERS) <= {name.split(".")[-1] for name in before}  # they are there, and stay as they are


@pytest.mark.parametrize("share", ["2", "2kv"])
@pytest.mark.parametrize("window", [0, 4])
def test_latents_that_heads_share(window, share):
    model = tiny("llama")
    settings = {"kv_ratio": 0.5, "rank_multiple": 2, "ranks": "uniform", "share": share}
    compress(model, [tokens(4, 40, seed=3)], EigenAttentionConfig(**settings, window=window))
    before = state(model)
    model, report = finetune(model, TRAINING, TRAINING[:2], QUICK, baseline=tiny("llama"))
    assert report.after < report.before
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[-1] for name in changed} == set(MAPS)


def test_next_tokens_without_a_baseline():
    _, report = finetune(small(), TRAINING[:2], TRAINING[:2], QUICK)
    assert report.measure == "perplexity"
    assert report.after < report.before
    assert report.tokens == 6 * 2 * 40


def test_with_a_window_the_maps_are_trained_and_nothing_else():
    model = small()
    before = state(model)
    model, report = finetune(model, TRAINING, VALIDATION, QUICK, baseline=tiny("llama"))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[-1] for name in changed} == set(MAPS)
    assert len(changed) == 3 * len(MAPS)
    assert report.trained_parameters == sum(before[name].numel() for name in changed)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", FOLDED_LLAMA),
        ("opt", {"q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight"}),
        ("gpt2", {"c_attn.weight", "c_proj.weight"}),
        ("qwen3", {"v_proj.weight", "o_proj.weight", "key_encoder", "key_decoder", "key_mean"}),
    ],
)
def test_without_a_window_what_was_folded_is_trained_by_lora(name, expected):
    model = small(name, window=0)
    before = state(model)
    model, report = finetune(model, TRAINING, TRAINING[:2], QUICK, baseline=tiny(name))
    assert report.best_step > 0
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert {key.split("attn.", 1)[1] for key in changed} == expected


@pytest.mark.parametrize("window", [0, 4])
def test_nothing_better_than_the_start_changes_nothing(window):
    model = small(window=window)
    before = state(model)
    config = FinetuneConfig(steps=2, batch_size=1, learning_rate=9.0, map_learning_rate=9.0, lora_rank=2, lora_alpha=9)
    model, report = finetune(model, TRAINING, VALIDATION, config, baseline=tiny("llama"))
    assert report.best_step == 0
    assert report.after == report.before
    assert same(model.state_dict(), before)


def test_half_precision_trains_in_full():
    """In bf16 alone most of these small steps would be rounded away."""
    model = small().to(torch.bfloat16)
    config = FinetuneConfig(steps=8, batch_size=2, map_learning_rate=1e-3, validate_every=8)
    model, report = finetune(model, TRAINING, VALIDATION, config, baseline=tiny("llama"))
    assert report.after < report.before
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_maps_are_trained_in_units_of_their_size():
    model = small()
    attention = eigen_layers(model)[0]
    with torch.no_grad():
        attention.key_encoder.mul_(1000.0)
        attention.value_mean.zero_()
    found = Trainable(model, 4, 4, 0)
    assert 0.5 < found.parameters["layers.0.key_encoder"].square().mean().sqrt() < 2
    before = attention.key_encoder.clone()
    found.apply()
    assert torch.equal(attention.key_encoder, before)


@pytest.mark.parametrize(("window", "steps_done"), [(0, 1), (4, 3), (0, 5)])
def test_going_on_gives_the_bits_of_an_uninterrupted_run(window, steps_done, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    expected, full = finetune(small(window=window), TRAINING, VALIDATION, QUICK, baseline=tiny("llama"))
    update = training._State.update

    def killing(self, loss):
        if self.step == steps_done:
            raise Killed
        update(self, loss)

    monkeypatch.setattr(training._State, "update", killing)
    with pytest.raises(Killed), Journal(tmp_path / "out", {}) as journal:
        finetune(small(window=window), TRAINING, VALIDATION, QUICK, baseline=tiny("llama"), journal=journal)
    monkeypatch.setattr(training._State, "update", update)
    with Journal(tmp_path / "out", {}) as journal:
        assert journal.read("training")[1]["step"] == steps_done
        model, report = finetune(
            small(window=window), TRAINING, VALIDATION, QUICK, baseline=tiny("llama"), journal=journal
        )
    assert report.curve == full.curve
    assert same(model.state_dict(), expected.state_dict())


def test_adapters_need_peft(monkeypatch):
    monkeypatch.setattr(trainable, "find_spec", lambda name: None)
    with pytest.raises(EigenAttnError, match=r"eigenattn\[finetune\]"):
        finetune(small(window=0), TRAINING, VALIDATION, QUICK)
    finetune(small(), TRAINING, VALIDATION, QUICK)  # the bases alone need none


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda: {"model": tiny("llama")}, "not compressed"),
        (lambda: {"model": small().to(torch.float16)}, "float16"),
        (lambda: {"training": tokens(2, 5)}, "raise --length"),
        (lambda: {"validation": tokens(2, 40)[:0]}, "at least one"),
        (lambda: {"training": tokens(2, 40) + 100}, "is the tokenizer another model's"),
        (lambda: {"baseline": tiny("llama", vocab_size=130)}, "130 tokens in its vocabulary"),
        (lambda: {"config": FinetuneConfig(map_learning_rate=1e38)}, "not finite"),
    ],
)
def test_what_cannot_be_trained(change, says):
    given = {"training": TRAINING, "validation": VALIDATION, "config": QUICK, **change()}
    with pytest.raises(EigenAttnError, match=says) as error:
        finetune(given.pop("model", None) or small(), **given)
    assert "\n" not in str(error.value)


def test_full_rank_leaves_nothing_to_train():
    model = tiny("llama")
    compress(model, [tokens(2, 40)], EigenAttentionConfig(kv_ratio=1.0))
    with pytest.raises(EigenAttnError, match="full rank"):
        finetune(model, TRAINING, VALIDATION, QUICK)


@pytest.mark.parametrize(
    ("values", "says"),
    [({"steps": 0}, "steps"), ({"learning_rate": 0.0}, "learning_rate"), ({"batch_size": 1.5}, "batch_size")],
)
def test_bad_settings(values, says):
    with pytest.raises(EigenAttnError, match=says):
        FinetuneConfig(**values)


def test_every_window_is_read_once_an_epoch():
    config = FinetuneConfig(batch_size=3, seed=4)
    read = [index for step in range(4) for index in config.windows_of_step(step, 6)]
    assert sorted(read[:6]) == sorted(read[6:]) == list(range(6))
    assert read[:6] != read[6:]


TEXT = "The quick brown fox jumps over the lazy dog; it was not amused. " * 30
OPTIONS = ["--steps", "3", "--batch-size", "2", "--length", "48", "--validation-windows", "2", "--validate-every", "3"]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """A base model, a text, and the model compressed in every form."""
    folder = tmp_path_factory.mktemp("workshop")
    save_tiny(folder / "base")
    (folder / "fox.txt").write_text(TEXT)
    options = ["--text", folder / "fox.txt", "--samples", "4", "--length", "48", "--rank-multiple", "2"]
    run("compress", folder / "base", folder / "windowed", *options, "--window", "8")
    run("compress", folder / "base", folder / "folded", *options, "--window", "0")
    run("compress", folder / "base", folder / "bases", *options, "--window", "8")
    return folder


@pytest.mark.parametrize("kind", ["windowed", "folded", "bases"])
def test_the_command_writes_what_it_was_given(workshop, kind, tmp_path):
    before = {path.name: path.read_bytes() for path in (workshop / kind).iterdir()}
    options = ["--text", workshop / "fox.txt", "--distil", workshop / "base", *OPTIONS, "--lora-rank", "2"]
    report = json.loads(run("finetune", workshop / kind, tmp_path / "tuned", *options, "--json", "-"))
    assert report["after"] < report["before"]
    assert {path.name for path in (tmp_path / "tuned").iterdir()} == set(before)
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]  # nothing partial is left
    assert before == {path.name: path.read_bytes() for path in (workshop / kind).iterdir()}
    assert "## Fine-tuning" in (tmp_path / "tuned" / "README.md").read_text()
    found = json.loads(run("inspect", tmp_path / "tuned", "--json", "-"))
    assert found["provenance"]["finetuning"]["after"] == report["after"]
    measure = ["--baseline", workshop / "base", "--text", workshop / "fox.txt", "--length", "48", "--json", "-"]
    original, tuned = (json.loads(run("evaluate", each, *measure)) for each in (workshop / kind, tmp_path / "tuned"))
    assert 0 < tuned["texts"][0]["divergence"] < original["texts"][0]["divergence"]


def test_trained_bases_fit_the_original_model(workshop, tmp_path):
    run("finetune", workshop / "bases", tmp_path / "tuned", "--text", workshop / "fox.txt", *OPTIONS)
    run("finetune", workshop / "windowed", tmp_path / "whole", "--text", workshop / "fox.txt", *OPTIONS)
    base = AutoModelForCausalLM.from_pretrained(workshop / "base", dtype="auto")
    attached = eigenattn.attach(base, tmp_path / "tuned")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype="auto")
    assert torch.equal(attached(TRAINING).logits, whole(TRAINING).logits)


def test_the_command_goes_on_after_a_kill(workshop, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    options = ["--text", workshop / "fox.txt", *OPTIONS]
    run("finetune", workshop / "folded", tmp_path / "whole", *options)
    monkeypatch.setattr(training.FinetuneConfig, "rate", lambda self, step: 1 / 0 if step == 2 else 0.5)
    with pytest.raises(ZeroDivisionError):
        run("finetune", workshop / "folded", tmp_path / "again", *options)
    assert [path.name for path in tmp_path.iterdir() if path.name != "whole"] == ["again.partial"]
    monkeypatch.undo()
    with pytest.raises(EigenAttnError, match="differs in steps"):
        run("finetune", workshop / "folded", tmp_path / "again", *options, "--steps", "4")
    run("finetune", workshop / "folded", tmp_path / "again", *options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "whole"]


def test_bad_input_leaves_nothing(workshop, tmp_path):
    def fails(*arguments) -> str:
        with pytest.raises(EigenAttnError) as error:
            run("finetune", *arguments)
        return str(error.value)

    text = ["--text", workshop / "fox.txt"]
    assert "not compressed" in fails(workshop / "base", tmp_path / "out", *text, *OPTIONS)
    assert "give a longer text" in fails(workshop / "bases", tmp_path / "out", *text, "--length", "1024")
    assert "neither a file nor" in fails(workshop / "bases", tmp_path / "out", "--text", "nowhere.txt")
    assert "exists already" in fails(workshop / "bases", tmp_path, *text)
    assert not list(tmp_path.iterdir())
