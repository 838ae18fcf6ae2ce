"""What is saved of a compression is taken up, not done again, and changes no bit."""

import pytest
from helpers import Killed, same
from tiny import tiny, tokens

from eigenattn import EigenAttentionConfig, compress
from eigenattn.calibration.attention_moments import AttentionMoments
from eigenattn.calibration.statistics import LayerMoments
from eigenattn.compression import resuming
from eigenattn.compression.measure import Measurement
from eigenattn.journal import Journal

BATCHES = list(tokens(6, 40).split(1))


@pytest.fixture(autouse=True)
def _save_always(monkeypatch):
    monkeypatch.setattr(resuming, "SAVE_SECONDS", 0.0)


def finished(config, journal=None, batches=None):
    model = tiny("llama")
    report = compress(model, batches or BATCHES, config, journal=journal)
    return model.state_dict(), report


@pytest.mark.parametrize("basis", ["attention", "eigen"])
def test_moments_go_on_from_the_batch_they_had(basis, tmp_path, monkeypatch):
    config = EigenAttentionConfig(kv_ratio=0.5, rank_multiple=2, window=4, basis=basis, ranks="uniform")
    expected, whole = finished(config)

    def interrupted():
        yield from BATCHES[:4]
        raise Killed

    with pytest.raises(Killed), Journal(tmp_path / "out", {}) as journal:
        finished(config, journal, interrupted())
    with Journal(tmp_path / "out", {}) as journal:
        assert journal.read("statistics")[1] == {"batches": 4, "tokens": 160}
        observed = []
        moments = {"attention": AttentionMoments, "eigen": LayerMoments}[basis]
        observe = moments.observe
        monkeypatch.setattr(moments, "observe", lambda *args: (observed.append(1), observe(*args)))
        found, report = finished(config, journal)
    assert len(observed) == 3 * 2  # layers, and batches that were left
    assert report.tokens == whole.tokens == 240
    assert same(found, expected)


@pytest.mark.parametrize("ranks", ["sensitivity", "error_budget"])
def test_costs_are_measured_once(ranks, tmp_path, monkeypatch):
    config = EigenAttentionConfig(kv_ratio=0.5, rank_multiple=2, window=4, ranks=ranks)
    expected, _ = finished(config)
    truncate, runs = Measurement._truncate, []

    def counting(self, *arguments):
        runs.append(1)
        if len(runs) == limit:
            raise Killed
        truncate(self, *arguments)

    monkeypatch.setattr(Measurement, "_truncate", counting)
    limit = None
    finished(config)
    in_all, limit = len(runs), len(runs) // 2
    runs.clear()
    with pytest.raises(Killed), Journal(tmp_path / "out", {}) as journal:
        finished(config, journal)
    runs.clear()
    limit = None
    with Journal(tmp_path / "out", {}) as journal:
        found, _ = finished(config, journal)
    assert same(found, expected)
    assert len(runs) < in_all if ranks == "sensitivity" else len(runs) == in_all
    runs.clear()
    with Journal(tmp_path / "out", {}) as journal:
        finished(config, journal)
    assert not runs
