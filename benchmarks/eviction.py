"""Rank x bits x tokens: what a cache costs and still knows when latents are low in rank, quantised, and evicted.

The model is taken at full rank, at a KV ratio and at some bits an element, all with the same exact window, and each is
read with no eviction and with every rule at some shares of the prompt. A text's prompt is read at once, tokens are
evicted, and what follows is judged through what is left, in pieces of 16 tokens: perplexity of a continuation, copying
(half of a text, repeated; the first 15 tokens of the copy belong to the prompt) and needles in a haystack (the question
belongs to the prompt, but for its last token). Bytes are those of the whole cache after the prompt of the continuation,
window and stored positions included, of 16 bits an element.

Checkpoints are kept in the work folder; results are written after every cell, and a run goes on where it stopped.

    python benchmarks/eviction.py smollm2 --calibration cal.txt --evaluation eval.txt \\
        --out benchmarks/results/eviction-smollm2.json --work scratch
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

import torch

from eigenattn import EigenAttentionConfig
from eigenattn.cache.rules import EVICTION_RULES, Eviction
from eigenattn.cache.size import baseline_bytes_per_token, cache_bytes, kv_ratio
from eigenattn.calibration.text import load_text, tokenize
from eigenattn.compression.folding import attach
from eigenattn.evaluation.paired import difference, exponential, mean
from eigenattn.evaluation.reading import read, through_eviction, windows_of
from eigenattn.evaluation.retrieval import Needles, copying, find_needles
from eigenattn.models.conversion import convert_attention, eigen_layers, layouts_of
from eigenattn.models.loading import Source, load_model, load_tokenizer
from eigenattn.version import versions
from eigenattn.workflows.calibrate import CalibrationText
from eigenattn.workflows.compress import compress_checkpoint

PIECE = 16  # tokens of what follows the prompt that are read at a time; fewer than any rule takes for a prompt
HALF = 2  # bytes of an element


def table(results: dict) -> str:
    """The cells as Markdown."""
    rows = ["| latents | evicted by | cache, of the original | perplexity | copying | needles |", "|" + " --- |" * 6]
    for cell in results["cells"].values():
        error = "" if cell["standard_error"] is None else f" ± {cell['standard_error']:.2%}"
        kept = "nothing" if cell["evict"] is None else f"{cell['evict']}, {cell['budget']:.0%} kept"
        rows.append(
            f"| {cell['latents']} | {kept} | {cell['cache_ratio']:.3f} | {cell['relative_increase']:+.2%}{error} | "
            f"{cell['copying']:.1%} | {cell['needles']:.0%} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True, help="held-out text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints, kept between runs")
    parser.add_argument("--kv-ratio", type=float, default=0.5)
    parser.add_argument("--coded-kv-ratio", type=float, default=0.125)
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.5, 0.2], help="shares of the prompt")
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--calibration-length", type=int, default=1024)
    parser.add_argument("--length", type=int, default=2048, help="of windows, and of sequences that hide needles")
    parser.add_argument("--scored", type=int, default=256, help="tokens after the prompt that perplexity is taken of")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--copy-windows", type=int, default=4)
    parser.add_argument("--needle-trials", type=int, default=4, help="at each of five depths")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    source = Source.of(args.model)
    tokenizer = load_tokenizer(source)
    held_out = tokenize(tokenizer, load_text(args.evaluation, "evaluation"))
    windows = windows_of(held_out, args.windows * args.length, args.length)
    needles = Needles([args.length], trials=args.needle_trials, seed=args.seed)
    prompt = args.length - args.scored - 1
    results = json.loads(args.out.read_text()) if args.out.exists() else {"cells": {}}
    results |= {
        "model": Path(args.model).name,
        "calibration": f"{args.samples} x {args.calibration_length} tokens of {load_text(args.calibration).source}",
        "evaluation": f"{len(windows)} x {args.length} tokens of {load_text(args.evaluation).source}",
        "prompt": prompt,
        "scored": args.scored,
        "copying": f"{args.copy_windows} x {args.length} tokens",
        "needles": f"{5 * args.needle_trials} of {args.length} tokens",
        "window": args.window,
        "dtype": "float32",
        "versions": versions(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
    }

    def save() -> None:
        beside = args.out.with_suffix(".partial")
        beside.write_text(json.dumps(results, indent=1) + "\n")
        beside.replace(args.out)

    def compressed(config: EigenAttentionConfig, name: str) -> torch.nn.Module:
        folder = args.work / f"{Path(args.model).name}-{name}-w{args.window}"
        if not folder.exists():
            compress_checkpoint(
                args.model,
                folder,
                config,
                CalibrationText([args.calibration], args.samples, args.calibration_length, args.seed),
                dtype="float32",
                progress=True,
            )
        return load_model(Source.of(str(folder)), "float32")

    def at_full_rank() -> torch.nn.Module:
        model = load_model(source, "float32")
        convert_attention(model)
        for attention in eigen_layers(model):
            attach(attention, (), args.window)
        return model

    args.work.mkdir(parents=True, exist_ok=True)
    models = {
        "full rank": at_full_rank,
        f"KV ratio {args.kv_ratio:g}": lambda: compressed(
            EigenAttentionConfig(kv_ratio=args.kv_ratio, window=args.window, coded=False), f"r{args.kv_ratio:g}"
        ),
        f"{16 * args.coded_kv_ratio:g} bits": lambda: compressed(
            EigenAttentionConfig(coded=True, basis="attention", kv_ratio=args.coded_kv_ratio, window=args.window),
            f"c{args.coded_kv_ratio:g}",
        ),
    }
    evictions = [None, *(Eviction(rule, budget) for budget in args.budgets for rule in EVICTION_RULES)]
    first = None
    for latents, load in models.items():
        keys = {f"{latents}/{each.name}/{each.budget}" if each else f"{latents}/none": each for each in evictions}
        if all(key in results["cells"] for key in keys):
            continue
        model = load()
        layers = layouts_of(model)
        for key, eviction in keys.items():
            if key in results["cells"]:
                continue
            start = time.perf_counter()
            rule, budget = (eviction.name, eviction.budget) if eviction else (None, None)
            reader = through_eviction(rule, budget, PIECE)
            nll = read(model, windows, scored=args.scored, logits_of=reader).nll
            first = first or results["cells"].get("full rank/none", {}).get("window_nll") or nll
            increase = exponential(difference(nll, first))
            found = find_needles(model, tokenizer, held_out, needles, reader)
            size = cache_bytes(layers, HALF, prompt, eviction.kept(prompt) if eviction else None)
            results["cells"][key] = {
                "latents": latents,
                "evict": rule,
                "budget": budget,
                "kv_ratio": kv_ratio(layers),
                "cache_ratio": size / (prompt * baseline_bytes_per_token(layers, HALF)),
                "perplexity": exponential(mean(nll)).value,
                "relative_increase": increase.value - 1,
                "standard_error": increase.error,
                "copying": mean(copying(model, windows[: args.copy_windows], reader)).value,
                "needles": mean([hit for hits in found.values() for hit in hits]).value,
                "window_nll": nll,
                "seconds": time.perf_counter() - start,
            }
            save()
            print(table(results).splitlines()[-1], flush=True)
    print(f"\n{table(results)}")


if __name__ == "__main__":
    main()
