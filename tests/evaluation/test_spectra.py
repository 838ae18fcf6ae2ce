"""Spectra of known matrices, and of a model whose keys were made to lie in few directions."""

import json

import pytest
import torch
from tiny import HEAD_DIM, save_tiny, tiny, tokens
from typer.testing import CliRunner

from eigenattn.calibration.statistics import Batch
from eigenattn.cli import app
from eigenattn.errors import EigenAttnError
from eigenattn.evaluation.spectra import effective_rank, energy_kept, read_spectra, spectra_of


def test_effective_rank_and_energy():
    flat, one, two = torch.ones(8), torch.eye(8)[0], torch.tensor([3.0, 3.0] + [0.0] * 6)
    assert effective_rank(torch.stack([flat, one, two])).tolist() == pytest.approx([8, 1, 2])
    assert energy_kept(two).tolist() == pytest.approx([0.5] + [1] * 7)
    assert energy_kept(flat)[3] == 0.5
    assert torch.isfinite(effective_rank(torch.zeros(8)))


@torch.no_grad()
def test_a_low_rank_head_shows():
    model = tiny("gpt2")
    attention = model.transformer.h[1].attn
    # Head 2 of layer 1: its values keep three directions.
    first = 2 * 64 + 2 * HEAD_DIM
    attention.c_attn.weight[:, first + 3 : first + HEAD_DIM] = 0
    attention.c_attn.bias[first + 3 : first + HEAD_DIM] = 0
    before = model(tokens(1, 8)).logits
    spectra = spectra_of(model, [Batch(tokens(4, 64))])
    assert spectra["values"].shape == (3, 4, HEAD_DIM)
    kept = energy_kept(spectra["values"])
    assert kept[1, 2, 2] == pytest.approx(1)
    assert effective_rank(spectra["values"])[1, 2] <= 3
    assert kept[1, 1, 2] < 0.99
    assert (spectra["keys"].diff() <= 0).all()
    assert torch.equal(model(tokens(1, 8)).logits, before)  # the model is left as it was


def test_spectrum_on_the_command_line(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    base, text, out = save_tiny(tmp_path / "base"), tmp_path / "fox.txt", tmp_path / "spectrum"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    arguments = ["spectrum", base, out, "--text", text, "--samples", "2", "--length", "48", "--json", tmp_path / "copy"]
    result = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    pictures = {f"{name}.{kind}" for name in ("decay", "energy", "effective-rank") for kind in ("png", "svg")}
    assert {path.name for path in out.iterdir()} == {"spectrum.json", *pictures}
    found = read_spectra(out)
    assert found == json.loads((tmp_path / "copy").read_text())
    assert len(found["keys"]["eigenvalues"]) == 3
    assert len(found["values"]["energy_kept"][0][0]) == HEAD_DIM
    with pytest.raises(EigenAttnError, match="holds no spectra"):
        read_spectra(tmp_path)
    with pytest.raises(EigenAttnError, match="unknown name"):
        spectra_of(tiny("llama"), [], basis="cosine")
