"""Perplexity and copying against the KV ratio, for every basis, rank rule and window, on one model.

`eigenattn sweep` measures costs once for all ratios; here each cell is measured by itself, as by `eigenattn compress`.
Results are written after every cell, and a run goes on where an earlier one stopped.

    python benchmarks/quality.py smollm2 --calibration cal.txt --evaluation eval.txt \\
        --out benchmarks/results/quality-smollm2.json \\
        --cells attention/sensitivity/32 eigen/error_budget/0 --ratios 0.75 0.6 0.5 0.4
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from eigenattn.calibration.statistics import Batch
from eigenattn.calibration.text import load_text, sample_windows, tokenize
from eigenattn.evaluation.grid import Cell, Grid
from eigenattn.evaluation.paired import difference, exponential, mean
from eigenattn.evaluation.reading import read, windows_of
from eigenattn.evaluation.retrieval import copying
from eigenattn.evaluation.sweep import SweepModel, sizes
from eigenattn.files import whole
from eigenattn.models.loading import Source, load_model, load_tokenizer
from eigenattn.progress import TokenProgress
from eigenattn.version import versions


def judge(model: nn.Module, windows: Tensor, copies: int) -> dict[str, Any]:
    found = read(model, windows)
    return {
        "perplexity": found.perplexity.value,
        "copying": mean(copying(model, windows[:copies])).value,
        "window_nll": found.nll,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--cells",
        nargs="+",
        required=True,
        help="such as attention/sensitivity/32: basis, rank rule and window; attention:3kv where latents are shared "
        "(3, 1-3 or 3kv), attention~0.3 with shrinkage, attention+refit with decoders refitted",
    )
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.75, 0.6, 0.5, 0.4])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--evaluation-windows", type=int, default=48)
    parser.add_argument("--copy-windows", type=int, default=8)
    parser.add_argument("--rank-multiple", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    source = Source.of(args.model)
    model, tokenizer = load_model(source, "float32"), load_tokenizer(source)
    calibration = sample_windows(tokenize(tokenizer, load_text(args.calibration)), args.samples, args.length, args.seed)
    held_out = tokenize(tokenizer, load_text(args.evaluation, "evaluation"))
    windows = windows_of(held_out, args.evaluation_windows * args.length, args.length)

    results = json.loads(args.out.read_text()) if args.out.exists() else {"cells": {}}
    results |= {
        "model": Path(args.model).name,
        "calibration": f"{args.samples} x {args.length} tokens of {load_text(args.calibration).source}",
        "evaluation": f"{len(windows)} x {args.length} tokens of {load_text(args.evaluation).source}",
        "versions": versions(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "dtype": "float32",
    }

    def save() -> None:
        with whole(args.out) as beside:
            beside.write_text(json.dumps(results, indent=1) + "\n")

    if "baseline" not in results:
        results["baseline"] = judge(model, windows, args.copy_windows)
        save()
    baseline = results["baseline"]
    print(f"baseline {baseline['perplexity']:.3f}, copying {baseline['copying']:.4f}", flush=True)

    cells = [Cell.of(name, ratio, args.rank_multiple) for name in args.cells for ratio in args.ratios]
    grid = Grid(args.ratios, rank_multiple=args.rank_multiple)
    subject = SweepModel(
        model, [Batch(window) for window in calibration.split(1)], grid, TokenProgress(True), share_costs=False
    )
    for cell in cells:
        key = f"{cell.method}/{args.rank_multiple}/{cell.kv_ratio}"
        if key in results["cells"]:
            continue
        before = subject.clock.seconds.get("ranks", 0.0)
        subject.compress(cell, {})
        found = judge(model, windows, args.copy_windows)
        nll = found.pop("window_nll")
        results["cells"][key] = found | {
            "kv_ratio": sizes(subject.layouts, args.length)["kv_ratio"],
            "relative_increase": exponential(difference(nll, baseline["window_nll"])).value - 1,
            "standard_error": difference(nll, baseline["window_nll"]).error,
            "ranks": [[latent.rank for latent in layout.latents] for layout in subject.layouts],
            "rank_seconds": subject.clock.seconds["ranks"] - before,
        }
        subject.restore()
        save()
        found = results["cells"][key]
        print(
            f"{key}: {found['relative_increase']:+.2%} +- {found['standard_error']:.2%}, copying "
            f"{found['copying']:.4f}, ratio {found['kv_ratio']:.4f}, ranks in {found['rank_seconds']:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
