"""Runs engines of vLLM one after another, in a process of its own: vLLM changes torch for good where it runs.

    python engine.py JOBS RESULTS

JOBS is a JSON list of `{"options": ..., "prompts": [[ids], ...], "new_tokens": n}`, options being those of
`vllm.LLM`, `"images"`, if there are any, the files of each prompt's, and `"adapters"`, if there are any, the LoRA
adapter's folder of each prompt. With data parallel the engine is a server's.
Each result has the tokens of two runs of the same prompts, what of each run came out of the prefix cache, how many
drafts were taken, and the engine's own count of cache tokens; or the error.
"""

import asyncio
import gc
import json
import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0")


def run(job: dict) -> dict:
    from PIL import Image
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    parallel = any(job["options"].get(f"{kind}_parallel_size", 1) > 1 for kind in ("tensor", "pipeline"))
    if parallel:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    options = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 8 << 20, "disable_log_stats": False}
    llm = LLM(**options | job["options"])
    cache = llm.llm_engine.vllm_config.cache_config
    result = {"cache_tokens": cache.kv_cache_size_tokens}
    if job["prompts"]:
        prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
        for prompt, files in zip(prompts, job.get("images", ()), strict=False):
            if files:
                prompt["multi_modal_data"] = {"image": [Image.open(file) for file in files]}
        sampling = SamplingParams(temperature=0, max_tokens=job["new_tokens"], ignore_eos=True)
        folders = job.get("adapters")
        numbers = {folder: number for number, folder in enumerate(dict.fromkeys(folders or ()), 1)}
        adapters = folders and [LoRARequest(folder, numbers[folder], folder) for folder in folders]
        result["reused"] = []
        for name in ("tokens", "again"):
            outputs = llm.generate(prompts, sampling, use_tqdm=False, lora_request=adapters)
            result[name] = [list(output.outputs[0].token_ids) for output in outputs]
            result["reused"].append([output.num_cached_tokens for output in outputs])
        if not parallel:
            counted = {
                metric.name.removeprefix("vllm:"): getattr(metric, "value", None) for metric in llm.get_metrics()
            }
            names = {"preempted": "num_preemptions", "drafts_taken": "spec_decode_num_accepted_tokens"}
            result |= {name: counted.get(metric) for name, metric in names.items()}
    del llm
    gc.collect()
    return result


def run_copies(job: dict) -> dict:
    """By several engines with a model each, which share out the requests: tokens alone, of one run."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    sampling = SamplingParams(temperature=0, max_tokens=job["new_tokens"], ignore_eos=True)
    options = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 8 << 20}

    async def answers() -> list[list[int]]:
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**options | job["options"]))

        async def answer(number: int, prompt: list[int]) -> list[int]:
            async for output in llm.generate({"prompt_token_ids": prompt}, sampling, str(number)):
                last = output
            return list(last.outputs[0].token_ids)

        found = await asyncio.gather(*(answer(*each) for each in enumerate(job["prompts"])))
        llm.shutdown()
        return found

    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    return {"tokens": asyncio.run(answers())}


def main() -> None:
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    results = []
    for job in jobs:
        try:
            results.append((run_copies if "data_parallel_size" in job["options"] else run)(job))
        except Exception as error:
            results.append({"error": str(error)})
        with open(sys.argv[2], "w") as file:
            json.dump(results, file)


if __name__ == "__main__":
    main()
