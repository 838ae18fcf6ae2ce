"""vLLM serves clients for minutes with latents in its cache: are tokens those of `generate`, and is all given back?

    python benchmarks/soak.py MODEL BASES --text FILE [--minutes N] [--clients N] [--json FILE]

Prefix caching and speculative decoding by ngrams are on, and the cache is too small for all clients at their longest.
Each client sends its next request when the last one is answered: a prefix that all share, and a part of the text that
one has alone. Greedy tokens are compared with those of `generate` with the same bases; where they part, it is said by
how much `generate` preferred its own: another batch rounds otherwise, and that may be enough for another code. Needs
vLLM (docs/serving.md).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections import Counter
from pathlib import Path
from typing import Any

SHARED, OWN = 256, 64  # tokens of a prompt that all have, and that it has alone


def expected(args: argparse.Namespace) -> tuple[list[list[int]], list[list[int]], list[list[float]]]:
    """Prompts, what `generate` makes of each alone, and by how much it preferred each token to the next likely one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from eigenattn import attach

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    attach(model, args.bases)
    ids = tokenizer(args.text.read_text(encoding="utf-8")[:1_000_000])["input_ids"]
    starts = [SHARED + n * OWN for n in range(args.clients)]
    prompts = [ids[:SHARED] + ids[start : start + OWN] for start in starts]
    answers, margins = [], []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=args.new_tokens,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        answers.append(out.sequences[0, len(prompt) :].tolist())
        margins.append([float(best - next_) for best, next_ in (each[0].topk(2).values for each in out.logits)])
    return prompts, answers, margins


def resident() -> int:
    """Bytes of memory that this process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def soak(args: argparse.Namespace) -> dict[str, Any]:
    prompts, answers, margins = expected(args)
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=args.model,
        additional_config={"eigenattn": str(args.bases)},
        dtype="float32",
        max_model_len=SHARED + OWN + args.new_tokens,
        max_num_seqs=args.clients,
        max_num_batched_tokens=args.batched_tokens,
        kv_cache_memory_bytes=int(args.cache_memory * 2**20),
        enable_prefix_caching=True,
        speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
        enforce_eager=args.eager,
        disable_log_stats=False,
    )
    engine = llm.llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=args.new_tokens, ignore_eos=True)
    counts: Counter[str] = Counter()
    parted: list[float] = []
    asked: dict[str, int] = {}
    memory: list[int] = []
    start = time.monotonic()

    def send(client: int, turn: int) -> None:
        """Each client goes through all prompts, beginning with one of its own."""
        name, which = f"{client}-{turn}", (client + turn) % len(prompts)
        asked[name] = which
        engine.add_request(name, {"prompt_token_ids": prompts[which]}, sampling)

    for client in range(args.clients):
        send(client, 0)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if not output.finished:
                continue
            which, given = asked.pop(output.request_id), list(output.outputs[0].token_ids)
            counts["requests"] += 1
            counts["tokens"] += len(given)
            counts["reused"] += output.num_cached_tokens
            if given == answers[which]:
                counts["equal"] += 1
            else:
                place = next(
                    (n for n, pair in enumerate(zip(given, answers[which], strict=False)) if pair[0] != pair[1]), None
                )
                parted.append(float("inf") if place is None else margins[which][place])
            memory.append(resident())
            if time.monotonic() - start < args.minutes * 60:
                client, turn = map(int, output.request_id.split("-"))
                send(client, turn + 1)
    seconds = time.monotonic() - start
    cache = engine.vllm_config.cache_config
    metrics = {metric.name.removeprefix("vllm:"): getattr(metric, "value", None) for metric in llm.get_metrics()}
    return {
        "model": Path(args.model).name,
        "cache_tokens": cache.kv_cache_size_tokens,
        "seconds": seconds,
        **counts,
        "parted_at_margins": parted,
        "preemptions": metrics.get("num_preemptions"),
        "drafted": metrics.get("spec_decode_num_draft_tokens"),
        "drafts_taken": metrics.get("spec_decode_num_accepted_tokens"),
        "cache_in_use_at_the_end": metrics.get("kv_cache_usage_perc"),
        "resident_bytes_by_quarter": [memory[len(memory) * n // 4] for n in range(4)] + memory[-1:],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the original, a folder or hub id")
    parser.add_argument("bases", type=Path, help="a folder of bases for it")
    parser.add_argument("--text", type=Path, required=True, help="a file that prompts are cut from")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--cache-memory", type=float, default=24, help="MiB")
    parser.add_argument("--batched-tokens", type=int, default=128)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from eigenattn.benchmark.timing import device_of, machine

    found = soak(args)
    print(json.dumps(found, indent=1))
    if args.json:
        load = {name: str(value) for name, value in vars(args).items() if name != "json"}
        args.json.write_text(json.dumps({**found, "load": load, **machine(device_of(None))}, indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # steps are taken here
    main()
