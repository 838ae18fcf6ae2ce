"""Measure everything of docs/performance.md that needs a GPU, and write the page.

python benchmarks/gpu.py                  # about an hour on one GPU with 80 GB
python benchmarks/gpu.py --only kernel    # one kind
python benchmarks/gpu.py --list           # the commands, without running them

Each measurement is a command of its own: one that fails or runs out of memory is named in the end, and loses no other.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RANKS = "--ranks 64,96 --ranks 64,64 --ranks 80,80 --bits 2.5 --share 1-4 --share 1kv"
CONTEXTS = [2**exponent for exponent in range(12, 22)]  # 4k to 2M


def commands() -> list[str]:
    """Arguments of `eigenattn benchmark`, the most wanted first."""
    found = [f"kernel --shape llama-3-8b --batch 16 --length 8192 {RANKS}"]
    found += [f"kernel --shape {shape} --batch 16 --length 8192 {RANKS}" for shape in ("llama-2-7b", "mpt-7b")]
    found += [f"kernel --shape llama-3-8b --batch 1 --length {length} {RANKS}" for length in CONTEXTS]
    found += [f"kernel --shape mpt-7b --batch 1 --length {length} {RANKS}" for length in CONTEXTS]
    for shape in ("llama-3-8b", "llama-2-7b", "opt-6.7b", "mpt-7b"):
        # Full-rank caches of models without grouped queries are four times as large.
        batch = 16 if shape == "llama-3-8b" else 4
        found.append(f"decode --shape {shape} --kv-ratio 0.6 --batch {batch} --length 8192 --new-tokens 32 --rounds 3")
    found += [
        "prefill --shape llama-3-8b --length 4096 --length 16384 --length 65536 --length 131072 --chunk 4096",
        "prefill --shape opt-6.7b --length 4096 --length 16384 --length 65536 --chunk 4096",
        "calibration --shape llama-2-7b --samples 32 --length 2048",
        "memory --shape llama-3-8b --length 8192 --longest 2097152",
        "memory --shape opt-6.7b --length 2048 --longest 131072",
    ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="commands that begin with this word")
    parser.add_argument("--list", action="store_true", help="print the commands")
    options = parser.parse_args()
    chosen = [line for line in commands() if options.only is None or line.split()[0] == options.only]
    failed = []
    for line in chosen:
        command = f"{line} --device cuda --dtype bfloat16 --results {RESULTS}"
        print(f"eigenattn benchmark {command}", flush=True)
        if options.list:
            continue
        done = subprocess.run([sys.executable, "-m", "eigenattn.cli", "benchmark", *shlex.split(command)])
        failed += [line] if done.returncode else []
    if options.list:
        return 0
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "report_speed.py")], check=True)
    for line in failed:
        print(f"failed: eigenattn benchmark {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
