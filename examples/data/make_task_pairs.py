"""Make pairs for offline UPO or DPO: the right answer of a task, and a wrong one of the model.

    python examples/data/make_task_pairs.py MODEL DATASET FILE [--tasks 640] [--answers 4]

DATASET is a task of reasoning-gym with its settings, as for training. Each of the first so many is
answered a few times by the model, at temperature 1; the first answer that is wrong is the rejected
one. What is always answered rightly gives no pair. FILE is of type erniekit.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from erniekit.data.tasks import Tasks, score
from fastdeploy import LLM, SamplingParams

MAX_TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model folder")
    parser.add_argument("dataset", help="as chain_sum?size=4000&seed=1")
    parser.add_argument("file", type=Path, help="where the pairs are written")
    parser.add_argument("--tasks", type=int, default=640)
    parser.add_argument("--answers", type=int, default=4, help="to each task")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    tasks = Tasks(args.dataset)
    records = [tasks[i] for i in range(min(args.tasks, len(tasks)))]
    found = [
        pair
        for record, texts in zip(records, answers(args.model, records, args.answers, args.seed))
        if (pair := pair_of(record, texts)) is not None
    ]
    args.file.write_text("".join(json.dumps(pair) + "\n" for pair in found), "utf-8")
    print(f"{len(found)} pairs of {len(records)} tasks in {args.file}")


def answers(model: str, records: list[dict[str, Any]], count: int, seed: int) -> list[list[str]]:
    """`count` drawn answers to the question of each record."""
    llm = LLM(model, max_model_len=1024, max_num_seqs=32)
    chats = [record["messages"][:1] for record in records for _ in range(count)]
    params = [
        SamplingParams(max_tokens=MAX_TOKENS, temperature=1.0, seed=seed * len(chats) + i)
        for i in range(len(chats))
    ]
    outs = iter(llm.chat(chats, params, use_tqdm=False))
    return [[next(outs).outputs.text for _ in range(count)] for _ in records]


def pair_of(record: dict[str, Any], texts: list[str]) -> dict[str, Any] | None:
    """The right answer before the first wrong one; None where all are right."""
    wrong = (
        text for text in texts if text.strip() and score(record["task"], text, record["entry"]) < 1
    )
    if (rejected := next(wrong, None)) is None:
        return None
    question = record["messages"][0]["content"]
    return {"src": [question], "tgt": [], "response": [record["answer"], rejected], "sort": [1, 0]}


if __name__ == "__main__":
    main()
