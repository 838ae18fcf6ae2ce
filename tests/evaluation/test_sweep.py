"""Sweeps: what they measure, share, keep and refuse."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import same, skip_without
from tiny import save_tiny, tiny, tokens

from eigenattn import EigenAttentionConfig, compress
from eigenattn.cache.store import room_for
from eigenattn.calibration.statistics import Batch
from eigenattn.calibration.text import Text
from eigenattn.compression.folding import fold
from eigenattn.compression.rank_problem import RankProblem
from eigenattn.compression.sensitivity import sensitivity
from eigenattn.compression.shared_costs import SharedCosts
from eigenattn.errors import EigenAttnError
from eigenattn.evaluation.grid import Cell, Grid
from eigenattn.evaluation.measuring import EvaluationPlan
from eigenattn.evaluation.reading import read, uncached
from eigenattn.evaluation.rivals import RIVALS, Rival
from eigenattn.evaluation.sweep import SweepModel, sizes
from eigenattn.evaluation.sweep_folder import SweepFolder, read_sweep
from eigenattn.evaluation.sweep_folder import table as rows_of
from eigenattn.models.conversion import convert_attention, eigen_layers
from eigenattn.models.loading import Source, load_model
from eigenattn.progress import TokenProgress
from eigenattn.report.figures import calibration_study, frontier
from eigenattn.report.tables import sweep_table
from eigenattn.workflows.sweep import Calibration, run_sweep, sweep_texts

CONTENT = "The quick brown fox jumps over the lazy dog; it was not amused. " * 40
PLAN = EvaluationPlan([Text("held out", CONTENT)], tokens=192, length=64, copies=1)
QUIET = TokenProgress(False)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"))


def sweep(base: Path, out: Path, grid: Grid, plan: EvaluationPlan = PLAN, **options) -> dict:
    options = {"calibrations": [Calibration((Text("fox", CONTENT),), 4)], **options}
    return run_sweep(str(base), out, grid, plan, length=64, seed=0, **options)


@pytest.mark.parametrize(
    ("method", "asked", "share_costs"),
    [
        ("attention/error_budget/8", 0.5, True),
        ("attention/sensitivity/8", 0.5, False),
        ("attention/bits/8", 2.0, False),
        ("attention+refit/uniform/0", 0.5, True),
        ("attention+refit/bits/0", 3.0, False),
        ("attention~0.3/sensitivity/8", 0.5, False),
        ("attention:2/sensitivity/0", 0.5, False),
        ("attention:1-2+refit/sensitivity/8", 0.5, False),
        ("attention:1kv/sensitivity/8", 0.5, False),
        ("attention:2kv/uniform/8", 0.5, True),
        ("attention:2kv/bits/8", 2.0, False),
        ("eigen/sensitivity/8", 0.5, False),
        ("attention/sensitivity/8", 1.0, False),
    ],
)
def test_a_cell_is_what_compress_gives(method, asked, share_costs):
    """To the bit: the maps, and with a window what the model makes of them."""
    batches, window = list(tokens(4, 64, seed=5).split(1)), tokens(2, 64)
    cell = Cell.of(method, asked, rank_multiple=2)
    assert (cell.method, cell.asked) == (method, asked)
    grid = Grid([0.75, 0.5], rank_multiple=2)
    subject = SweepModel(tiny("llama"), [Batch(ids) for ids in batches], grid, QUIET, share_costs=share_costs)
    original = read(subject.model, window).nll
    for before in (Cell.of(method, 1.5 * asked if asked < 1 else 0.9 * asked, rank_multiple=2), cell):
        subject.compress(before, {})  # what came before leaves no trace
    swept = read(subject.model, window).nll
    model = tiny("llama")
    report = compress(model, batches, cell.config)
    assert [layout.to_dict() for layout in subject.layouts] == report.layers
    assert sizes(subject.layouts, 64)["kv_ratio"] == report.kv_ratio
    if cell.config.window:
        assert swept == read(model, window).nll
    assert swept == pytest.approx(read(model, window).nll, rel=1e-5)
    if asked < 1 or cell.config.coded:
        assert swept != pytest.approx(original, rel=1e-3)
    subject.restore()
    assert read(subject.model, window).nll == pytest.approx(original, rel=1e-6)
    subject.compress(cell, {})
    for attention in subject.layers:
        fold(attention)
    assert same(subject.model.state_dict(), model.state_dict())


def test_names_of_cells():
    """As results that were written before have them."""
    for name, asked in (("attention/sensitivity/32", 0.4), ("attention:1-3/bits/32", 2.5), ("kq-svd/uniform/8", 0.4)):
        assert Cell.of(name, asked).key == f"{name}/{asked}"
    coded = Cell.of("attention/bits/32", 3.0)
    assert (coded.config.kv_ratio, coded.bits_per_element, coded.asked) == (3 / 16, 3.0, 3.0)
    plain = Cell.of("attention:3kv~0.3/sensitivity/32", 0.6)
    assert (plain.bits_per_element, plain.asked, plain.statistics) == (None, 0.6, "attention:3kv~0.3/32")
    for wrong in ("attention", "attention/sensitivity", "attention/sensitivity/x", "attention:3kv+refit/uniform/0"):
        with pytest.raises(EigenAttnError):
            Cell.of(wrong, 0.5)


def test_every_shrinkage_is_a_cell_and_decoders_are_refitted_without_a_window():
    methods = [cell.method for cell in Grid([0.5], windows=[0, 8], shrinkage=[0, 0.3]).cells()]
    assert methods == [
        "attention+refit/sensitivity/0",
        "attention~0.3+refit/sensitivity/0",
        "attention/sensitivity/8",
        "attention~0.3/sensitivity/8",
    ]
    assert [cell.method for cell in Grid([0.5], windows=[0], refit=False).cells()] == ["attention/sensitivity/0"]


def test_a_sweep_of_five_costs_less_than_two_calibrations_and_five_evaluations(base, tmp_path, monkeypatch):
    """In tokens that pass through layers."""
    passes, stage = Counter(), "sweep"

    def counted(*arguments):
        model = load_model(*arguments)
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(lambda module, args, out: passes.update({stage: args[0].shape[1]}))
        return model

    monkeypatch.setattr("eigenattn.workflows.sweep.load_model", counted)
    sweep(base, tmp_path / "sweep", Grid([0.9, 0.8, 0.7, 0.6, 0.5], windows=[8], rank_multiple=2))
    model = counted(Source.of(str(base)))
    stage = "evaluation"
    read(model, tokens(3, 64))
    read(model, tokens(1, 64))  # copying
    stage = "calibration"
    compress(model, list(tokens(4, 64).split(1)), EigenAttentionConfig(kv_ratio=0.6, rank_multiple=2, window=8))
    assert 5 * passes["evaluation"] < passes["sweep"] < 2 * passes["calibration"] + 5 * passes["evaluation"]


def test_a_sweep_goes_on_where_it_stopped(base, tmp_path):
    out, grid = tmp_path / "sweep", Grid([0.75, 0.5], windows=[8], ranks=["uniform"], rank_multiple=2)

    class Stopped(Exception):
        pass

    def stop(key, cell):
        raise Stopped

    with pytest.raises(Stopped):
        sweep(base, out, grid, done=stop)
    assert list(read_sweep(out)["cells"]) == ["fox/4/attention/uniform/8/0.75"]
    values = read_sweep(out)
    values["cells"]["fox/4/attention/uniform/8/0.75"]["mark"] = "kept"
    (out / "sweep.json").write_text(json.dumps(values))
    measured = []
    found = sweep(base, out, grid, done=lambda key, cell: measured.append(key))
    assert measured == ["fox/4/attention/uniform/8/0.5"]
    assert found["cells"]["fox/4/attention/uniform/8/0.75"]["mark"] == "kept"
    assert sorted(path.name for path in out.iterdir()) == ["seconds.json", "sweep.csv", "sweep.json"]
    whole = sweep(base, tmp_path / "whole", grid)
    assert whole["cells"]["fox/4/attention/uniform/8/0.5"] == found["cells"]["fox/4/attention/uniform/8/0.5"]
    assert sweep(base, out, grid, done=stop) == found  # nothing is left to do


def test_figures_of_a_sweep(base, tmp_path):
    grid = Grid([0.8, 0.5], windows=[8], rank_multiple=2)
    values = sweep(base, tmp_path / "sweep", grid)
    large, small = (values["cells"][f"fox/4/attention/sensitivity/8/{ratio}"] for ratio in (0.8, 0.5))
    # 3 layers of 2 heads of 16, keys and values, in 2 bytes: 384 bytes a token; the window holds 9 tokens,
    # and the other 56 lie in a store with room behind them.
    assert small["bytes_per_token"] == small["kv_ratio"] * 384
    assert small["cache_bytes"] == room_for(56) * small["bytes_per_token"] + 9 * 384
    assert small["kv_ratio"] <= 0.5 < large["kv_ratio"] <= 0.8
    assert 0 < large["texts"][0]["divergence"] < small["texts"][0]["divergence"]
    assert list(values["costs"]["fox/4"]) == ["attention/8"]
    with (tmp_path / "sweep" / "sweep.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["asked"] for row in rows] == ["0.8", "0.5"]
    assert float(rows[1]["divergence (held out)"]) == small["texts"][0]["divergence"]


def test_a_rival_reads_through_a_quantised_cache(base, tmp_path):
    skip_without("fp8")
    grid = Grid([1.0], windows=[8], ranks=["uniform"])
    sweep(base, tmp_path / "sweep", grid)
    rival = sweep(base, tmp_path / "sweep", grid, rivals=[Rival.of("fp8")])["cells"]["fp8/8"]
    assert rival["kv_ratio"] == rival["cache_ratio"] == 0.5
    assert 0 < rival["texts"][0]["divergence"] < 0.5
    model, ids = tiny("llama"), tokens(1, 24)
    exact = uncached(model, ids, 24)
    with Rival.of("fp8").reading([], 8) as logits_of:
        found = logits_of(model, ids, 24)
    # The first piece sees nothing that went through the cache.
    assert torch.allclose(found[:, :8], exact[:, :8], atol=1e-4)
    assert not torch.allclose(found[:, 8:], exact[:, 8:], atol=1e-3)
    assert RIVALS["quanto-4"].bits_per_element(16) == 4.5


def test_the_plain_rival_keeps_the_window(base, tmp_path):
    """With groups of 64 tokens for keys and of a whole vector, 16 here, for values."""
    grid = Grid([1.0], windows=[8], ranks=["uniform"])
    cells = sweep(base, tmp_path / "sweep", grid, rivals=[Rival.of("plain-8"), Rival.of("plain-2")])["cells"]
    assert cells["plain-2/8"]["kv_ratio"] == pytest.approx((2 + 16 / 64 + 16 / 16) / 16)
    assert 0 < 20 * cells["plain-8/8"]["texts"][0]["divergence"] < cells["plain-2/8"]["texts"][0]["divergence"]
    assert cells["fox/4/attention/uniform/8/1"]["texts"][0]["divergence"] < 1e-5  # it leaves nothing behind
    model, ids = tiny("llama"), tokens(1, 24)
    exact = uncached(model, ids, 24)
    convert_attention(model)
    with Rival.of("plain-2").reading(eigen_layers(model), 8) as logits_of:
        found = logits_of(model, ids, 24)
    assert torch.allclose(found[:, :8], exact[:, :8], atol=1e-4)
    assert not torch.allclose(found[:, 8:], exact[:, 8:], atol=1e-3)
    assert torch.allclose(uncached(model, ids, 24), exact, atol=1e-4)


def test_bits_stand_beside_ratios(base, tmp_path):
    sweep(base, tmp_path / "sweep", Grid([0.5], windows=[8], ranks=["uniform"], rank_multiple=2))
    values = sweep(base, tmp_path / "sweep", Grid([4 / 16, 2 / 16], windows=[8], rank_multiple=2, coded=True))
    assert "fox/4/attention/uniform/8/0.5" in values["cells"]
    four, two = (values["cells"][f"fox/4/attention/bits/8/{bits}"] for bits in (4, 2))
    assert two["kv_ratio"] <= 2 / 16 < four["kv_ratio"] <= 4 / 16
    assert all("widths" in latent for latent in two["layers"][0]["latents"])
    assert (two["bits_per_element"], two["asked"]) == (2, 2)
    assert 0 < four["texts"][0]["divergence"] < two["texts"][0]["divergence"]
    assert values["seconds"]["quantisers"] > 0
    with pytest.raises(EigenAttnError, match="'eigen' does not support coded"):
        Grid([0.25], bases=["eigen"], coded=True)


def test_each_calibration_is_a_sweep_of_its_own(base, tmp_path):
    """Cells are those of sweeps with one text and one size, and more of them may come later."""
    fox, numbers = Text("fox", CONTENT), Text("numbers", " ".join(map(str, range(2000))))
    calibrations = [Calibration((text,), samples) for text in (fox, numbers, Text("self", "")) for samples in (2, 4)]
    grid = Grid([0.5], windows=[8], rank_multiple=2)
    sweep(base, tmp_path / "sweep", grid, calibrations=calibrations[:1])
    values = sweep(base, tmp_path / "sweep", grid, calibrations=calibrations)
    assert [key.split("/")[:2] for key in values["cells"]] == [
        [name, samples] for name in ("fox", "numbers", "self") for samples in ("2", "4")
    ]
    alone = sweep(base, tmp_path / "alone", grid, calibrations=calibrations[3:4])
    key = "numbers/4/attention/sensitivity/8/0.5"
    assert alone["cells"][key] == values["cells"][key]
    assert len({cell["texts"][0]["divergence"] for cell in values["cells"].values()}) == 6
    figure = calibration_study(values)
    curves = figure.axes[0].containers
    assert [curve.get_label() for curve in curves] == ["fox", "numbers", "self"]
    assert list(curves[0].lines[0].get_xdata()) == [128, 256]
    assert len(frontier(values).axes[0].containers) == 6
    table = sweep_table(rows_of(values), ["held out"])
    assert table.headings[:4] == ["method", "calibration", "samples", "asked"]
    other = [Calibration((Text("fox", CONTENT + "!"),), 4)]
    with pytest.raises(EigenAttnError, match="calibrated on another fox"):
        sweep(base, tmp_path / "sweep", grid, calibrations=other)


def test_shared_costs_stand_for_measured_ones():
    """Where costs follow tails, a shared measurement gives the ranks that one for each ratio gives."""
    spectra = [torch.tensor([[2.0**-i for i in range(8)]] * 2).double() * scale for scale in (1.0, 5.0, 0.2)]
    weights = [[1.0, 8.0], [0.5, 0.5], [40.0, 1.0]]

    class Tails:
        calls = 0

        def divergences(self, trials):
            self.calls += 1
            return [
                [sum(w * float(s[:, r:].sum()) for w, r in zip(pair, ranks, strict=True)) for ranks in each]
                for pair, s, each in zip(weights, spectra, trials, strict=True)
            ]

    def problem(ratio, costs):
        return RankProblem(
            [(s, s) for s in spectra], EigenAttentionConfig(kv_ratio=ratio, rank_multiple=1, coded=False), costs
        )

    counting = Tails()
    shared, found = SharedCosts(problem(0.5, counting)), []
    for ratio in (0.7, 0.5, 0.3):
        found.append(sensitivity(problem(ratio, shared)))
        assert found[-1] == sensitivity(problem(ratio, Tails()))
    assert len({str(each) for each in found}) == 3
    assert counting.calls == 2
    known = SharedCosts(problem(0.5, None), shared.curves)
    assert sensitivity(problem(0.3, known)) == found[-1]


def test_heads_share_latents(base, tmp_path):
    grid = Grid([0.5], windows=[8], share=["1", "2"], ranks=["uniform"], rank_multiple=2)
    values = sweep(base, tmp_path / "sweep", grid)
    single, shared = (values["cells"][f"fox/4/{kind}/uniform/8/0.5"] for kind in ("attention", "attention:2"))
    assert single["bytes_per_token"] == shared["bytes_per_token"]
    assert single["texts"][0]["divergence"] != shared["texts"][0]["divergence"]
    with pytest.raises(EigenAttnError, match="choose 1, 2"):
        sweep(base, tmp_path / "other", Grid([0.5], windows=[8], share=["3"]))
    values = sweep(base, tmp_path / "values", Grid([0.5], windows=[8], share=["1-2"], rank_multiple=2))
    cell = values["cells"]["fox/4/attention:1-2/sensitivity/8/0.5"]
    assert cell["kv_ratio"] <= 0.5 and cell["texts"][0]["divergence"] > 0


def test_files_hold_their_last_fifth_out(tmp_path):
    file = tmp_path / "fox.txt"
    file.write_text("a" * 80 + "b" * 20)
    calibration, held_out = sweep_texts([str(file)], [])
    assert calibration[0].content == "a" * 80
    assert held_out[0].content == "b" * 20
    calibration, held_out = sweep_texts(["self", "python-docs"], [])
    assert calibration[0].source == "self" and not calibration[0].content
    assert held_out[0].content != calibration[1].content
    assert sweep_texts(["self"], [str(file)])[1][0].content == file.read_text()
    with pytest.raises(EigenAttnError, match="--evaluation-text"):
        sweep_texts(["self"], [])


def test_a_second_process_leaves_the_first_ones_folder_alone(tmp_path):
    with SweepFolder(tmp_path / "out", {}, {}) as first:
        with pytest.raises(EigenAttnError, match="another process is writing"):
            SweepFolder(tmp_path / "out", {}, {})
        first.save()
    assert read_sweep(tmp_path / "out")["cells"] == {}


def test_bad_input_is_one_line(base, tmp_path):
    grid = Grid([0.5], windows=[8])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(EigenAttnError, match="holds no sweep"):
        sweep(base, tmp_path / "full", grid)
    sweep(base, tmp_path / "out", Grid([1.0], windows=[8], ranks=["uniform"]))
    with pytest.raises(EigenAttnError, match="another rank_multiple"):
        sweep(base, tmp_path / "out", Grid([0.5], windows=[8], rank_multiple=4))
    with pytest.raises(EigenAttnError, match="longer than the 64"):
        sweep(base, tmp_path / "new", Grid([0.5], windows=[64]))
    with pytest.raises(EigenAttnError, match="unknown name 'cosine'"):
        Grid([0.5], bases=["cosine"])
    with pytest.raises(EigenAttnError, match=r"\(0, 1\]"):
        Grid([1.5])
    with pytest.raises(EigenAttnError, match="unknown rival"):
        Rival.of("quanto-3")
