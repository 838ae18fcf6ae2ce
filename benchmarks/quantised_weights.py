"""Weights and caches of few bits at once: bytes, perplexity and divergence of models whose weights are quantised.

    python benchmarks/quantised_weights.py MODEL TEXT CALIBRATION --out benchmarks/results/weights-MODEL.json

Each model is loaded as its weights are asked for (bitsandbytes; 16 is as it is stored), measured, compressed to a
quarter of its cache on one text, and measured on another, against the original with 16-bit weights. Results are
written after every row, and a run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from eigenattn import EigenAttentionConfig, compress
from eigenattn.cache.size import baseline_bytes_per_token, bytes_per_token
from eigenattn.files import whole
from eigenattn.models.conversion import layouts_of
from eigenattn.version import versions


def loaded(name: str, bits: int):
    settings = None
    if bits < 16:
        settings = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, bnb_4bit_quant_type="nf4")
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, quantization_config=settings).eval()


@torch.no_grad()
def predictions(model, windows) -> list[torch.Tensor]:
    return [model(each[None]).logits[0].float().log_softmax(-1).half() for each in windows]


def measured(found, exact, windows) -> dict[str, float]:
    """Perplexity, and divergence from the exact predictions in nats a token."""
    losses, divergences = [], []
    for own, reference, ids in zip(found, exact, windows, strict=True):
        own, reference = own.float(), reference.float()
        losses.append(-own[:-1].gather(1, ids[1:, None]).mean())
        divergences.append((reference.exp() * (reference - own)).sum(-1).mean())
    return {"perplexity": torch.stack(losses).mean().exp().item(), "divergence": torch.stack(divergences).mean().item()}


def weight_bytes(model) -> int:
    tensors = {id(each): each for each in [*model.parameters(), *model.buffers()]}
    return sum(each.numel() * each.element_size() for each in tensors.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", type=int, nargs="+", default=[16, 8, 4])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--kv-ratio", type=float, default=0.25)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def windows(path: Path, count: int) -> torch.Tensor:
        ids = tokenizer(path.read_text(encoding="utf-8")[:1_000_000], return_tensors="pt")["input_ids"][0]
        step = (len(ids) - args.length) // count
        return torch.stack([ids[n * step : n * step + args.length] for n in range(count)])

    held_out, calibration = windows(args.text, args.windows), windows(args.calibration, args.samples)
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"rows": {}}
    results |= {
        "model": Path(args.model).name,
        "calibration": f"{args.samples} x {args.length} tokens of {args.calibration.name}",
        "evaluation": f"{args.windows} x {args.length} tokens of {args.text.name}",
        "versions": versions(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "dtype": "bfloat16",
    }

    def keep(name: str, row: dict[str, Any]) -> None:
        results["rows"][name] = row
        with whole(args.out) as beside:
            beside.write_text(json.dumps(results, indent=1) + "\n")
        print(name, json.dumps(row), flush=True)

    exact = predictions(loaded(args.model, 16), held_out)
    for bits in args.weights:
        alone, both = f"{bits} bits", f"{bits} bits, {args.kv_ratio:g} of the cache"
        if both in results["rows"]:
            continue
        model = loaded(args.model, bits)
        weights = {"weights": bits, "weight_bytes": weight_bytes(model)}
        keep(alone, weights | measured(predictions(model, held_out), exact, held_out))
        compress(model, calibration.split(1), EigenAttentionConfig(kv_ratio=args.kv_ratio))
        layouts = layouts_of(model)
        sizes = {
            "weight_bytes": weight_bytes(model),
            "cache_bytes_per_token": bytes_per_token(layouts, 2),
            "original_cache_bytes_per_token": baseline_bytes_per_token(layouts, 2),
        }
        keep(both, weights | sizes | measured(predictions(model, held_out), exact, held_out))


if __name__ == "__main__":
    main()
