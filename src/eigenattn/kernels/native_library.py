"""The native decoding step's library: compiled where it is first used, and kept."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "native"
FOLDER = "EIGENATTN_CACHE"
COMPILER = "CXX"
EXTRA = "EIGENATTN_NATIVE_FLAGS"
# Without the width GCC takes half of a register with AVX-512, and tiles that fit spill. Nobody looks at `errno`.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-fPIC", "-shared", "-fopenmp")
WIDE = "-mprefer-vector-width=512"
MINUTES = 5


def folder() -> Path:
    """Where compiled libraries are kept: the environment variable `EIGENATTN_CACHE`, or the user's cache folder."""
    chosen = os.environ.get(FOLDER)
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eigenattn"


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The library, compiled if it is not there yet, or None; and where it lies, or why there is none."""
    if sys.platform == "win32":
        return None, "the native step is not built on Windows"
    compiler = _compiler()
    if not compiler:
        return None, f"there is no C++ compiler: install g++, or name one in {COMPILER}"
    try:
        command = [*compiler, *FLAGS, *([WIDE] if _is_x86() else []), *shlex.split(os.environ.get(EXTRA, ""))]
        path = folder() / f"decoding-{_fingerprint(command)}.so"
        if not path.exists():
            _build(command, path)
        found = ctypes.CDLL(str(path))
        for function in (found.eigenattn_decode, found.eigenattn_join):
            function.restype, function.argtypes = None, [ctypes.c_char_p]
        sizes, at = [ctypes.c_int64] * 4, ctypes.c_void_p
        for function in (found.eigenattn_pack, found.eigenattn_unpack, found.eigenattn_rotate, found.eigenattn_encode):
            function.restype = None
        found.eigenattn_encode.argtypes = [ctypes.c_char_p, *sizes, *sizes[:3], at, at, *sizes, at]
        found.eigenattn_rotate.argtypes = [at, *sizes, *sizes, at, at, *sizes, sizes[0], at]
        found.eigenattn_pack.argtypes = [at, *sizes, at, at, *sizes[:3], at]
        found.eigenattn_unpack.argtypes = [at, *sizes, *sizes[:3], at, sizes[0], at, *sizes[:2], at]
        return found, str(path)
    except subprocess.CalledProcessError as error:
        return None, f"{compiler[0]} failed: {_last_line(error.stderr)}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"the native step could not be built: {error}"


@torch.compiler.assume_constant_result
def unavailable() -> str | None:
    """Why the native step does not run on this machine; None if it does. Compiles it if that is to be found out."""
    found, about = library()
    return None if found is not None else about


@torch.compiler.assume_constant_result
def multiplies() -> bool:
    """Whether this machine multiplies matrices of bf16."""
    found, _ = library()
    return found is not None and bool(found.eigenattn_matrices())


def address(x: torch.Tensor | None) -> int:
    """Where a tensor's elements lie; 0 for none."""
    return 0 if x is None else x.data_ptr()


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get(COMPILER, ""))
    if named:
        return named if shutil.which(named[0]) else []
    return next(([name] for name in ("g++", "clang++", "c++") if shutil.which(name)), [])


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _fingerprint(command: list[str]) -> str:
    """Of all that decides what is built: source, command, compiler, processor, and PyTorch, whose OpenMP it runs on."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8").splitlines() if about.exists() else []
    flags = [line for line in lines if line.startswith(("flags", "Features"))]
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    sources = [path.read_text(encoding="utf-8") for path in sorted(SOURCES.iterdir())]
    told = [*sources, *command, version, *flags[:1], platform.machine(), torch.__version__]
    return hashlib.sha256("\0".join(told).encode()).hexdigest()[:16]


def _build(command: list[str], path: Path) -> None:
    """Compile beside the path and rename: processes that build at once build the same, and none sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="building-") as beside:
        built = Path(beside) / path.name
        files = map(str, sorted(SOURCES.glob("*.cpp")))
        command = [*command, *files, "-o", str(built)]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=60 * MINUTES)
        built.replace(path)


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else "it said nothing"
