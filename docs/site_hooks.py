"""Hooks of MkDocs: pages at the root of the repository are pages of the site, and links to the rest are words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# Pages at the root, and what they are called on the site.
TAKEN_IN = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)#\s]*)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages at the root."""
    for name, page in TAKEN_IN.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let links lead to pages of the site; what is in the repository alone is named, and not linked."""
    here = ROOT if page.file.src_uri in TAKEN_IN.values() else ROOT / "docs"

    def link(found: re.Match[str]) -> str:
        words, path, anchor = found[1], found[2], found[3] or ""
        target = (here / path).resolve().relative_to(ROOT).as_posix()
        if target in TAKEN_IN:
            return f"[{words}]({TAKEN_IN[target]}{anchor})"
        if target.startswith("docs/"):
            return f"[{words}]({target.removeprefix('docs/')}{anchor})"
        return words

    return LINK.sub(link, markdown)
