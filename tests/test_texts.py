"""The script that makes the standard protocol's texts: what it takes of a wheel, and that other text is refused."""

import hashlib
import zipfile
from pathlib import Path

import pytest
from helpers import script


def test_a_text_is_files_in_the_order_of_their_names(tmp_path):
    texts = script(Path(__file__).parents[1] / "benchmarks" / "texts.py")
    wheel = tmp_path / "made-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("made/b.csv", "made/a.csv", "made/c.txt"):
            archive.writestr(name, f"{name}\nsome more")
    text = "made/a.cs\n\nmade/b.cs"
    found = texts.TextOfWheel("made==1.0", ["made/*.csv"], hashlib.sha256(text.encode()).hexdigest(), most=9)
    assert found.read(wheel) == text
    with pytest.raises(ValueError, match="another text"):
        texts.TextOfWheel("made==1.0", ["made/*.txt"], found.sha256).read(wheel)
    assert len({each.sha256 for each in texts.TEXTS.values()}) == 8
