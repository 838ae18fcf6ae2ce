"""The report as a browser shows it, and the model card's evaluation."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import run
from tiny import save_tiny

from eigenattn.cache.layout import SIDES, Latent, Layout
from eigenattn.cache.packing import Widths
from eigenattn.config import EigenAttentionConfig
from eigenattn.errors import EigenAttnError
from eigenattn.report import html
from eigenattn.report import page as page_module
from eigenattn.report.inspection import Inspection
from eigenattn.report.page import Material, build

pytest.importorskip("matplotlib", reason="needs the extra plot")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TEXT = "The quick brown fox jumps over the lazy dog; it was not amused. " * 40
# What a script finds that is put into the page: pictures without a size or a drawing, what sticks out of the screen.
PROBE = """<script>
const wrong = [];
for (const svg of document.querySelectorAll("svg[role=img]")) {
  const box = svg.getBoundingClientRect();
  if (box.width < 100 || box.height < 50 || svg.querySelectorAll("path, rect").length < 5) wrong.push("svg");
}
for (const each of document.images) if (!each.naturalWidth) wrong.push("img");
if (document.documentElement.scrollWidth > window.innerWidth) wrong.push("too wide");
const colours = getComputedStyle(document.body);
document.body.innerHTML = JSON.stringify({
  wrong, pictures: document.querySelectorAll("svg[role=img]").length,
  width: window.innerWidth, back: colours.backgroundColor, ink: colours.color,
});
</script>"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a checkpoint, evaluated, its sweep and spectra, and the page of all that."""
    folder = tmp_path_factory.mktemp("made")
    base, text = save_tiny(folder / "base"), folder / "fox.txt"
    text.write_text(TEXT)
    drawn = ("--text", text, "--samples", "4", "--length", "48")
    read = ("--tokens", "96", "--length", "48")
    run("compress", base, folder / "small", *drawn, "--rank-multiple", "2", "--window", "8")
    run("evaluate", folder / "small", "--baseline", base, "--text", text, *read, "--needles", "300", "--save")
    run(
        "sweep",
        base,
        folder / "sweep",
        *drawn,
        "--tokens",
        "96",
        "--window",
        "8",
        "--kv-ratio",
        "0.75,0.5",
        "--ranks",
        "uniform",
    )
    run("spectrum", base, folder / "spectra", *drawn)
    options = ("--sweep", folder / "sweep", "--spectrum", folder / "spectra", "--baseline", base)
    run("report", folder / "small", *options, "--prompt", "<b>The & quick")
    return folder


def test_page_holds_everything(made):
    page = (made / "small" / "report.html").read_text()
    evaluation = json.loads((made / "small" / "evaluation.json").read_text())
    for heading in ("Ranks by layer", "Evaluation against", "Quality against cache size", "Spectra", "Continuations"):
        assert f"<h2>{heading}" in page
    assert f"{evaluation['texts'][0]['divergence']:.4f}" in page
    assert "needle at 50% of 300 tokens" in page
    assert "&lt;b&gt;The &amp; quick" in page and "<b>The" not in page
    assert f"eigenattn compress {made / 'base'} {made / 'small'} --kv-ratio 0.25 --rank-multiple 2 --window 8" in page
    assert "eigenattn sweep" in page and "eigenattn spectrum" in page
    ranks = re.findall(r"<title>layer (\d), (keys|values): rank (\d+) of 16</title>", page)
    assert len(ranks) == 6


def test_page_loads_nothing(made):
    page = (made / "small" / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#|data:)[^"']*""", page)
    assert not re.findall(r"url\((?!#)", page)
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 1 and "fetch" not in scripts[0]
    allowed = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{allowed}'\">" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    targets = {each for pair in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page) for each in pair if each}
    assert targets and targets <= set(ids)


def page_of(config: EigenAttentionConfig, *layers: tuple[Latent, ...]) -> str:
    """Of a checkpoint with two KV heads of 16 dimensions, and these latents by layer."""
    facts = {"base_model": "base", "text": [{"source": "self", "sha256": None}]}
    layouts = [Layout(2, latents, config.window) for latents in layers]
    return build(Material("some/model", Inspection("llama", True, layouts, 4, config.to_dict(), facts)))


def test_page_of_coded_and_shared_latents():
    """Widths are listed, ranks are drawn against all heads that share a latent, and the target comes back."""
    keys = Latent(("key",), 2, 24, 16, Widths.of({8: 8, 4: 8, 2: 8}))
    values = Latent(("value",), 2, 16, 16, Widths.of({4: 16}))
    page = page_of(EigenAttentionConfig(coded=True, kv_ratio=0.1875, share="2"), (keys, values))
    assert "layer 0, keys: rank 24 of 32" in page
    assert "<td>24 of 32</td><td>8, 8, 8</td><td>16 of 32</td><td>0, 16, 0</td><td>22</td>" in page
    assert "eigenattn compress base some/model --kv-ratio 0.1875 --share 2 --text self" in page


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({}, "--kv-ratio 0.25"),
        ({"kv_ratio": 0.4, "coded": False}, "--kv-ratio 0.4 --uncoded"),
        ({"kv_ratio": 0.4, "coded": True, "basis": "attention"}, "--kv-ratio 0.4 --coded --basis attention"),
        ({"kv_ratio": 0.6, "basis": "eigen"}, "--kv-ratio 0.6 --basis eigen"),
        ({"kv_ratio": 0.4, "coded": False, "basis": "fisher"}, "--kv-ratio 0.4 --uncoded --basis fisher"),
        ({"energy": 0.9, "refit": True}, "--energy 0.9 --refit"),
    ],
)
def test_the_command_asks_for_what_is_no_default(options, asked):
    page = page_of(EigenAttentionConfig(**options), Layout.full(2, 16).latents)
    assert f"eigenattn compress base some/model {asked} --text self" in page


def test_page_of_latents_of_values_that_heads_share():
    """Either side is drawn against its own full rank, and the command says what is not the default."""
    layers = [(Latent(("key",), 1, k, 16), Latent(("value",), 2, v, 16)) for k, v in ((8, 24), (12, 28))]
    page = page_of(EigenAttentionConfig(kv_ratio=0.6, share="1-2"), *layers)
    assert "keys: rank 8 of 16" in page and "values: rank 24 of 32" in page
    assert "latents of keys of one KV head, values of 2 KV heads" in page
    assert "eigenattn compress base some/model --kv-ratio 0.6 --share 1-2 --text self" in page


def test_page_of_latents_of_keys_and_values():
    """Ranks are drawn against keys and values together; a layer at full rank has them apart."""
    layers = (Latent(SIDES, 2, 24, 16),), Layout.full(2, 16).latents
    page = page_of(EigenAttentionConfig(kv_ratio=0.6, share="2kv", refit=False, window=0), *layers)
    assert page.count("layer 0, keys and values: rank 24 of 64") == 2
    assert "layer 1, values: rank 16 of 16" in page
    assert "<td>1</td><td></td><td>16 of 16</td><td>16 of 16</td><td>256</td>" in page
    assert "eigenattn compress base some/model --kv-ratio 0.6 --window 0 --share 2kv --text self" in page


def browse(page: Path, *options: str) -> tuple[str, str]:
    """The document as a headless browser has it in the end, and what it said on its console."""
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        *options,
        "--dump-dom",
    ]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, "\n".join(said)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_page_in_a_browser(made, tmp_path):
    page = made / "small" / "report.html"
    document, console = browse(page)
    assert "</html>" in document
    assert console == ""
    # With a script of ours inside, which the page's own policy would not let run.
    probed = tmp_path / "probed.html"
    free = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    probed.write_text(free.replace("</body>", PROBE + "</body>"))
    found = {}
    for name, options in (
        ("phone", ["--window-size=500,800"]),
        ("dark", ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"]),
    ):
        document, console = browse(probed, *options)
        assert console == ""
        found[name] = json.loads(re.search(r'{"wrong".*}', document)[0])
        assert found[name]["wrong"] == []
        assert found[name]["pictures"] == 5
    assert found["phone"]["width"] <= 500
    assert found["phone"]["back"] == "rgb(255, 255, 255)"
    assert found["dark"]["back"] == "rgb(21, 23, 26)"


STEPS = [{"size": "100%", "loss": "0%"}, {"size": "25%", "loss": "</script> 1%"}]


def test_a_slider_stands_without_scripts():
    slider = html.slider("Which size?", STEPS, first=1)
    assert '<b data-of="size">25%</b>' in slider and 'max="1" value="1" disabled' in slider
    assert slider.count("</script>") == 1
    held = re.search(r'<script type="application/json">(.*)</script>', slider)
    assert json.loads(held[1]) == STEPS


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_sliders_move_under_the_policy_of_the_page(tmp_path):
    """The page's own script runs under its policy; then a script of ours slides, on a page without one."""
    page = tmp_path / "page.html"
    page.write_text(html.page("sizes", [html.slider("Which size?", STEPS)]))
    document, console = browse(page)
    assert console == "" and 'aria-valuetext="100%, 0%"' in document
    slide = """<script>
    const range = document.querySelector("input");
    range.value = 1;
    range.dispatchEvent(new Event("input"));
    </script>"""
    free = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    page.write_text(free.replace("</body>", slide + "</body>"))
    document, console = browse(page)
    assert console == "" and '<b data-of="size">25%</b>' in document and "&lt;/script&gt; 1%</b>" in document


def test_sizes_to_slide_over_are_the_frontier():
    """Of each size the best of ours, without sizes that a smaller one beats; and the best rival of as many bytes."""

    def cell(name: str, size: int, *increases: float, **facts: float) -> dict:
        return {
            "method": name,
            "cache_bytes": size,
            "kv_ratio": size / 100,
            "texts": [{"relative_increase": each} for each in increases],
        } | facts

    cells = [
        cell("a", 50, 0.01, 0.03, asked=0.5),
        cell("b", 50, 0.05, 0.05, asked=0.5),
        cell("a", 40, 0.01, 0.01, asked=0.4),
        cell("a", 20, 0.09, 0.11, asked=0.2),
        cell("plain-4", 30, 0.2, 0.2),
        cell("plain-3", 20, 0.4, 0.4),
    ]
    (slider, _) = page_module._sizes_measured({"cells": dict(enumerate(cells))})
    held = json.loads(re.search(r'<script type="application/json">(.*)</script>', slider)[1])
    assert [(step["of the original's cache"], step["increase of perplexity"]) for step in held] == [
        ("40.0%", "+1.00%"),
        ("20.0%", "+10.00%"),
    ]
    assert [step["best rival of as many bytes"] for step in held] == ["none", "plain-4: +20.00%"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_the_browser_test_can_fail(tmp_path):
    page = tmp_path / "broken.html"
    page.write_text('<body><img src="missing.png"><script>console.error("oh")</script>' + PROBE + "</body>")
    document, console = browse(page)
    assert "oh" in console
    assert json.loads(re.search(r'{"wrong".*}', document)[0])["wrong"] == ["img"]


def test_card_shows_the_last_evaluation(made, tmp_path):
    folder = tmp_path / "small"
    shutil.copytree(made / "small", folder)
    before = (folder / "README.md").read_text()
    divergence = json.loads((folder / "evaluation.json").read_text())["texts"][0]["divergence"]
    assert before.count("## Evaluation") == 1 and f"{divergence:.4f}" in before
    run("evaluate", folder, "--text", made / "fox.txt", "--tokens", "48", "--length", "48", "--save")
    after = (folder / "README.md").read_text()
    assert after.count("## Evaluation") == 1 and "divergence" not in after
    assert after.split("## Evaluation")[0] == before.split("## Evaluation")[0]
    with pytest.raises(EigenAttnError, match="no folder with a model card"):
        run("evaluate", made / "base", "--save")


def test_bad_input_is_one_line(made, tmp_path):
    with pytest.raises(EigenAttnError, match="not compressed"):
        run("report", made / "base")
    with pytest.raises(EigenAttnError, match="holds no sweep"):
        run("report", made / "small", "--sweep", tmp_path)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(EigenAttnError, match="holds no evaluation"):
        run("report", made / "small", "--evaluation", tmp_path / "other.json")
    bare = tmp_path / "bare.html"
    shutil.copytree(made / "small", tmp_path / "small", ignore=shutil.ignore_patterns("evaluation.json"))
    run("report", tmp_path / "small", "--out", bare)
    assert "Ranks by layer" in bare.read_text() and "Spectra" not in bare.read_text()
