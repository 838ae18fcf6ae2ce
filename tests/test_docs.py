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
from eigenattn.models.family import Family
from eigenattn.models.maps import MAPS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def generator():
    return script(ROOT / "docs" / "generate_families.py")


def test_results_page_is_up_to_date():
    report = script(ROOT / "benchmarks" / "report_quality.py")
    assert report.readme() == report.README.read_text(encoding="utf-8")
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
    speeds = report.with_table("speed", report.report_kernel.speeds(report.load()))
    assert speeds == report.README.read_text(encoding="utf-8"), "run: python benchmarks/report_speed.py"
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
        found = attention.rotates, attention.normalises, bool(attention.clip), False, False, attention.layout.tied
        traits = generator.Traits(*found)
        attach(attention, some_bases(attention, sizes=(8, 8), centred=False))
        fold(attention)
        left = [name.replace("_", " ") for name in MAPS if getattr(attention, name) is not None]
        assert left == generator.at_run_time(traits)
        narrow = [
            side for side, size in zip(("queries", "keys", "values"), attention.projected, strict=True) if size == 8
        ]
        assert [*narrow, *([] if attention.layout.tied else ["output"])] == generator.folded(traits)


def test_changelog_knows_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"## [{version}] - " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_workflow_calls_targets_that_there_are():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    called = set(re.findall(r"run: make ([\w-]+)", workflow))
    assert called == {"docs", "lint", "test", "test-oldest", "test-vllm"}
    assert called <= set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))


def prose(page: Path) -> str:
    """A page without its code."""
    return re.sub(
        r"^```.*?^```|`[^`\n]*`|^    .*?$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as forges and the site make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"""\]\(([^)\s]+)\)|(?:src|srcset)="([^"]+)\"""", prose(page)):
        path, _, anchor = "".join(target).partition("#")
        if path.startswith(("http://", "https://")):
            continue
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), path
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found), f"{path}#{anchor}"


def test_every_page_is_listed_and_on_the_site():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in site, page.name
        assert page.name == "README.md" or f"[{page.name}]({page.name})" in index, page.name


def blocks() -> dict[str, str]:
    """Code on pages that says of itself that a test runs it."""
    marked = r"<!-- a test runs this -->\n```python\n(.*?)^```"
    return {
        f"{page.name}-{number}": code
        for page in PAGES
        for number, code in enumerate(
            re.findall(marked, page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE), start=1
        )
    }


@pytest.mark.parametrize("name", blocks())
def test_code_on_pages_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks()[name], name, "exec"), {})
    assert capsys.readouterr().out


def test_all_other_code_on_pages_is_code():
    for page in PAGES:
        for code in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            compile(code, page.name, "exec")


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_pictures_are_up_to_date():
    pictures = script(ROOT / "docs" / "draw_pictures.py")
    for name, draw in pictures.PICTURES.items():
        for theme, colours in pictures.THEMES.items():
            drawn = (pictures.FOLDER / f"{name}-{theme}.svg").read_text(encoding="utf-8")
            assert drawn == draw(colours), "run: python docs/draw_pictures.py"
