"""Compress a model that is kept on disk: the layers of a 70B model, two of them, of random weights.

The model is written in shards, and compressed as `eigenattn compress` does it, in a process of its own, whose memory is
watched: once with its layers on disk, and once in memory. The weights are random, so that ranks mean nothing here: what
counts is memory and time.

python benchmarks/large.py [--folder FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from eigenattn.version import versions

VOCABULARY = 128  # one token a character
SAMPLES, LENGTH = 1, 64  # little text: memory hardly depends on it, and time does
SHAPE = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
# Run in the child: the most memory that was in use beyond what the libraries take.
CHILD = """
import json, sys, time
from pathlib import Path
from eigenattn import EigenAttentionConfig
from eigenattn.workflows.calibrate import CalibrationText
from eigenattn.workflows.compress import compress_checkpoint
arguments = json.loads(sys.argv[1])
config, text = EigenAttentionConfig(**arguments.pop("config")), CalibrationText(**arguments.pop("text"))
def most():  # of this process since it began: getrusage would count the one that started it
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
imported = most()
start = time.perf_counter()
report = compress_checkpoint(arguments.pop("model"), Path(arguments.pop("out")), config, text, **arguments)
found = {"seconds": time.perf_counter() - start, "stages": report.seconds, "kv_ratio": report.kv_ratio}
print(json.dumps({**found, "imported": imported, "peak": most()}))
"""


def write_model(folder: Path) -> int:
    """A model of random weights in bfloat16, one file a layer, and a tokenizer; returns the bytes of its weights."""
    folder.mkdir(parents=True)
    config = LlamaConfig(**SHAPE, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    generator, places, total = torch.Generator().manual_seed(0), {}, 0
    groups: dict[str, list[str]] = {}
    for name in shapes:
        groups.setdefault(name.split(".")[2] if ".layers." in name else "rest", []).append(name)
    for number, names in enumerate(groups.values(), 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {name: random_weight(shapes[name], generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    inner = Tokenizer(WordLevel({chr(code): code for code in range(VOCABULARY)}, unk_token="\x01"))
    inner.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="\x01").save_pretrained(folder)
    return total


def random_weight(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, shape[1] ** -0.5, generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="Where to work; some 12 GB. A temporary folder by default.")
    parser.add_argument("--window", type=int, nargs="+", default=[32, 0])
    parser.add_argument("--weights", nargs="+", choices=["disk", "memory"], default=["disk", "memory"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="eigenattn-large-", dir=args.folder))
    try:
        size = write_model(folder / "model")
        (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
        places = {
            **dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"),
            **{f"model.layers.{layer}": "disk" for layer in range(SHAPE["num_hidden_layers"])},
        }
        (folder / "places.json").write_text(json.dumps(places))
        rows = []
        for window in args.window:
            for name in args.weights:
                device = str(folder / "places.json") if name == "disk" else "cpu"
                row = {"weights": name, "window": window, **run(folder, device, window)}
                print(
                    f"weights in {name}, window {window}: {row['seconds']:.0f} s, peak {row['peak'] / 1e9:.2f} GB "
                    f"({row['imported'] / 1e9:.2f} GB of it libraries), of weights {size / 1e9:.2f} GB",
                    flush=True,
                )
                rows.append(row)
    finally:
        shutil.rmtree(folder)
    if args.json:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}"
        settings = {"shape": SHAPE, "samples": SAMPLES, "length": LENGTH, "dtype": "bfloat16", "weight_bytes": size}
        found = {**settings, "rows": rows, "machine": machine, "versions": versions()}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def run(folder: Path, device: str, window: int) -> dict:
    out = folder / "out"
    arguments = {
        "model": str(folder / "model"),
        "out": str(out),
        "config": {"coded": False, "kv_ratio": 0.5, "window": window},
        "text": {"sources": [str(folder / "text.txt")], "samples": SAMPLES, "length": LENGTH},
        "device": device,
    }
    start = time.perf_counter()
    child = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(arguments)], stdout=subprocess.PIPE, text=True, check=True
    )
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    shutil.rmtree(out)
    return {**json.loads(child.stdout.splitlines()[-1]), "wall": time.perf_counter() - start, "written": written}


if __name__ == "__main__":
    main()
