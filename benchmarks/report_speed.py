"""Write docs/performance.md, and the README's table of speed.

They are made of what `eigenattn benchmark ... --results benchmarks/results` measured.

python benchmarks/report_speed.py [--plot]    # the plot needs the extra `plot`
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import report_kernel
from readme import README, with_table
from report_kernel import measured_on

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "performance.md", ROOT / "benchmarks" / "results"
INTRODUCTION = """\
<!-- Written by benchmarks/report_speed.py from benchmarks/results/*.json: edit there. -->
# Performance

Speed and memory against the same thing at full rank, by the fastest attention of PyTorch that runs on the machine.
What is compared takes turns in one run, and medians count. Compare ratios, not times of different machines or runs. To
measure another machine, run the commands below on it (`--device cuda` is the default where there is a GPU), and then
`python benchmarks/report_speed.py`. `python benchmarks/gpu.py` runs all that a GPU is needed for, with random weights
in the shapes of Llama 3 8B, Llama 2 7B, OPT 6.7B and MPT 7B, and contexts from 4k to 2M tokens.

On a GPU with Triton, models in half precision decode by a fused kernel; on a CPU, in float32 and bfloat16, by a native
one where there is a C++ compiler, which builds it at the first step and keeps it in the user's cache folder (or in
`EIGENATTN_CACHE`); and elsewhere by PyTorch's operations. `eigenattn.kernels.decoding_step_reason()` says which, and
why. That is chosen at run time: `eigenattn.kernels.use("torch")`, or `EIGENATTN_KERNELS=torch`, takes PyTorch's always,
and `triton` the fused kernel, on a CPU too under `TRITON_INTERPRET=1`, which is how it is tested. Texts longer than
2,048 tokens are read a chunk of keys at a time: beside the cache and its own activations a pass needs one chunk of
decoded keys.
"""
KINDS = {
    "decode": """\
## Whole models

Tokens a second in transformers' `generate` while decoding; reading the prompt is not counted.
""",
    "prefill": """\
## Reading a prompt

Tokens a second; on a GPU also what reading takes at its peak, beyond the model and the cache that it leaves.
""",
    "calibration": """\
## Compressing

Statistics against a plain forward pass over the same tokens, and the whole of `compress`, on random tokens.
""",
    "kernel": """\
## One step of attention

`torch` is batched PyTorch, `triton` the fused kernel, `native` the one for CPUs. The bytes are those that have to be
read: latents, and the exact window; their share of the bandwidth of copying says how far a kernel is from the floor,
and so does the share of the arithmetic of one large product of matrices in the same dtype, which counts products alone.
(On a CPU, what fits in its caches can be read faster than memory is copied.)

![Milliseconds of a step by tokens](growth.png)
""",
    "memory": """\
## What fits on a GPU

    eigenattn benchmark memory --shape llama-3-8b --length 8192 --longest 2097152 --results benchmarks/results
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
    rows += [f"| {each['cache']} | failed: {each['reason']} | | |" for each in result.get("failed", [])]
    command = (
        f"    eigenattn benchmark decode {models(result)} --dtype {result['dtype']} "
        f"--batch {result['batch']} \\\n        --length {result['length']} --new-tokens {result['new_tokens']} "
        f"--rounds {result['rounds']} --results benchmarks/results"
    )
    return [f"{about} {measured_on(result)}", "", heading, "| --- | --- | --- | --- |", *rows, "", command]


def memory(result: dict) -> list[str]:
    about = f"{result['memory'] / 2**30:.0f} GiB. {measured_on(result)}"
    rows = [f"| {row['model']} | {row['batch']:,} | {row['context']:,} |" for row in result["rows"]]
    heading = f"| model | rows of {result['length']:,} tokens | tokens of one row, up to {result['longest']:,} |"
    return [about, "", heading, "| --- | --- | --- |", *rows]


def models(result: dict) -> str:
    """The arguments that say what was compared."""
    if result.get("shape"):
        return f"--shape {result['shape']} --kv-ratio {result['ratio']:g}"
    return f"{result['model']} --against {result['against']}"


def prefill(result: dict) -> list[str]:
    about = (
        f"{result['model']} against {result['against']}: KV ratio {result['kv_ratio']:.3f}, {result['dtype']}, batch "
        f"{result['batch']}, {'the whole prompt' if result['chunk'] is None else result['chunk']} a pass."
    )
    rows = []
    for row in result["rows"]:
        peaks = (row["peak_bytes"], row["baseline_peak_bytes"])
        cells = " | ".join("" if x is None else f"{x / 2**20:,.0f}" for x in peaks)
        rows.append(
            f"| {row['length']:,} | {row['tokens_per_second']:.0f} | {row['baseline_tokens_per_second']:.0f} "
            f"| {row['ratio']:.2f} | {cells} |"
        )
    heading = "| tokens | tokens a second | of the original | ratio | MiB at the peak | of the original |"
    sizes = f"--dtype {result['dtype']} --batch {result['batch']}"
    command = f"    eigenattn benchmark prefill {models(result)} {sizes} \\\n       "
    command += "".join(f" --length {length}" for length in result["lengths"])
    command += "" if result["chunk"] is None else f" --chunk {result['chunk']}"
    command += f" --rounds {result['rounds']} --results benchmarks/results"
    return [f"{about} {measured_on(result)}", "", heading, "| --- " * 6 + "|", *rows, "", command]


def calibration(result: dict) -> list[str]:
    name = f"--shape {result['shape']}" if result["shape"] else result["model"]
    about = (
        f"{result['model']}, {result['dtype']}, {result['samples']} x {result['length']:,} tokens: statistics take "
        f"{result['ratio']:.2f} times a forward pass; the whole takes {result['seconds']:.0f} s and "
        f"{result['peak_memory_bytes'] / 2**30:.1f} GiB at its peak, {result['weight_bytes'] / 2**30:.1f} GiB of them "
        f"weights. {measured_on(result)}"
    )
    command = (
        f"    eigenattn benchmark calibration {name} --samples {result['samples']} --length {result['length']} "
        f"--rounds {result['rounds']} --results benchmarks/results"
    )
    return [about, "", command]


SECTIONS = {"decode": decode, "prefill": prefill, "calibration": calibration, "memory": memory}


def page(results: dict[str, list[dict]]) -> str:
    parts = [INTRODUCTION, "\n".join(report_kernel.aims(results)) + "\n"]
    for kind, introduction in KINDS.items():
        parts.append(introduction)
        found = (
            report_kernel.kernels(results[kind])
            if kind == "kernel"
            else [SECTIONS[kind](result) for result in results[kind]]
        )
        parts += ["\n".join(lines) + "\n" for lines in found] or ["Not measured yet.\n"]
    return "\n".join(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", action="store_true")
    results = load()
    if parser.parse_args().plot:
        report_kernel.plot(results["kernel"])
    PAGE.write_text(page(results), encoding="utf-8")
    README.write_text(with_table("speed", report_kernel.speeds(results)), encoding="utf-8")
