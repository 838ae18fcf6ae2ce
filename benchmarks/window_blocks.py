"""Seconds of a forward pass over 1,024 tokens of SmolLM2: plain, through latents, and with the window in query blocks.

python benchmarks/window_blocks.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

from eigenattn.calibration.statistics import Batch, LayerMoments, collect_moments, forward_hidden
from eigenattn.calibration.text import load_text, sample_windows, tokenize
from eigenattn.compression.bases import eigen
from eigenattn.compression.folding import attach
from eigenattn.kernels import blocks
from eigenattn.models.conversion import convert_attention, eigen_layers
from eigenattn.models.loading import Source, load_model, load_tokenizer
from eigenattn.version import versions

RANK, WINDOW, RUNS = 40, 32, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    source = Source.of("smollm2")
    model, tokenizer = load_model(source, "float32", "cpu"), load_tokenizer(source)
    first, second = (
        Batch(window) for window in sample_windows(tokenize(tokenizer, load_text("python-docs")), 2, 1024, 0).split(1)
    )
    convert_attention(model)
    layers = eigen_layers(model)

    def seconds() -> float:
        forward_hidden(model, first)
        times = []
        for _ in range(RUNS):
            start = time.perf_counter()
            forward_hidden(model, second)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    found = {"plain": seconds()}
    bases = [eigen(moments) for moments in collect_moments(model, layers, [first], LayerMoments.of)]
    for window in (0, WINDOW):
        for attention, of_layer in zip(layers, bases, strict=True):
            attach(attention, [basis.truncate(RANK) for basis in of_layer], window)
        if not window:
            found["latents, no window"] = seconds()
    for block in (64, 128, 256, 512, 1024):
        blocks.QUERY_BLOCK = block
        found[f"window, blocks of {block}"] = seconds()
    for name, value in found.items():
        print(f"{name}: {value:.3f} s, {value / found['plain']:.2f} of plain")
    if args.json:
        machine = f"{platform.machine()}, {os.cpu_count()} cores"
        args.json.write_text(
            json.dumps({"seconds": found, "machine": machine, "versions": versions()}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
