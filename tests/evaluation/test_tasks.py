"""Tasks through lm-eval, on local files."""

import json
from pathlib import Path

import pytest
import torch
from tiny import character_tokenizer, tiny

from eigenattn.errors import EigenAttnError
from eigenattn.evaluation.tasks import PAPER_TASKS, load_tasks, run_tasks, task_names

pytest.importorskip("lm_eval", reason="needs the extra eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's own

ITEMS = [
    {"query": "Question: What barks?\nAnswer:", "choices": ["a dog", "a fish", "an oak tree"], "gold": 0},
    {"query": "Two and two make", "choices": ["five", "four"], "gold": 1},
    {"query": "Snow is", "choices": ["white", "warm and black as night"], "gold": 0},
]


def write(path: Path, rows: list) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


@torch.no_grad()
def log_likelihood(model, tokenizer, query: str, choice: str) -> float:
    context, whole = (tokenizer(text, return_tensors="pt")["input_ids"][0] for text in (query, f"{query} {choice}"))
    logs = model(whole[None]).logits[0, :-1].log_softmax(-1)
    return logs.gather(-1, whole[1:, None])[len(context) - 1 :].sum().item()


def test_a_local_task_by_hand(tmp_path):
    model, tokenizer = tiny("llama"), character_tokenizer()
    name = write(tmp_path / "quiz.jsonl", ITEMS)
    found = run_tasks(model, tokenizer, load_tasks([name]), batch_size=2)["quiz"]
    scores = [[log_likelihood(model, tokenizer, i["query"], c) for c in i["choices"]] for i in ITEMS]
    best = [max(range(len(row)), key=row.__getitem__) for row in scores]
    per_byte = [
        [s / len(c) for s, c in zip(row, i["choices"], strict=True)] for row, i in zip(scores, ITEMS, strict=True)
    ]
    best_normalised = [max(range(len(row)), key=row.__getitem__) for row in per_byte]
    assert found.correct == [float(guess == i["gold"]) for guess, i in zip(best, ITEMS, strict=True)]
    assert found.correct_normalised == [
        float(guess == i["gold"]) for guess, i in zip(best_normalised, ITEMS, strict=True)
    ]
    lengths = [len(f"{i['query']} {c}") for i in ITEMS for c in i["choices"]]
    assert found.mean_tokens == pytest.approx(sum(lengths) / len(lengths))
    assert len(run_tasks(model, tokenizer, load_tasks([name]), limit=2)["quiz"].correct) == 2


def test_names():
    assert task_names(["paper"]) == list(PAPER_TASKS)
    assert task_names(["piqa,my.jsonl", "paper"]) == ["piqa", "my.jsonl", *PAPER_TASKS[1:]]
    assert load_tasks([]) == {}


@pytest.mark.parametrize(
    "row",
    [
        "{",
        "7",
        {"query": "a", "choices": ["b"]},
        {**ITEMS[0], "gold": 3},
        {**ITEMS[0], "choices": 5},
        {**ITEMS[0], "choices": "abcd"},
        {**ITEMS[0], "choices": ["a", ""]},
        {**ITEMS[0], "query": None},
        {**ITEMS[0], "query": "\ud800"},
    ],
)
def test_a_malformed_file_names_the_line(tmp_path, row):
    with pytest.raises(EigenAttnError, match="line 2: expected"):
        load_tasks([write(tmp_path / "bad.jsonl", [ITEMS[0], row])])


@pytest.mark.parametrize("name", ["quiz.JSONL", "quiz.ndjson", "quiz.json"])
def test_json_by_other_names_and_as_an_array(tmp_path, name):
    for rows in (ITEMS, [json.dumps(ITEMS)]):
        assert len(load_tasks([write(tmp_path / name, rows)])["quiz"].dataset["test"]) == len(ITEMS)


def test_breaks_inside_lines_and_a_byte_order_mark(tmp_path):
    row = {**ITEMS[0], "query": "one\u2028two\x85three"}
    name = write(tmp_path / "quiz.jsonl", ["\ufeff" + json.dumps(row, ensure_ascii=False), ITEMS[1]])
    assert [doc["query"] for doc in load_tasks([name])["quiz"].dataset["test"]] == [row["query"], ITEMS[1]["query"]]


def test_a_local_task_is_not_the_hub_s_fault(tmp_path, monkeypatch):
    import datasets

    def broken(rows):
        raise ValueError("no such type")

    monkeypatch.setattr(datasets.Dataset, "from_list", broken)
    with pytest.raises(EigenAttnError, match=r"quiz\.jsonl could not be made of its items \(no such type\)"):
        load_tasks([write(tmp_path / "quiz.jsonl", ITEMS)])


def test_what_cannot_be_read_is_said(tmp_path):
    with pytest.raises(EigenAttnError, match="No such file"):
        load_tasks([str(tmp_path / "absent.jsonl")])
    with pytest.raises(EigenAttnError, match="no items"):
        load_tasks([write(tmp_path / "empty.jsonl", [])])
    with pytest.raises(EigenAttnError, match="two tasks"):
        (tmp_path / "other").mkdir()
        load_tasks([write(tmp_path / "quiz.jsonl", ITEMS), write(tmp_path / "other" / "quiz.jsonl", ITEMS)])


def test_the_hub_s_tasks_say_that_there_is_no_network():
    with pytest.raises(EigenAttnError, match=r"neither a \.jsonl file"):
        load_tasks(["no_such_task"])
    with pytest.raises(EigenAttnError, match="'piqa' could not be read from the hub"):
        load_tasks(["piqa"])
