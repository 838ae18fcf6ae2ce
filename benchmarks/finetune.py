"""How much of a compressed model's perplexity increase some minutes of distillation win back.

The model is compressed, measured on held-out text, distilled from the original for about the given time, and measured
again. Killed, it goes on where it stopped.

    python benchmarks/finetune.py smollm2 --calibration cal.txt --evaluation eval.txt --minutes 30 \\
        --kv-ratio 0.5 --out benchmarks/results/finetune-smollm2.json --work scratch
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path

import torch

from eigenattn import EigenAttentionConfig
from eigenattn.calibration.text import load_text, tokenize
from eigenattn.evaluation.reading import read, windows_of
from eigenattn.finetuning import FinetuneConfig, finetune
from eigenattn.models.loading import Source, load_model, load_tokenizer
from eigenattn.version import versions
from eigenattn.workflows.calibrate import CalibrationText
from eigenattn.workflows.compress import compress_checkpoint
from eigenattn.workflows.finetune import finetune_checkpoint, split_windows

VALIDATION_WINDOWS = 4
VALIDATIONS = 2
TIMED_STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="text to calibrate and to train on")
    parser.add_argument("--evaluation", required=True, help="held-out text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints, kept between runs")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--kv-ratio", type=float, default=0.5)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--training-length", type=int, help="of windows trained on; by default --length")
    parser.add_argument("--training-dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--map-learning-rate", type=float, default=FinetuneConfig.map_learning_rate)
    parser.add_argument("--learning-rate", type=float, default=FinetuneConfig.learning_rate)
    parser.add_argument("--evaluation-windows", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    length, dtype = args.training_length or args.length, args.training_dtype

    args.work.mkdir(parents=True, exist_ok=True)
    stem = f"{Path(args.model).name}-{args.kv_ratio}-w{args.window}"
    compressed = args.work / stem
    tuned = args.work / f"{stem}-tuned-{args.minutes:g}m"
    if not compressed.exists():
        compress_checkpoint(
            args.model,
            compressed,
            EigenAttentionConfig(kv_ratio=args.kv_ratio, window=args.window, coded=False),
            CalibrationText([args.calibration], args.samples, args.length, args.seed),
            dtype="float32",
            progress=True,
        )
    source, original = Source.of(str(compressed)), Source.of(args.model)
    tokenizer = load_tokenizer(source)
    held_out = tokenize(tokenizer, load_text(args.evaluation, "evaluation"))
    windows = windows_of(held_out, args.evaluation_windows * args.length, args.length)
    options = {
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "map_learning_rate": args.map_learning_rate,
        "seed": args.seed,
    }
    plan, trained = (args.work / f"{tuned.name}.{end}" for end in ("steps", "json"))
    if not plan.exists():
        training, validation = split_windows(tokenizer, [load_text(args.calibration)], length, VALIDATION_WINDOWS)
        trial = FinetuneConfig(steps=TIMED_STEPS, validate_every=TIMED_STEPS, **options)
        baseline = load_model(original, dtype)
        _, timed = finetune(load_model(source, dtype), training, validation[:1], trial, baseline=baseline)
        plan.write_text(str(max(VALIDATIONS, round(args.minutes * 60 * TIMED_STEPS / timed.seconds))))
        del baseline
    steps = int(plan.read_text())
    trained_on = f"{steps} steps of {args.batch_size} x {length} tokens"
    print(trained_on, flush=True)
    if not tuned.exists():
        config = FinetuneConfig(steps=steps, validate_every=max(1, steps // VALIDATIONS), **options)
        report = finetune_checkpoint(
            str(compressed),
            tuned,
            config,
            texts=[args.calibration],
            length=length,
            validation_windows=VALIDATION_WINDOWS,
            distil=args.model,
            dtype=dtype,
            progress=True,
        )
        trained.write_text(json.dumps(report.to_dict()))
    measured = {}
    for name, path in (("original", original), ("compressed", source), ("tuned", Source.of(str(tuned)))):
        measured[name] = read(load_model(path, "float32"), windows)
        print(f"{name}: {measured[name].perplexity.value:.4f}", flush=True)
    exact = torch.tensor(measured["original"].nll)
    perplexity = {name: each.perplexity.value for name, each in measured.items()}
    results = {
        "model": Path(args.model).name,
        "kv_ratio": args.kv_ratio,
        "window": args.window,
        "training": f"{trained_on} of {Path(args.calibration).name}",
        "training_dtype": dtype,
        # Unknown if this was killed between the checkpoint and its report.
        "training_seconds": json.loads(trained.read_text())["seconds"] if trained.exists() else None,
        "evaluation": f"{len(windows)} x {args.length} tokens of {Path(args.evaluation).name}",
        **options,
        "perplexity": perplexity,
        "relative_increase": {
            name: each / perplexity["original"] - 1 for name, each in perplexity.items() if name != "original"
        },
        "standard_error": {
            name: float((torch.tensor(each.nll) - exact).std() / len(windows) ** 0.5)
            for name, each in measured.items()
            if name != "original"
        },
        "versions": versions(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    before, after = (results["relative_increase"][name] for name in ("compressed", "tuned"))
    results["won_back"] = 1 - after / before
    beside = args.out.with_suffix(".partial")
    beside.write_text(json.dumps(results, indent=1) + "\n")
    beside.replace(args.out)
    print(f"{before:+.3%} before, {after:+.3%} after: {results['won_back']:.0%} of the increase won back")


if __name__ == "__main__":
    main()
