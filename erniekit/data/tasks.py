"""Tasks that are made and scored by the package reasoning-gym, as a source of records.

    chain_sum?size=2000&seed=1&min_terms=2&max_terms=2

is a task of the package and the settings of its dataset. A record is a question with the answer
that the package holds right, so supervised fine-tuning reads it too; `entry` is what the package
scores by. The same settings make the same records on every machine. Task i of seed s is as a rule
task 0 of seed s + i: the seeds of training and held-out tasks must be further apart than a file is
long.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from ernie.settings import ConfigError, did_you_mean

log = logging.getLogger("erniekit")

KIND = "reasoning_gym"
DEFAULT_SIZE = 1000
_told: set[str] = set()  # tasks whose scorer has failed in this process


class Tasks:
    """The tasks of one dataset, made when they are asked for; counted from 1."""

    def __init__(self, spec: str) -> None:
        self.path = Path(spec)
        self.task, _, query = spec.partition("?")
        settings = {"size": DEFAULT_SIZE} | {k: _value(v) for k, v in parse_qsl(query)}
        self.dataset = _dataset(self.task, settings, spec)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        entry = self.dataset[index]
        return {
            "messages": [
                {"role": "user", "content": entry["question"]},
                {"role": "assistant", "content": str(entry["answer"])},
            ],
            "answer": str(entry["answer"]),
            "reward": KIND,
            "task": self.task,
            "entry": entry,
        }

    def where(self, index: int) -> str:
        return f"{self.path}, task {index + 1}"

    def number(self, index: int) -> int:
        return index + 1

    def index_of(self, number: int) -> int | None:
        return number - 1 if 0 < number <= len(self) else None

    @property
    def size(self) -> int:
        return len(self)  # there is no file whose bytes could be counted

    def text(self, index: int) -> str:
        return json.dumps(self[index], ensure_ascii=False, default=str)


def score(task: str, answer: str, entry: dict[str, Any]) -> float:
    """What reasoning-gym gives for an answer to one of its entries, 0 to 1.

    Some of its scorers read an answer without checking it: one that they fail on gets 0, and the
    first of each task is told of.
    """
    scorer = package().get_score_answer_fn(task)
    try:
        return float(scorer(answer, entry))
    except Exception as error:  # whatever the package's code raises
        if task not in _told:
            _told.add(task)
            log.warning(
                "reasoning-gym cannot score an answer to %s, which counts as 0 like others of its "
                "kind: %s: %s", task, type(error).__name__, error,
            )  # fmt: skip
        return 0.0


def package() -> Any:
    """reasoning_gym; raises ConfigError where it is not installed."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ConfigError("reasoning_gym needs the package; pip install reasoning-gym")
    import reasoning_gym

    return reasoning_gym


def _dataset(task: str, settings: dict[str, Any], spec: str) -> Any:
    made = package()
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        near = did_you_mean(task, DATASETS)
        raise ConfigError(f"{task!r} is not a task of reasoning-gym{near}")
    try:
        return made.create_dataset(task, **settings)
    except (TypeError, AssertionError, ValueError) as error:
        raise ConfigError(f"{spec}: reasoning-gym refuses these settings: {error}") from None


def _value(text: str) -> Any:
    """Numbers and truth values as such, all else as text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
