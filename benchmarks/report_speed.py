"""Write docs/performance.md from what `eigenattn benchmark ... --results benchmarks/results` measured.

python benchmarks/report_speed.py
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "performance.md", ROOT / "benchmarks" / "results"
INTRODUCTION = """\
<!-- Written by benchmarks/report_speed.py from benchmarks/results/{kernel,decode,memory}-*.json: edit there. -->
# Performance

Speed and memory against the same thing at full rank, by the fastest attention of PyTorch that runs on the machine.
What is compared takes turns in one run, and medians count. Compare ratios, not times of different machines or runs. To
measure another machine, run the commands below on it (`--device cuda` is the default where there is a GPU), and then
`python benchmarks/report_speed.py`.
"""
KINDS = {
    "decode": """\
## Whole models

Tokens a second in transformers' `generate` while decoding; reading the prompt is not counted.
""",
    "kernel": """\
## One step of attention

`torch` is batched PyTorch, `triton` the fused kernel. The bytes are those that have to be read: latents, and the exact
window; their share of the bandwidth of copying says how far a kernel is from the floor. (On a CPU, what fits in its
caches can be read faster than memory is copied.)
""",
    "memory": """\
## What fits on a GPU

    eigenattn benchmark memory COMPRESSED --against ORIGINAL --results benchmarks/results
""",
}


def load() -> dict[str, list[dict]]:
    """Results by kind, in the order of their files' names."""
    found: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    for path in sorted(RESULTS.glob("*.json")):
        kind = path.stem.split("-")[0]
        if kind in found:
            found[kind].append(json.loads(path.read_text(encoding="utf-8")))
    return found


def measured_on(result: dict) -> str:
    versions = result["versions"]
    return f"Measured on {result['device']}, torch {versions['torch']}, transformers {versions['transformers']}."


def decode(result: dict) -> list[str]:
    rows = [
        f"| {row['cache']} | {row['tokens_per_second']:.1f} | {row['baseline_tokens_per_second']:.1f} "
        f"| {row['ratio']:.2f} |"
        for row in result["rows"]
    ]
    about = (
        f"{result['model']} against {result['against']}: KV ratio {result['kv_ratio']:.3f}, {result['dtype']}, batch "
        f"{result['batch']}, {result['new_tokens']} tokens after a prompt of {result['length']:,}."
    )
    heading = "| cache | tokens a second | of the original | ratio |"
    command = (
        f"    eigenattn benchmark decode {result['model']} --against {result['against']} --dtype {result['dtype']} "
        f"--batch {result['batch']} \\\n        --length {result['length']} --new-tokens {result['new_tokens']} "
        f"--rounds {result['rounds']} --results benchmarks/results"
    )
    return [f"{about} {measured_on(result)}", "", heading, "| --- | --- | --- | --- |", *rows, "", command]


def kernel(result: dict) -> list[str]:
    shape = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in result["shape"].items())
    about = f"{shape}; copying at {result['copy_bandwidth'] / 1e9:.0f} GB/s. {measured_on(result)}"
    rows = [
        f"| {row['name']} | {row['seconds'] * 1e3:.3f} | {row['bandwidth_share']:.0%} "
        f"| {row['speed_against_best']:.2f} |"
        for row in result["rows"]
    ]
    heading = "| kernel, positions, (R_k, R_v) | ms | of copy bandwidth | speed against the best at full rank |"
    sizes = {name: value for name, value in result["shape"].items() if name != "dtype"}
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in sizes.items())
    command = f"    eigenattn benchmark kernel {options} \\\n        --dtype {result['shape']['dtype']} --rounds "
    command += (
        f"{result['rounds']}{''.join(f' --ranks {k},{v}' for k, v in result['ranks'])} --results benchmarks/results"
    )
    return [about[0].upper() + about[1:], "", heading, "| --- | --- | --- | --- |", *rows, "", command]


def memory(result: dict) -> list[str]:
    about = f"{result['memory'] / 2**30:.0f} GiB. {measured_on(result)}"
    rows = [f"| {row['model']} | {row['batch']:,} | {row['context']:,} |" for row in result["rows"]]
    heading = f"| model | rows of {result['length']:,} tokens | tokens of one row, up to {result['longest']:,} |"
    return [about, "", heading, "| --- | --- | --- |", *rows]


SECTIONS = {"decode": decode, "kernel": kernel, "memory": memory}


def page(results: dict[str, list[dict]]) -> str:
    parts = [INTRODUCTION]
    for kind, introduction in KINDS.items():
        parts.append(introduction)
        parts += ["\n".join(SECTIONS[kind](result)) + "\n" for result in results[kind]] or ["Not measured yet.\n"]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(load()), encoding="utf-8")
