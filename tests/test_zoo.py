"""A zoo of bases: made, measured as they lie in their folders, and listed."""

import json
from pathlib import Path

import pytest
from helpers import script
from tiny import save_tiny
from transformers import AutoModelForCausalLM

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def zoo():
    return script(BENCHMARKS / "zoo.py")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("zoo")
    model = save_tiny(folder / "tiny", "llama")
    for name, line in (("fox", "The quick brown fox jumps. "), ("law", "Whereas. "), ("sums", "1 + 1 = 2; ")):
        (folder / f"{name}.txt").write_text(line * 100)
    options = {
        "text": [folder / "fox.txt", folder / "sums.txt"],
        "lengths": [96],
        "windows": [2],
        "bits": [4, 3],
        "samples": [2],
        "calibration-length": [64],
        "calibration": [folder / "law.txt"],
        "out": [folder / "zoo"],
    }
    return [str(model), *(str(each) for name, values in options.items() for each in (f"--{name}", *values))]


def test_bases_are_made_measured_and_listed_once(zoo, arguments, monkeypatch):
    zoo.main(arguments)
    out = Path(arguments[-1])
    results = json.loads((out / "standard-tiny.json").read_text())
    four, three = (f"law/fisher/bits/32/{bits}" for bits in (4, 3))
    cells = {name: results["cells"][f"96/fox/{name}"] for name in (four, three)}
    assert all(cell["divergence"] > 0 for cell in cells.values())
    AutoModelForCausalLM.from_pretrained(out / "tiny-4-bits")
    card = (out / "tiny-4-bits" / "README.md").read_text()
    assert f"| 96 | fox | 2 | {cells[four]['perplexity']:.2f} |" in card and "| 96 | sums |" in card
    size = (out / "tiny-4-bits" / "eigenattn.safetensors").stat().st_size
    rows = (out / "README.md").read_text().splitlines()[-2:]
    command = "eigenattn compress tiny tiny-4-bits --kv-ratio 0.25 --text law --samples 2 --length 64"
    assert rows[0].startswith("| tiny | [") and rows[0].endswith(f" | {size:,} | `{command}` |")
    assert "(tiny-3-bits/README.md)" in rows[1]
    # All is there: a second run makes and measures nothing, and a card holds its figures once.
    monkeypatch.setattr(zoo, "compress_checkpoint", None)
    monkeypatch.setattr(zoo, "load_model", None)
    zoo.main(arguments)
    assert (out / "tiny-4-bits" / "README.md").read_text() == card
    assert (out / "README.md").read_text().splitlines()[-2:] == rows


def test_what_a_folder_measures_is_what_the_protocol_does(zoo, arguments):
    """Bases from a folder lose what the same bases lose before they are written."""
    out = Path(arguments[-1])
    zoo.main(arguments)
    script(BENCHMARKS / "standard.py").main(
        [*arguments[:-1], str(out / "beside"), "--rivals", "--copies", "0", "--trials", "0", "--finalists", "0"]
    )
    made, beside = (json.loads((each / "standard-tiny.json").read_text())["cells"] for each in (out, out / "beside"))
    assert made.keys() == beside.keys()
    for key, cell in made.items():
        assert cell["divergence"] == pytest.approx(beside[key]["divergence"], rel=1e-3, abs=1e-6)


def test_folders_of_something_else_are_refused(zoo, arguments):
    zoo.main(arguments)
    out = Path(arguments[-1])
    (out / "standard-tiny.json").rename(out / "kept.json")
    with pytest.raises(SystemExit, match="made with other options"):
        zoo.main([*arguments, "--samples", "3"])
    (out / "standard-tiny.json").unlink(missing_ok=True)
    (out / "kept.json").rename(out / "standard-tiny.json")
    with pytest.raises(SystemExit, match="leave out --variants"):
        zoo.main([*arguments, "--variants", "attention"])
    with pytest.raises(SystemExit, match="rename a folder"):
        zoo.main([arguments[0], *arguments])
