"""Checkpoints of format 1, as its last version wrote them (`tests/data/format-1`), load and compute what they did.

Models are in float64: codes then do not depend on the order in which a machine adds.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny
from transformers import AutoModelForCausalLM

import eigenattn

FOLDER = Path(__file__).parents[1] / "data" / "format-1"


@torch.no_grad()
def check(model: torch.nn.Module, folder: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    found = model.double()(expected["input_ids"], use_cache=False).logits
    torch.testing.assert_close(found.float(), expected["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama-window", "opt-folded", "llama-joint-coded"])
def test_whole_checkpoints(name):
    check(AutoModelForCausalLM.from_pretrained(FOLDER / name), FOLDER / name)


@pytest.mark.parametrize("name", ["llama-shared-values-bases", "llama-coded-bases"])
def test_bases_alone(name):
    with pytest.warns(UserWarning, match="does not tell its base model from others"):
        model = eigenattn.attach(tiny("llama", num_hidden_layers=2), FOLDER / name)
    check(model, FOLDER / name)
