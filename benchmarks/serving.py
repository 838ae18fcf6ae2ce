"""vLLM on a load at a fixed cache memory: a model as it is against the same model with latents in its cache.

    python benchmarks/serving.py MODEL --bases FOLDER [--bases FOLDER] [--compressed CHECKPOINT] [--fp8]
        [--cache-memory MIB] [--requests N] [--rates PER_SECOND ...] [--json FILE]

Each engine runs in a process of its own, one after the other, and all have the same memory for their caches. Requests
come at random intervals at each rate, or all at once (rate 0): as many run together as the cache holds, and the others
wait. Prompts are random tokens, so no prefix is shared, and every request decodes as many tokens. Needs vLLM (see
docs/serving.md); on a GPU nothing else has to be said.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

# What is asked for -> options of the engine.
KINDS = {
    "original": lambda args, _: {"model": args.model},
    "fp8": lambda args, _: {"model": args.model, "kv_cache_dtype": "fp8"},
    "bases": lambda args, folder: {"model": args.model, "additional_config": {"eigenattn": folder}},
    "compressed": lambda args, folder: {"model": folder},
}
# Of one thread on a machine that others use too, the process's own seconds tell more.
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


def measure(kind: str, folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """Serve the load with one engine, in this process."""
    import torch
    from vllm import LLM, SamplingParams

    llm = LLM(
        **KINDS[kind](args, folder),
        dtype=args.dtype,
        max_model_len=args.context or args.prompt_tokens + args.new_tokens,
        max_num_seqs=max(args.requests, 1),
        max_num_batched_tokens=args.batched_tokens,
        kv_cache_memory_bytes=args.cache_memory << 20,
        enforce_eager=args.eager,
        enable_prefix_caching=False,
        disable_log_stats=False,
    )
    configuration = llm.llm_engine.vllm_config
    found: dict[str, Any] = {
        "engine": " ".join(filter(None, [kind, Path(folder).name])),
        "cache_tokens": configuration.cache_config.kv_cache_size_tokens,
        "sequences_that_fit": configuration.cache_config.kv_cache_max_concurrency,
        "loads": [],
    }
    if not args.requests:
        return found
    vocabulary = configuration.model_config.get_vocab_size()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, vocabulary, (args.requests, args.prompt_tokens), generator=generator).tolist()
    prompts = [{"prompt_token_ids": prompt} for prompt in ids]
    llm.generate(prompts[:1], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), use_tqdm=False)
    sampling = SamplingParams(temperature=0, max_tokens=args.new_tokens, ignore_eos=True)
    for rate in args.rates:
        before = preemptions(llm)
        load = served(llm.llm_engine, prompts, sampling, rate, CLOCKS[args.clock])
        found["loads"].append({"rate": rate, **load, "preemptions": preemptions(llm) - before})
    return found


def preemptions(llm: Any) -> int:
    """How often a request had to give its cache back, since the engine's start."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


def served(
    engine: Any, prompts: list[dict], sampling: Any, rate: float, clock: Callable[[], float]
) -> dict[str, float]:
    """Send requests as they come, step by step, and note when each token is there."""
    waits = random.Random(0)
    due, at = [], 0.0
    for prompt in prompts:
        due.append((at, prompt))
        at += waits.expovariate(rate) if rate else 0.0
    came: dict[str, float] = {}
    tokens: dict[str, list[float]] = {}
    held, start = 0, clock()
    while due or engine.has_unfinished_requests():
        now = clock() - start
        while due and due[0][0] <= now:
            name = f"{rate}-{len(came)}"
            came[name], tokens[name] = due[0][0], []
            engine.add_request(name, due.pop(0)[1], sampling)
        if not engine.has_unfinished_requests():
            time.sleep(due[0][0] - now)
            continue
        outputs = engine.step()
        now = clock() - start
        held = max(held, len(outputs))
        for output in outputs:
            given = tokens[output.request_id]
            given += [now] * (len(output.outputs[0].token_ids) - len(given))
    seconds = clock() - start
    first = sorted(given[0] - came[name] for name, given in tokens.items())
    between = sorted(later - sooner for given in tokens.values() for sooner, later in pairwise(given))
    decoded = sum(map(len, tokens.values()))
    spread = {
        f"{name}_p{percent}": times[min(len(times) * percent // 100, len(times) - 1)]
        for name, times in (("first_token", first), ("between_tokens", between))
        for percent in (50, 99)
    }
    return {"held": held, "seconds": seconds, "new_tokens_per_second": decoded / seconds, **spread}


def in_process(kind: str, folder: str) -> dict[str, Any]:
    """`measure` in a new process: an engine leaves memory and threads behind."""
    with tempfile.TemporaryDirectory() as temporary:
        found = Path(temporary) / "found.json"
        command = [sys.executable, __file__, *sys.argv[1:], "--only", kind, folder, "--json", str(found)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            return {"engine": f"{kind} {folder}".strip(), "error": done.stderr.strip().splitlines()[-1]}
        return json.loads(found.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the original")
    parser.add_argument("--bases", action="append", default=[], help="a folder of bases for it; may be repeated")
    parser.add_argument("--compressed", action="append", default=[], help="a compressed checkpoint; may be repeated")
    parser.add_argument("--fp8", action="store_true", help="the original with vLLM's own fp8 cache too")
    parser.add_argument("--cache-memory", type=int, default=4096, help="MiB of cache for each")
    parser.add_argument("--requests", type=int, default=256, help="0 only starts the engines, for their counts")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0], help="requests a second; 0 is all at once")
    parser.add_argument("--context", type=int, help="longest sequence, for the counts; as long as requests by default")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--batched-tokens", type=int, default=2048, help="tokens the engine computes in one step")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="which seconds; `process` goes with rate 0")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        args.json.write_text(json.dumps(measure(*args.only, args)))
        return
    from eigenattn.benchmark.timing import device_of, machine

    engines = [("original", "")] + [("fp8", "")] * args.fp8
    engines += [("bases", folder) for folder in args.bases] + [("compressed", folder) for folder in args.compressed]
    rows = [in_process(*engine) for engine in engines]
    load = {name: value for name, value in vars(args).items() if name not in ("model", "json", "only")}
    for row in rows:
        print(row["engine"], row.get("error") or f"{row['cache_tokens']:,} tokens, {row['sequences_that_fit']:.1f} fit")
        for each in row.get("loads", []):
            print("   ", ", ".join(f"{name} {value:.4g}" for name, value in each.items()))
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "load": load, **machine(device_of(None))}, indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # engine and load share one clock
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would take the place of `--cache-memory` without a word
    main()
