"""`examples/data/make_task_pairs.py`: which answers become a pair, and who reads it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from erniekit.data.tasks import Tasks

SCRIPT = Path(__file__).parents[2] / "examples/data/make_task_pairs.py"
pytest.importorskip("reasoning_gym")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_task_pairs", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_first_wrong_answer_is_the_rejected_one(script) -> None:
    record = Tasks("chain_sum?size=1&seed=1&max_digits=1&max_terms=2")[0]
    right, question = record["answer"], record["messages"][0]["content"]
    pair = script.pair_of(record, [right, f" {right}\n", "", "77", "78"])
    assert pair["response"] == [right, "77"] and pair["sort"] == [1, 0]
    assert pair["src"] == [question] and pair["tgt"] == []
    assert script.pair_of(record, [right, f"{right} "]) is None
