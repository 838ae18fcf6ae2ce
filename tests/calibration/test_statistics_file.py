"""Statistics of different texts add up, in files as in memory, and what does not go together is refused."""

import json

import pytest
import torch
from helpers import Killed, same, state
from tiny import converted, tiny, tokens

from eigenattn import EigenAttentionConfig, EigenAttnError, compress
from eigenattn.calibration import fisher_moments
from eigenattn.calibration.fisher_moments import FisherMoments, Sample, collect_fisher
from eigenattn.calibration.statistics import Batch, tensors_of
from eigenattn.calibration.statistics_file import FACTS_FILE, TENSORS_FILE, StatisticsFile, merged
from eigenattn.compression import resuming
from eigenattn.compression.pipeline import calibrate
from eigenattn.config import Sharing
from eigenattn.journal import Journal

PROSE, CODE = list(tokens(3, 40, seed=1).split(1)), list(tokens(2, 48, seed=2).split(1))
CONFIG = EigenAttentionConfig(window=4)
FACTS = {"samples": 2, "length": 40, "seed": 0}


def collected(batches, share="1"):
    model, layers = converted("llama")
    read = [Batch(ids) for ids in batches]
    return collect_fisher(model, layers, read, lambda layer: FisherMoments.of(layer, 4, Sharing.of(share)))


@pytest.fixture
def written(tmp_path):
    """Gives a folder of statistics, of a text of that name."""

    def write(name, batches=PROSE, config=CONFIG, **facts):
        folder = tmp_path / name
        folder.mkdir()
        text = [{"source": f"{name}.txt", "sha256": name}]
        calibrate(tiny("llama"), batches, config).save(folder, {"text": text, **FACTS, **facts})
        return folder

    return write


@pytest.mark.parametrize("share", ["1", "1-2", "2kv"])
def test_sums_of_two_texts_add_up(share):
    found, whole = collected(PROSE, share), collected([CODE[0], *PROSE, CODE[1]], share)
    for own, others in zip(found, collected(CODE, share), strict=True):
        own.merge(others)
    for one, other in zip(found, whole, strict=True):
        assert one.tokens == other.tokens == 216
        sums = dict(tensors_of(other))
        for name, value in tensors_of(one):
            if "sample" not in name:
                torch.testing.assert_close(value, sums[name], rtol=1e-11, atol=1e-11 * float(sums[name].abs().max()))


def test_texts_share_no_random_numbers():
    one, other, again = (collected(batches[:1])[0].keys.sample for batches in (PROSE, CODE, PROSE))
    assert torch.equal(one.priorities, again.priorities)
    drawn = [(each.weights / each.priorities)[:, :40].nan_to_num() for each in (one, other)]  # in falling order
    assert not torch.isin(drawn[0][drawn[0] > 0], drawn[1]).any()


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_samples_are_unbiased_however_they_are_merged(parts, monkeypatch):
    monkeypatch.setattr(fisher_moments, "SAMPLE", 8)
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(1, 60, generator=generator, dtype=torch.float64) ** 3
    vectors = torch.randn(1, 60, 2, generator=generator, dtype=torch.float64)
    exact = (weights.unsqueeze(-1) * vectors).sum(1)
    estimates = []
    for _ in range(2000):
        samples = []
        for x, w in zip(vectors.chunk(parts, 1), weights.chunk(parts, 1), strict=True):
            samples.append(Sample.empty(vectors, 1, 2))
            samples[-1].add(x, w, generator)
        for other in samples[1:]:
            samples[0].merge(other)
        estimates.append((samples[0].estimates.unsqueeze(-1) * samples[0].vectors).sum(1))
    found = torch.stack(estimates)
    error = found.std(0) / len(estimates) ** 0.5
    assert ((found.mean(0) - exact).abs() < 4 * error).all()
    assert (error < 0.2 * exact.abs().max()).all()


@pytest.mark.parametrize("share", ["1", "2kv"])
def test_a_file_compresses_as_its_text_does(written, share):
    config = EigenAttentionConfig(kv_ratio=0.25, window=4, share=share)
    of_text, of_file = tiny("llama"), tiny("llama")
    report = compress(of_text, PROSE, config)
    folder = written("prose", config=config)
    found = compress(of_file, config=config, statistics=[folder])
    assert same(state(of_text), state(of_file))
    assert found.layers == report.layers
    assert found.tokens == report.tokens == 120
    assert found.forward_seconds is None
    by_default = tiny("llama")
    compress(by_default, statistics=[folder])
    assert same(state(of_text), state(by_default))


def test_files_are_added_up(written):
    folders = [written("prose"), written("code", CODE)]
    _, layers = converted("llama")
    found = merged([StatisticsFile.open(folder) for folder in folders], layers)
    expected = collected(PROSE)
    for own, others in zip(expected, collected(CODE), strict=True):
        own.merge(others)
    for one, other in zip(found, expected, strict=True):
        assert same(dict(tensors_of(one)), dict(tensors_of(other)))
    assert compress(tiny("llama"), config=CONFIG, statistics=folders).tokens == 216


def test_calibration_leaves_a_model_as_it_was():
    model = tiny("llama").train()
    before, modules = state(model), [type(module) for module in model.modules()]
    calibrate(model, PROSE, CONFIG)
    assert same(state(model), before)
    assert [type(module) for module in model.modules()] == modules
    assert model.training


def test_killed_calibrations_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(resuming, "SAVE_SECONDS", 0.0)
    expected = calibrate(tiny("llama"), PROSE, CONFIG).moments

    def interrupted():
        yield from PROSE[:2]
        raise Killed

    with pytest.raises(Killed), Journal(tmp_path / "out", {}) as journal:
        calibrate(tiny("llama"), interrupted(), CONFIG, journal=journal)
    with Journal(tmp_path / "out", {}) as journal:
        assert journal.read("statistics")[1] == {"batches": 2, "tokens": 80}
        found = calibrate(tiny("llama"), PROSE, CONFIG, journal=journal).moments
    for one, other in zip(found, expected, strict=True):
        assert same(dict(tensors_of(one)), dict(tensors_of(other)))


def refused(folders, model=None, **choices):
    model = model or tiny("llama")
    before = state(model)
    with pytest.raises(EigenAttnError) as error:
        compress(model, config=EigenAttentionConfig(**{"window": 4, **choices}), statistics=folders)
    assert "\n" not in str(error.value)
    assert same(state(model), before)
    return str(error.value)


def test_what_does_not_go_together(written):
    prose = written("prose")
    assert "are of window 4, not 8" in refused([prose], window=8)
    assert "are of share 1, not 2kv" in refused([prose], share="2kv")
    assert "are for coded latents" in refused([prose], coded=False)
    assert "are for coded latents" in refused([prose], kv_ratio=0.6)
    assert "are for coded latents" in refused([prose], basis="attention", coded=True)
    assert "are for coded latents" in refused([prose], coded=True, refit=True)
    trained = tiny("llama")
    torch.nn.init.normal_(trained.model.layers[1].self_attn.v_proj.weight)
    assert "are of another model" in refused([prose], trained)
    assert "are of another model" in refused([prose], tiny("opt"))
    assert "do not add up: they are of window 4 and 8" in refused(
        [prose, written("other", CODE, EigenAttentionConfig(window=8))]
    )
    assert "both of the text prose, drawn with seed 0" in refused([prose, prose])
    more = written("more", CODE, text=[{"source": "prose.txt", "sha256": "prose"}], seed=1)
    assert compress(tiny("llama"), config=CONFIG, statistics=[prose, more]).tokens == 216
    with pytest.raises(EigenAttnError, match="either batches of text or statistics"):
        compress(tiny("llama"), PROSE, CONFIG, statistics=[prose])
    with pytest.raises(EigenAttnError, match="either batches of text or statistics"):
        compress(tiny("llama"))
    with pytest.raises(EigenAttnError, match="are for coded latents"):
        calibrate(tiny("llama"), PROSE, EigenAttentionConfig(basis="attention"))


def test_the_same_model_in_another_dtype(written):
    model = tiny("llama").to(torch.bfloat16)
    assert compress(model, config=CONFIG, statistics=[written("prose")]).tokens == 120


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("version", 2, "of another version"),
        ("window", -1, "does not state its window"),
        ("window", True, "does not state its window"),
        ("tokens", 0, "does not state its tokens"),
        ("seed", "x", "does not state its seed"),
        ("text", [{"source": 3, "sha256": None}], "does not state its text"),
        ("text", None, "does not state its text"),
        ("share", "three", "share is written"),
        ("share", "2", "made for another model"),
        ("base_model_weights", None, "of another model"),
        ("sha256", "0", "is damaged"),
    ],
)
def test_descriptions_that_are_none(written, name, value, said):
    folder = written("prose")
    facts = json.loads((folder / FACTS_FILE).read_text()) | {name: value}
    (folder / FACTS_FILE).write_text(json.dumps(facts))
    assert said in refused([folder], **({"share": value} if value == "2" else {}))


def test_damaged_files(written, tmp_path):
    folder = written("prose")
    tensors, facts = (folder / TENSORS_FILE).read_bytes(), (folder / FACTS_FILE).read_bytes()
    (folder / TENSORS_FILE).write_bytes(tensors[: len(tensors) // 2])
    assert "is damaged" in refused([folder])
    (folder / TENSORS_FILE).write_bytes(tensors[:-1] + bytes([tensors[-1] ^ 1]))
    assert "is damaged" in refused([folder])
    (folder / FACTS_FILE).write_bytes(facts[:20])
    assert "is not a description of statistics" in refused([folder])
    (folder / FACTS_FILE).unlink()
    assert "give a folder that `eigenattn calibrate` wrote" in refused([folder])
    assert "give a folder that `eigenattn calibrate` wrote" in refused([tmp_path / "nowhere"])
