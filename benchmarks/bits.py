"""Perplexity and copying against bits an element: quantised latents, and plain quantisation, on one model.

The rival quantises keys and values themselves: keys per channel in groups of tokens, values per token in groups of
channels, with a scale and a zero of 16 bits a group, counted. So does KIVI (arXiv 2402.02750); keys are taken before
rotation, which suits them better, as in KVQuant (arXiv 2401.18079). Both keep the same window of exact tokens. Bits are
those outside the window.

Statistics are collected once and shared by all cells. Results are written after every cell, and a run goes on where an
earlier one stopped.

    python benchmarks/bits.py smollm2 --calibration cal.txt --evaluation eval.txt \\
        --out benchmarks/results/bits-smollm2.json
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
from quality import copying
from torch import Tensor

from eigenattn import EigenAttentionConfig
from eigenattn.cache.size import kv_ratio, ratio_at
from eigenattn.calibration.statistics import Batch, collect_moments
from eigenattn.calibration.text import load_text, sample_windows, tokenize
from eigenattn.compression.bases import BASES
from eigenattn.compression.folding import attach, detach
from eigenattn.compression.measure import Measurement
from eigenattn.compression.pipeline import COST_TOKENS
from eigenattn.compression.quantise import GROUP, equivalent_ratio, fit_quantisers, quantise_bases
from eigenattn.compression.ranks import RankProblem, sensitivities
from eigenattn.evaluation.perplexity import perplexity, windows_of
from eigenattn.models.checkpoint import layer_entry
from eigenattn.models.conversion import convert_attention, eigen_layers
from eigenattn.models.loading import Source, load_model, load_tokenizer
from eigenattn.progress import TokenProgress
from eigenattn.version import versions

SCALE_AND_ZERO = 32  # bits a group


def rounded_in_groups(x: Tensor, bits: int, group: int) -> Tensor:
    """Vectors [..., n] quantised uniformly from the least to the greatest of each group along the last dimension."""
    pieces = []
    for piece in x.split(group, dim=-1):
        low, high = piece.amin(-1, keepdim=True).half().to(x.dtype), piece.amax(-1, keepdim=True)
        step = ((high - low) / (2**bits - 1)).half().to(x.dtype).clamp_min(1e-7)
        pieces.append(low + ((piece - low) / step).round().clamp(0, 2**bits - 1) * step)
    return torch.cat(pieces, dim=-1) if pieces else x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", nargs="+", type=float, default=[4.5, 3.5, 2.5, 2.0, 1.5, 1.0])
    parser.add_argument("--plain-bits", nargs="+", type=int, default=[4, 3, 2], help="of the rival's codes alone")
    parser.add_argument("--group", type=int, default=64, help="elements that share the rival's scale and zero")
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--evaluation-windows", type=int, default=48)
    parser.add_argument("--copy-windows", type=int, default=8)
    parser.add_argument("--group-channels", type=int, default=GROUP, help="channels of a latent that share a width")
    parser.add_argument("--cost-tokens", type=int, default=COST_TOKENS, help="tokens sensitivities are measured on")
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

    results = json.loads(args.out.read_text()) if args.out.exists() else {"cells": {}}
    results |= {
        "model": Path(args.model).name,
        "calibration": f"{args.samples} x {args.length} tokens of {load_text(args.calibration).source}",
        "evaluation": f"{len(windows)} x {args.length} tokens of {load_text(args.evaluation).source}",
        "versions": versions(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "dtype": "float32",
        "window": args.window,
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

    def record(key: str, facts: dict) -> None:
        """Judge the model as it is now."""
        result = perplexity(model, windows)
        differences = torch.tensor(result.window_nll) - torch.tensor(baseline["window_nll"])
        found = results["cells"][key] = {
            **facts,
            "perplexity": result.value,
            "relative_increase": result.value / baseline["perplexity"] - 1,
            "standard_error": float(differences.std() / len(differences) ** 0.5),
            "copying": copying(model, windows[: args.copy_windows]),
        }
        save()
        print(
            f"{key}: {found['relative_increase']:+.3%} +- {found['standard_error']:.3%}, copying "
            f"{found['copying']:.4f}, {found['bits']:.3f} bits",
            flush=True,
        )

    for bits in args.plain_bits:
        size_v = min(args.group, layers[0].head_dim)
        key = f"plain/{args.window}/{args.group}/{bits}"
        if key in results["cells"]:
            continue

        def rounded(keys: Tensor, values: Tensor, bits: int = bits, size_v: int = size_v) -> tuple[Tensor, Tensor]:
            by_channel = rounded_in_groups(keys.transpose(-1, -2), bits, args.group)
            return by_channel.transpose(-1, -2), rounded_in_groups(values, bits, size_v)

        for attention in layers:
            attach(attention, None, None, args.window)
            attention.rounded = rounded
        record(key, {"bits": bits + (SCALE_AND_ZERO / args.group + SCALE_AND_ZERO / size_v) / 2})
        for attention in layers:
            del attention.rounded
            detach(attention)

    cells = {bits: f"latents/{args.window}/{args.group_channels}/{bits}" for bits in args.bits}
    missing = [bits for bits, key in cells.items() if key not in results["cells"]]
    if not missing:
        return
    start = time.perf_counter()
    method = BASES["attention"]
    moments = collect_moments(model, layers, batches, lambda attention: method.moments(attention, args.window))
    bases = [method.build(sums) for sums in moments]
    print(f"statistics: {time.perf_counter() - start:.0f} s", flush=True)
    start = time.perf_counter()
    fitted = fit_quantisers(model, layers, bases, batches, args.window)
    print(f"quantisers: {time.perf_counter() - start:.0f} s", flush=True)
    costs = Measurement(
        model, layers, bases, args.window, batches[: math.ceil(args.cost_tokens / args.length)], TokenProgress(True)
    )
    spectra = [[basis.spectrum for basis in side] for side in zip(*bases, strict=True)]
    for bits in missing:
        start = time.perf_counter()
        near = EigenAttentionConfig(kv_ratio=equivalent_ratio(bits), window=args.window)
        weights = sensitivities(RankProblem(spectra[0], spectra[1], near, costs))
        chosen = quantise_bases(layers, bases, fitted, weights, bits, args.group_channels)
        seconds = time.perf_counter() - start
        for attention, pair in zip(layers, chosen, strict=True):
            attach(attention, *pair, args.window)
        facts = {
            "bits": 16 * kv_ratio(layers),
            "ratio_at": ratio_at(layers, args.window),
            "layers": [layer_entry(attention) for attention in layers],
            "weights": weights,
            "seconds": seconds,
        }
        record(cells[bits], facts)
        for attention in layers:
            detach(attention)


if __name__ == "__main__":
    main()
