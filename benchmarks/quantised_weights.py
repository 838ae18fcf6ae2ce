"""Weights and caches of few bits at once: bytes, perplexity and divergence of models whose weights are quantised.

    python benchmarks/quantised_weights.py MODEL TEXT CALIBRATION --weights 16 8 4

Each model is loaded as its weights are asked for (bitsandbytes; 16 is as it is stored), measured, compressed to a
quarter of its cache on one text, and measured on another, against the original with 16-bit weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from eigenattn import EigenAttentionConfig, compress
from eigenattn.cache.size import baseline_bytes_per_token, bytes_per_token
from eigenattn.models.conversion import layouts_of


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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("calibration")
    parser.add_argument("--weights", type=int, nargs="+", default=[16, 8, 4])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--kv-ratio", type=float, default=0.25)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def windows(path: str, count: int) -> torch.Tensor:
        ids = tokenizer(Path(path).read_text(encoding="utf-8")[:1_000_000], return_tensors="pt")["input_ids"][0]
        step = (len(ids) - options.length) // count
        return torch.stack([ids[n * step : n * step + options.length] for n in range(count)])

    held_out, calibration = windows(options.text, options.windows), windows(options.calibration, options.samples)
    exact = predictions(loaded(options.model, 16), held_out)
    for bits in options.weights:
        model = loaded(options.model, bits)
        row = {"weights": bits, "weight_bytes": weight_bytes(model)}
        print(json.dumps(row | measured(predictions(model, held_out), exact, held_out)), flush=True)
        compress(model, calibration.split(1), EigenAttentionConfig(kv_ratio=options.kv_ratio))
        layouts = layouts_of(model)
        sizes = {
            "weight_bytes": weight_bytes(model),
            "cache_bytes_per_token": bytes_per_token(layouts, 2),
            "original_cache_bytes_per_token": baseline_bytes_per_token(layouts, 2),
        }
        print(json.dumps(row | sizes | measured(predictions(model, held_out), exact, held_out)), flush=True)


if __name__ == "__main__":
    main()
