"""Do our tasks give what lm-eval gives when it is called directly, with its own loading of model and data?

For each file of `query`, `choices` and `gold` an lm-eval task is written in YAML, as its documentation says, and run by
`simple_evaluate(model="hf", ...)`. `eigenattn evaluate` answers the same items: the original model, and the model
converted at full rank, which is what every compressed model is built on.

    python benchmarks/tasks.py smollm2 piqa.jsonl arc_easy.jsonl --limit 100 --out benchmarks/results/tasks-smollm2.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

import yaml
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from eigenattn.evaluation.tasks import load_tasks, run_tasks
from eigenattn.models.conversion import convert_attention
from eigenattn.models.loading import Source, load_model, load_tokenizer
from eigenattn.version import versions


def directly(source: Source, file: Path, limit: int, folder: Path) -> dict[str, list[float]]:
    """What lm-eval finds by itself."""
    task = {
        "task": f"direct_{file.stem}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(file.resolve())}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    }
    (folder / f"{file.stem}.yaml").write_text(yaml.safe_dump(task))
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": source.path, "dtype": "float32", "device": "cpu", **source.arguments},
        tasks=[task["task"]],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        num_fewshot=0,
        limit=limit,
        bootstrap_iters=0,
    )
    items = sorted(found["samples"][task["task"]], key=lambda item: item["doc_id"])
    return {"acc": [item["acc"] for item in items], "acc_norm": [item["acc_norm"] for item in items]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    source = Source.of(args.model)
    with tempfile.TemporaryDirectory() as folder:
        direct = {file.stem: directly(source, file, args.limit, Path(folder)) for file in args.files}
    model, tokenizer = load_model(source, "float32"), load_tokenizer(source)
    tasks = load_tasks([str(file) for file in args.files])
    ours = {"original": run_tasks(model, tokenizer, tasks, limit=args.limit)}
    convert_attention(model)
    ours["converted"] = run_tasks(model, tokenizer, tasks, limit=args.limit)

    rows = {}
    for name, theirs in direct.items():
        row = {"items": len(theirs["acc"])}
        row["lm-eval"] = {metric: sum(values) / len(values) for metric, values in theirs.items()}
        for title, results in ours.items():
            found = results[name]
            values = {"acc": found.correct, "acc_norm": found.correct_normalised}
            row[title] = {metric: sum(each) / len(each) for metric, each in values.items()} | {
                "items_answered_otherwise": sum(
                    ours_ != theirs_
                    for metric, each in values.items()
                    for ours_, theirs_ in zip(each, theirs[metric], strict=True)
                )
            }
        rows[name] = row
        print(name, row, flush=True)
    result = {
        "model": Path(args.model).name,
        "dtype": "float32",
        "limit": args.limit,
        "tasks": rows,
        "versions": versions() | {"lm_eval": version("lm_eval")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    beside = args.out.with_suffix(".partial")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    beside.replace(args.out)


if __name__ == "__main__":
    main()
