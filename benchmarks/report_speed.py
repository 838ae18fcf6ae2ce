"""Write docs/performance.md, and the README's table of speed.

They are made of what `eigenattn benchmark ... --results benchmarks/results` measured.

python benchmarks/report_speed.py
"""

from __future__ import annotations

import json
from pathlib import Path

from readme import README, with_table

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
# What the kernels are built to reach: time against the best at full rank, with a window of 32 tokens.
# (heads shaped as, batch, tokens, positions, latents) -> (bytes, aim)
AIMS = {
    ("llama-3-8b", 16, 8192, "rotary", "(64, 96)"): (0.625, 0.70),
    ("llama-3-8b", 16, 8192, "rotary", "(64, 64)"): (0.50, 0.58),
    ("llama-3-8b", 16, 8192, "rotary", "(80, 80)"): (0.625, 0.75),
    ("llama-3-8b", 16, 8192, "none", "(80, 80)"): (0.625, 0.66),
    ("llama-3-8b", 16, 8192, "rotary", "2.5 bits"): (0.156, 0.45),
    ("llama-3-8b", 16, 8192, "none", "2.5 bits"): (0.156, 0.25),
    ("llama-3-8b", 1, 131072, "rotary", "(80, 80)"): (0.625, 0.79),
    ("llama-3-8b", 1, 131072, "none", "(80, 80)"): (0.625, 0.69),
}
# Latents of one step that the README shows.
README_LATENTS = {"(40, 40)": "latents of rank 40", "(80, 80)": "latents of rank 80", "2.5 bits": "codes of 2.5 bits"}
STEP_AIM = 0.85  # of the time of a whole step of Llama 3 8B, at a KV ratio of 0.6
AIMS_INTRODUCTION = """\
## What the fused kernel is built for

Time of one step of attention in bf16, over that of the best at full rank in the same run. The last row is a whole step
of decoding, each with the fastest kind of cache.
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
read: latents, and the exact window; their share of the bandwidth of copying says how far a kernel is from the floor.
(On a CPU, what fits in its caches can be read faster than memory is copied.)
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
    rows += [f"| {each['cache']} | failed: {each['reason']} | | |" for each in result.get("failed", [])]
    command = (
        f"    eigenattn benchmark decode {models(result)} --dtype {result['dtype']} "
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
    if result.get("bits"):
        options += f" --bits {result['bits']:g}"
    shared = [f"1-{result['shared_values']}"] if result.get("shared_values", 1) > 1 else []
    shared += ["1kv"] if result.get("joint") else []
    options += "".join(f" --share {each}" for each in result.get("share", shared))
    command = f"    eigenattn benchmark kernel {options} \\\n        --dtype {result['shape']['dtype']} --rounds "
    command += (
        f"{result['rounds']}{''.join(f' --ranks {k},{v}' for k, v in result['ranks'])} --results benchmarks/results"
    )
    return [about[0].upper() + about[1:], "", heading, "| --- | --- | --- | --- |", *rows, "", command]


def speeds(results: dict[str, list[dict]]) -> list[str]:
    """The README's table: one step of attention on a CPU, of the latents that are named there."""
    lines = ["| heads | cache | bytes | speed, rotary positions | without |", "| --- | --- | --- | --- | --- |"]
    for result in results.get("kernel", []):
        rows, shape = {row["name"]: row for row in result["rows"]}, result["shape"]
        for latents, title in README_LATENTS.items():
            rotary, none = (rows.get(f"native, {positions}, {latents}") for positions in ("rotary", "none"))
            if rotary and none:
                share = rotary["bytes"] / rows["sdpa"]["bytes"]
                times = " | ".join(f"{row['speed_against_best']:.1f} times" for row in (rotary, none))
                heads = f"{shape['kv_heads']} x {shape['heads'] // shape['kv_heads']} of {shape['head_dim']}"
                lines.append(f"| {heads} | {title} | {share:.2f} | {times} |")
    return lines


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


def aims(results: dict[str, list[dict]]) -> list[str]:
    """What is to be reached beside what was measured, of the first GPU measured."""
    measured, devices = {}, set()
    for result in results["kernel"]:
        shape = result.get("model", "").split("-b")[0]
        for row in result["rows"]:
            kernel_name, _, rest = row["name"].partition(", ")
            if kernel_name == "triton":
                positions, _, latents = rest.partition(", ")
                key = (shape, result["shape"]["batch"], result["shape"]["length"], positions, latents)
                measured[key] = f"{1 / row['speed_against_best']:.2f}"
                devices.add(result["device"])
    rows = [
        f"| {positions}, {latents} | {batch} | {length:,} | {share:.3f} | {aim:.2f} "
        f"| {measured.get((shape, batch, length, positions, latents), 'not measured yet')} |"
        for (shape, batch, length, positions, latents), (share, aim) in AIMS.items()
    ]
    step = "not measured yet"
    for result in results["decode"]:
        if (
            result.get("shape") == "llama-3-8b"
            and result["batch"] == 16
            and result["length"] == 8192
            and result["rows"]
        ):
            best = (
                max(row[name] for row in result["rows"]) for name in ("baseline_tokens_per_second", "tokens_per_second")
            )
            baseline, ours = best
            step = f"{baseline / ours:.2f}"
    rows.append(f"| whole step of Llama 3 8B, KV ratio 0.6 | 16 | 8,192 | | {STEP_AIM:.2f} | {step} |")
    where = f"Measured on {', '.join(sorted(devices))}." if devices else "The fused kernel has not run on a GPU yet."
    heading = "| positions, latents | batch | tokens | bytes | aim | measured |"
    return [
        AIMS_INTRODUCTION,
        f"32 query heads, 8 KV heads of 128 dimensions. {where}",
        "",
        heading,
        "| --- " * 6 + "|",
        *rows,
    ]


SECTIONS = {"decode": decode, "prefill": prefill, "calibration": calibration, "kernel": kernel, "memory": memory}


def page(results: dict[str, list[dict]]) -> str:
    parts = [INTRODUCTION, "\n".join(aims(results)) + "\n"]
    for kind, introduction in KINDS.items():
        parts.append(introduction)
        parts += ["\n".join(SECTIONS[kind](result)) + "\n" for result in results[kind]] or ["Not measured yet.\n"]
    return "\n".join(parts)


if __name__ == "__main__":
    results = load()
    PAGE.write_text(page(results), encoding="utf-8")
    README.write_text(with_table("speed", speeds(results)), encoding="utf-8")
