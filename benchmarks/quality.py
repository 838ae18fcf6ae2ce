"""Perplexity and copying against the KV ratio, for every basis, rank rule and window, on one model.

Statistics are collected once for each basis and window and shared by all ratios. Results are written after every cell,
and a run goes on where an earlier one stopped.

    python benchmarks/quality.py smollm2 --calibration cal.txt --evaluation eval.txt \\
        --out benchmarks/results/quality-smollm2.json \\
        --cells attention/sensitivity/32 eigen/error_budget/0 --ratios 0.75 0.6 0.5 0.4
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from pathlib import Path

import torch

from eigenattn import EigenAttentionConfig
from eigenattn.calibration.statistics import Batch, collect_moments
from eigenattn.calibration.text import load_text, sample_windows, tokenize
from eigenattn.compression.bases import BASES
from eigenattn.compression.folding import attach, detach
from eigenattn.compression.measure import Measurement
from eigenattn.compression.pipeline import COST_TOKENS
from eigenattn.compression.ranks import RANK_RULES, RankProblem
from eigenattn.evaluation.perplexity import perplexity, windows_of
from eigenattn.models.conversion import convert_attention, eigen_layers
from eigenattn.models.loading import Source, load_model, load_tokenizer
from eigenattn.progress import TokenProgress
from eigenattn.version import versions


@torch.no_grad()
def copying(model, windows: torch.Tensor) -> float:
    """Top-1 accuracy on the second copy of half windows, repeated; the first 16 tokens of a copy are not judged."""
    hits = total = 0
    for window in windows:
        half = window[: len(window) // 2]
        ids = torch.cat([half, half]).unsqueeze(0)
        start = len(half) + 16
        guesses = model(ids, use_cache=False, logits_to_keep=len(half) - 15).logits[0, :-1].argmax(-1)
        hits += int((guesses == ids[0, start:]).sum())
        total += len(guesses)
    return hits / total


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
        help="basis/ranks/window, or basis:N/ranks/window where N heads share a latent",
    )
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.75, 0.6, 0.5, 0.4])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--evaluation-windows", type=int, default=48)
    parser.add_argument("--copy-windows", type=int, default=8)
    parser.add_argument("--rank-multiple", type=int, default=8)
    parser.add_argument("--cost-tokens", type=int, default=COST_TOKENS, help="tokens that rank rules measure on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    source = Source.of(args.model)
    model, tokenizer = load_model(source, "float32"), load_tokenizer(source)
    calibration = sample_windows(tokenize(tokenizer, load_text(args.calibration)), args.samples, args.length, args.seed)
    held_out = tokenize(tokenizer, load_text(args.evaluation, "evaluation"))
    windows = windows_of(held_out, args.evaluation_windows * args.length, args.length)
    batches = [Batch(window) for window in calibration.split(1)]
    convert_attention(model)
    layers = eigen_layers(model)
    bars = TokenProgress(True)

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
        beside = args.out.with_suffix(".partial")
        beside.write_text(json.dumps(results, indent=1) + "\n")
        beside.replace(args.out)

    if "baseline" not in results:
        base = perplexity(model, windows)
        results["baseline"] = {
            "perplexity": base.value,
            "copying": copying(model, windows[: args.copy_windows]),
            "window_nll": base.window_nll,
        }
        save()
    baseline = results["baseline"]
    print(f"baseline {baseline['perplexity']:.3f}, copying {baseline['copying']:.4f}", flush=True)

    made: dict[tuple[str, int, int], list] = {}
    for cell in args.cells:
        kind, rule, window_text = cell.split("/")
        basis, _, shared_text = kind.partition(":")
        window, shared = int(window_text), int(shared_text or 1)
        for ratio in args.ratios:
            key = f"{cell}/{args.rank_multiple}/{ratio}"
            if key in results["cells"]:
                continue
            start = time.perf_counter()
            wanted = (basis, window, shared)
            if wanted not in made:
                method = BASES[basis]
                moments = collect_moments(model, layers, batches, lambda a, m=method, w=wanted: m.moments(a, *w[1:]))
                made[wanted] = [method.build(sums) for sums in moments]
                print(f"statistics for {kind}, window {window}: {time.perf_counter() - start:.0f} s", flush=True)
            bases = made[wanted]
            start = time.perf_counter()
            config = EigenAttentionConfig(kv_ratio=ratio, ranks=rule, rank_multiple=args.rank_multiple, window=window)
            count = math.ceil(args.cost_tokens / args.length)
            costs = Measurement(model, layers, bases, window, batches[:count], bars)
            spectra = [[each.spectrum for each in side] for side in zip(*bases, strict=True)]
            problem = RankProblem(spectra[0], spectra[1], config, costs)
            ranks = RANK_RULES[rule](problem)
            seconds = time.perf_counter() - start
            for attention, (keys, values), (rank_k, rank_v) in zip(layers, bases, ranks, strict=True):
                attach(attention, keys.truncate(rank_k), values.truncate(rank_v), window, shared)
            result = perplexity(model, windows)
            differences = torch.tensor(result.window_nll) - torch.tensor(baseline["window_nll"])
            results["cells"][key] = {
                "kv_ratio": problem.ratio(ranks),
                "perplexity": result.value,
                "relative_increase": result.value / baseline["perplexity"] - 1,
                "standard_error": float(differences.std() / len(differences) ** 0.5),
                "copying": copying(model, windows[: args.copy_windows]),
                "ranks": ranks,
                "rank_seconds": seconds,
            }
            for attention in layers:
                detach(attention)
            save()
            found = results["cells"][key]
            print(
                f"{key}: {found['relative_increase']:+.2%} +- {found['standard_error']:.2%}, copying "
                f"{found['copying']:.4f}, ratio {found['kv_ratio']:.4f}, ranks in {seconds:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
