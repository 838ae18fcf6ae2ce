"""Throughput of vLLM at a fixed cache memory, compressed against original, on a load that fills the cache.

    python benchmarks/serving.py COMPRESSED --against ORIGINAL [--cache-memory MIB] [--requests N] [--json FILE]

Each engine runs in a process of its own, one after the other, and gets all requests at once: as many run together as
the cache holds, and the others wait. Prompts are random tokens, so no prefix is shared, and every request decodes as
many tokens. Needs vLLM (see docs/serving.md); on a GPU nothing else has to be said.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def measure(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Serve the load with one model, in this process."""
    import torch
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model,
        dtype=args.dtype,
        max_model_len=args.context or args.prompt_tokens + args.new_tokens,
        max_num_seqs=max(args.requests, 1),
        max_num_batched_tokens=args.batched_tokens,
        kv_cache_memory_bytes=args.cache_memory << 20,
        enforce_eager=args.eager,
        enable_prefix_caching=False,
        disable_log_stats=False,
    )
    engine = llm.llm_engine.vllm_config
    found = {
        "model": Path(model).name,
        "cache_tokens": engine.cache_config.kv_cache_size_tokens,
        "sequences_that_fit": engine.cache_config.kv_cache_max_concurrency,
    }
    if not args.requests:
        return found
    vocabulary = engine.model_config.get_vocab_size()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, vocabulary, (args.requests, args.prompt_tokens), generator=generator).tolist()
    prompts = [{"prompt_token_ids": prompt} for prompt in ids]
    llm.generate(prompts[:1], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), use_tqdm=False)
    start = time.perf_counter()
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=args.new_tokens, ignore_eos=True))
    seconds = time.perf_counter() - start
    decoded = sum(len(output.outputs[0].token_ids) for output in outputs)
    preemptions = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    return found | {
        "preemptions": preemptions,
        "seconds": seconds,
        "new_tokens_per_second": decoded / seconds,
        "tokens_per_second": (decoded + args.requests * args.prompt_tokens) / seconds,
    }


def in_process(model: str, arguments: list[str]) -> dict[str, Any]:
    """`measure` in a new process: an engine leaves memory and threads behind."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [sys.executable, __file__, *arguments, "--only", model, "--json", str(found)]
        subprocess.run(command, check=True)
        return json.loads(found.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a compressed checkpoint")
    parser.add_argument("--against", required=True, help="the original")
    parser.add_argument("--cache-memory", type=int, default=4096, help="MiB of cache for either")
    parser.add_argument("--requests", type=int, default=256, help="0 only starts the engines, for their counts")
    parser.add_argument("--context", type=int, help="longest sequence, for the counts; as long as requests by default")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--batched-tokens", type=int, default=2048, help="tokens the engine computes in one step")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        args.json.write_text(json.dumps(measure(args.only, args)))
        return
    from eigenattn.benchmark.timing import device_of, machine

    rows = [in_process(model, sys.argv[1:]) for model in (args.model, args.against)]
    load = {name: value for name, value in vars(args).items() if name not in ("model", "against", "json", "only")}
    found = {"rows": rows, "load": load, **machine(device_of(None))}
    found["cache_tokens_against_original"] = rows[0]["cache_tokens"] / rows[1]["cache_tokens"]
    for row in rows:
        speed = f", {row['new_tokens_per_second']:.1f} new tokens a second" if args.requests else ""
        print(f"{row['model']}: {row['cache_tokens']:,} tokens, {row['sequences_that_fit']:.1f} sequences{speed}")
    print(f"Cache tokens against the original: {found['cache_tokens_against_original']:.3f}.")
    if args.requests:
        ratio = rows[0]["new_tokens_per_second"] / rows[1]["new_tokens_per_second"]
        found["throughput_against_original"] = ratio
        print(f"Throughput against the original: {ratio:.2f}, on {found['device']}.")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    main()
