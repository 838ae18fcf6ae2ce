"""One process of several: loads checkpoints with tensor parallelism, and says what they give. See test_parallel.py.

torchrun --nproc-per-node 2 parallel_worker.py FOLDER CASE ...
"""

import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import eigenattn
from eigenattn.cache.size import allocated_bytes
from eigenattn.models.conversion import eigen_layers


def result(folder: Path, size: int) -> dict:
    ids = torch.load(folder / "ids.pt")
    distributed_config = DistributedConfig(tp_plan="auto", tp_size=size)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=distributed_config)
    except eigenattn.EigenAttnError as error:
        return {"error": str(error)}
    with torch.no_grad():
        found = model(ids, use_cache=True)
        following = model(ids[:, :3], past_key_values=found.past_key_values, use_cache=True)
    found_ids = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    own = {
        name: (parameter.to_local() if hasattr(parameter, "to_local") else parameter).numel()
        for name, parameter in model.named_parameters()
    }
    return {
        "logits": found.logits,
        "following": following.logits,
        "generated": found_ids,
        "cache_bytes": allocated_bytes(following.past_key_values),
        "heads": [(attention.heads, attention.kv_heads) for attention in eigen_layers(model)],
        "own": own,
    }


def main() -> None:
    torch.set_num_threads(1)
    folder, size, rank = Path(sys.argv[1]), int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    for case in sys.argv[2:]:
        torch.save(result(folder / case, size), folder / f"{case}-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
