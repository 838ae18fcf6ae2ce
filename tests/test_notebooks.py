"""The notebooks are whole, hold no outputs, and run: here on a tiny model, and by `make notebooks` on SmolLM2."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tiny

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
# In place of the cells that are tagged as parameters.
SMALL = {
    "compress": {"PROMPT": "The fox", "NEW_TOKENS": 8},
    "rivals": {"TEXT": "python-docs", "RIVALS": ["turboquant-4-nc", "kivi-4"], "KV_RATIO": 0.25, "WINDOWS": 2},
}
books = pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)


def cells(path: Path) -> list[dict[str, Any]]:
    """Those of code."""
    book = json.loads(path.read_text(encoding="utf-8"))
    assert book["nbformat"] == 4 and {cell["cell_type"] for cell in book["cells"]} == {"code", "markdown"}
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])
    return [cell for cell in book["cells"] if cell["cell_type"] == "code"]


@books
def test_no_outputs_are_stored(path):
    for cell in cells(path):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        compile("".join(cell["source"]), path.name, "exec")


@books
def test_cells_run_in_their_order(path, tmp_path, capsys):
    small = {"MODEL": str(save_tiny(tmp_path / "tiny")), "SAMPLES": 2, "LENGTH": 96, **SMALL[path.stem]}
    names: dict[str, Any] = {}
    for cell in cells(path):
        code = compile("".join(cell["source"]), path.name, "exec")
        if "parameters" in cell["metadata"].get("tags", ()):
            assert set(code.co_names) == set(small)
            names |= small
        else:
            exec(code, names)
    assert capsys.readouterr().out


def test_every_notebook_is_listed():
    index = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    for path in FOLDER.glob("*.ipynb"):
        assert f"(notebooks/{path.name})" in index
