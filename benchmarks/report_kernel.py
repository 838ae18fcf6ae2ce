"""What comes from `eigenattn benchmark kernel`: tables of docs/performance.md and of the README, and a plot.

`report_speed.py` writes them.
"""

from __future__ import annotations

from pathlib import Path

PLOT = Path(__file__).parents[1] / "docs" / "growth.png"
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
# Tokens of the step that is shown in full, and in the README.
USUAL_LENGTH = 4096
# Latents of one step that the README shows.
README_LATENTS = {"(80, 80)": "latents of rank 80", "2.5 bits": "codes of 2.5 bits"}
STEP_AIM = 0.85  # of the time of a whole step of Llama 3 8B, at a KV ratio of 0.6
AIMS_INTRODUCTION = """\
## What the fused kernel is built for

Time of one step of attention in bf16, over that of the best at full rank in the same run. The last row is a whole step
of decoding, each with the fastest kind of cache. The kernel is faster since: of 16 x 8,192 tokens, on the same GPU, in
the order of the table 1.5 (rotary, rank 80), 0.85, 2.5 and 1.3, timed over ten steps in a CUDA graph, not by this
command ([decisions](decisions.md#the-fused-kernel-on-an-h200)).
"""


def measured_on(result: dict) -> str:
    versions = result["versions"]
    return f"Measured on {result['device']}, torch {versions['torch']}, transformers {versions['transformers']}."


def kernel(result: dict) -> list[str]:
    shape = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in result["shape"].items())
    about = f"{shape}; copying at {result['copy_bandwidth'] / 1e9:.0f} GB/s. {measured_on(result)}"
    rows = [
        f"| {row['name']} | {row['seconds'] * 1e3:.3f} | {row['bandwidth_share']:.0%} | {row['arithmetic_share']:.0%} "
        f"| {row['speed_against_best']:.2f} |"
        for row in result["rows"]
    ]
    heading = "| kernel, positions, (R_k, R_v) | ms | of copy bandwidth | of peak arithmetic "
    heading += "| speed against the best at full rank |"
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
    return [about[0].upper() + about[1:], "", heading, "| --- " * 5 + "|", *rows, "", command]


def of_one_shape(results: list[dict]) -> list[list[dict]]:
    """Results that differ in batch and length alone, by both."""
    found: dict[tuple, list[dict]] = {}
    for result in results:
        same = {name: value for name, value in result["shape"].items() if name not in ("batch", "length")}
        found.setdefault((result["device"], *same.values()), []).append(result)
    return [sorted(group, key=_size) for group in found.values()]


def kernels(results: list[dict]) -> list[list[str]]:
    """One step of each shape of heads, and how that grows."""
    found = []
    for group in of_one_shape(results):
        found.append(kernel(min(group, key=lambda each: (each["shape"]["length"] < USUAL_LENGTH, *_size(each)))))
        if len(group) > 1:
            found.append(growth(group))
    return found


def _size(result: dict) -> tuple[int, int]:
    return result["shape"]["batch"], result["shape"]["length"]


def _heads(shape: dict) -> str:
    return f"{shape['kv_heads']} x {shape['heads'] // shape['kv_heads']}"


def _fastest(group: list[dict]) -> list[str]:
    """Rows that all results of a group have, of the kernel that is made for the machine."""
    common = [row["name"] for row in group[0]["rows"]]
    for result in group:
        common = [name for name in common if name in {row["name"] for row in result["rows"]}]
    return [name for name in common if name.startswith(("native", "triton"))]


def growth(group: list[dict]) -> list[str]:
    """Speed against the best at full rank, by tokens and batch."""
    names = _fastest(group)
    lines = [
        "How that grows with tokens and with the batch: speed against the best at full rank.",
        "",
        f"| batch | tokens | ms at full rank | {' | '.join(names)} |",
        "| --- " * (3 + len(names)) + "|",
    ]
    for result in group:
        rows = {row["name"]: row for row in result["rows"]}
        best = rows[result["best_baseline"]]["seconds"] * 1e3
        ratios = " | ".join(f"{rows[name]['speed_against_best']:.2f}" for name in names)
        batch, length = _size(result)
        lines.append(f"| {batch} | {length:,} | {best:.2f} | {ratios} |")
    return lines


def plot(results: list[dict]) -> None:
    """Milliseconds of a step by tokens, at batch 1, a panel a shape that was measured at several lengths."""
    from matplotlib import pyplot

    groups = [[each for each in group if each["shape"]["batch"] == 1] for group in of_one_shape(results)]
    groups = [group for group in groups if len(group) > 1]
    if not groups:
        return
    figure, panels = pyplot.subplots(1, len(groups), figsize=(7 * len(groups), 5), layout="constrained", squeeze=False)
    for panel, group in zip(panels[0], groups, strict=True):
        x = [each["shape"]["length"] for each in group]
        seconds = [{row["name"]: row["seconds"] for row in each["rows"]} for each in group]
        full = [1e3 * of[each["best_baseline"]] for of, each in zip(seconds, group, strict=True)]
        panel.plot(x, full, "--", label="full rank", marker="o", markersize=4)
        for name in _fastest(group):
            panel.plot(x, [1e3 * of[name] for of in seconds], label=name, marker="o", markersize=4)
        shape = group[0]["shape"]
        title = f"{_heads(shape)} heads of {shape['head_dim']}, {shape['dtype']}"
        panel.set(title=title, xlabel="tokens", xscale="log", yscale="log")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    panels[0][0].set_ylabel("milliseconds a step")
    figure.savefig(PLOT, dpi=110)


def speeds(results: dict[str, list[dict]]) -> list[str]:
    """The README's table: one step of attention on a CPU, at the usual number of tokens and at the most measured."""
    lines = ["| heads | tokens | cache | bytes | speed, rotary positions | without |", "| --- " * 6 + "|"]
    found = results.get("kernel", [])
    longest = max((each["shape"]["length"] for each in found), default=0)
    for group in of_one_shape(found):
        for result in group:
            rows, shape = {row["name"]: row for row in result["rows"]}, result["shape"]
            if _size(result) not in ((1, USUAL_LENGTH), (1, longest)):
                continue
            for latents, title in README_LATENTS.items():
                rotary, none = (rows.get(f"native, {positions}, {latents}") for positions in ("rotary", "none"))
                if rotary and none:
                    share = rotary["bytes"] / rows["sdpa"]["bytes"]
                    times = " | ".join(f"{row['speed_against_best']:.1f} times" for row in (rotary, none))
                    heads = f"{_heads(shape)} of {shape['head_dim']}, {shape['dtype']}"
                    lines.append(f"| {heads} | {shape['length']:,} | {title} | {share:.2f} | {times} |")
    return lines


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
