"""Tables of the README that come from results: each stands between markers, `<!-- table of NAME: begin -->` and end."""

from collections.abc import Sequence
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def with_table(name: str, lines: Sequence[str]) -> str:
    """The README with a table as it is now."""
    begin, end = (f"<!-- table of {name}: {which} -->" for which in ("begin", "end"))
    before, rest = README.read_text(encoding="utf-8").split(begin)
    return "\n".join([before + begin, *lines, end + rest.split(end)[1]])
