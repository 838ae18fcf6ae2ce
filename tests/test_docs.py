"""Pages that are written from code say what the code does."""

import json
import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
from helpers import script
from tiny import TINY, some_bases, tiny

from eigenattn.compression.folding import attach, fold
from eigenattn.models.conversion import convert_attention, eigen_layers
from eigenattn.models.families import Family
from eigenattn.models.maps import MAPS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def generator():
    return script(ROOT / "docs" / "generate_families.py")


def test_results_page_is_up_to_date():
    report = script(ROOT / "benchmarks" / "report_quality.py")
    assert report.PAGE.read_text(encoding="utf-8") == report.page(report.load()), (
        "run: python benchmarks/report_quality.py --plot"
    )


def test_spectra_page_is_up_to_date():
    report = script(ROOT / "benchmarks" / "report_spectra.py")
    assert report.PAGE.read_text(encoding="utf-8") == report.page(report.load()), (
        "run: python benchmarks/report_spectra.py --plot"
    )


def test_performance_page_is_up_to_date():
    report = script(ROOT / "benchmarks" / "report_speed.py")
    assert report.PAGE.read_text(encoding="utf-8") == report.page(report.load()), (
        "run: python benchmarks/report_speed.py"
    )


def test_serving_page_states_what_was_measured():
    found = json.loads((ROOT / "benchmarks" / "results" / "large.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    for row in found["rows"]:
        cells = (row["weights"], row["window"], f"{row['peak'] / 1e9:.2f} GB", f"{row['seconds']:.0f} s")
        assert f"| {' | '.join(map(str, cells))} |" in page


def test_families_page_is_up_to_date(generator):
    committed = generator.PAGE.read_text(encoding="utf-8")
    assert committed == generator.page(), "run: python docs/generate_families.py"


def test_every_column_is_described(generator):
    assert [line.split("`")[1] for line in generator.columns().splitlines()] == [f.name for f in fields(Family)]


@pytest.mark.parametrize("name", TINY)
def test_page_says_what_is_folded(generator, name):
    model = tiny(name)
    convert_attention(model)
    for attention in eigen_layers(model):
        traits = attention.rotates, attention.normalises, bool(attention.clip)
        attach(attention, some_bases(attention, sizes=(8, 8), centred=False))
        fold(attention)
        left = [name.replace("_", " ") for name in MAPS if getattr(attention, name) is not None]
        assert left == generator.at_run_time(*traits)
        narrow = [
            side for side, size in zip(("queries", "keys", "values"), attention.projected, strict=True) if size == 8
        ]
        assert [*narrow, "output"] == generator.folded(*traits)


def test_changelog_knows_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"## [{version}] - " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_workflow_calls_targets_that_there_are():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    called = set(re.findall(r"run: make ([\w-]+)", workflow))
    assert called == {"lint", "test", "test-oldest", "test-vllm"}
    assert called <= set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
