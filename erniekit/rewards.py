"""What an answer is worth: rules that can be checked, tasks that score themselves, a model, or a
function of the user's.

A reward is a function of a record and the text of an answer. The record is that of the data file,
with `messages` (the prompt's), `answer` (what is right: that key of the file's record, else the
last answer of its dialogue, without its thought) and whatever else stands in the file. `REWARDS`
is the table of rules; the names model and path/to/file.py:function stand for what is outside it.
What a rule needs of a record is asked when the record is read (`judged`), so that one that it could
not judge is left out like other records that cannot be used. Code is loaded from the file that the
settings name, and from nowhere else.
"""

from __future__ import annotations

import importlib.util
import math
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from ernie.settings import ConfigError, did_you_mean
from erniekit.config import Policy
from erniekit.data import tasks
from erniekit.data.sources import DataError

Record = Mapping[str, Any]
Reward = Callable[[Record, str], float]
# Token ids of dialogues up to the end of an answer, to one number each: what a reward model gives.
Scorer = Callable[[Sequence[Sequence[int]]], list[float]]

# A sign directly after a digit or a dot is that of a range, as in 10-12.
_NUMBER = re.compile(r"(?:(?<![\d.])[-+])?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_MINUS = "\u2212"  # as models of formulas write it
_END_OF_THOUGHT = "</think>"


def exact(record: Record, answer: str) -> float:
    """1 if the answer is the record's, but for case and spaces."""
    return float(answer.casefold().split() == str(record["answer"]).casefold().split())


def number(record: Record, answer: str) -> float:
    """1 if the last number of the answer is that of the record's."""
    found = _last_number(answer)
    return float(found is not None and found == _last_number(str(record["answer"])))


def regex(record: Record, answer: str) -> float:
    """1 if the record's `pattern` describes the whole answer."""
    return float(re.fullmatch(record["pattern"], answer, re.DOTALL) is not None)


def reasoning_gym(record: Record, answer: str) -> float:
    """What the package gives, 0 to 1; some tasks give a little for an answer that is near."""
    return tasks.score(record["task"], answer, record["entry"])


REWARDS: dict[str, Reward] = {
    "exact": exact,
    "number": number,
    "regex": regex,
    "reasoning_gym": reasoning_gym,
}


def judged(record: Record, messages: Sequence[Record], names: Sequence[str]) -> dict[str, Any]:
    """A file's record as rewards read it, with its dialogue's prompt and the answer held right.

    Raises DataError for one that the rewards of these names cannot judge.
    """
    *prompt, last = messages
    answer = after_thought(str(last.get("content") or ""))
    whole = {"answer": answer, **record, "messages": prompt}
    _check(whole, names)
    return whole


def _check(record: Record, names: Sequence[str]) -> None:
    for name in names:
        rule = record.get("reward") if name == "record" else name
        if name == "record" and not (isinstance(rule, str) and rule in REWARDS):
            raise DataError(
                f"with reward=record it must name its own, one of {', '.join(REWARDS)}; it has "
                f"reward={rule!r}; or give reward: exact, for all"
            )
        if rule == "exact" and not str(record["answer"]).strip():
            raise DataError("reward=exact, and its answer is empty; give it one")
        if rule == "number" and _last_number(str(record["answer"])) is None:
            raise DataError(
                f"reward=number, and its answer has no number; that is {record['answer']!r}, for "
                "which there is exact"
            )
        if rule == "regex":
            _check_pattern(record.get("pattern"))
        if rule == "reasoning_gym" and "entry" not in record:
            raise DataError(
                "reward=reasoning_gym is for tasks of that package; use train_dataset_type: "
                "reasoning_gym, or another reward"
            )


def _check_pattern(pattern: object) -> None:
    if not isinstance(pattern, str):
        raise DataError("reward=regex, and it has no pattern; give each record one")
    try:
        re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise DataError(f"its pattern is not a regular expression; {pattern!r}: {error}") from None


def after_thought(text: str) -> str:
    """An answer without the thought before it; all of it where no thought has ended."""
    return text.rpartition(_END_OF_THOUGHT)[2].strip()


@dataclass(frozen=True)
class Scored:
    """The weighted sum of all rewards, and whether the first of them is 1: the answer is right."""

    reward: float
    is_right: bool


class Rewards:
    """The rewards of a run. `score` is the reward model, where there is one.

    Raises ConfigError for a name that is not known, and for a function that fails or gives no
    number.
    """

    def __init__(self, policy: Policy, score: Scorer | None = None) -> None:
        self.weights = policy.reward_weights
        self.score = score
        try:
            self.pattern = re.compile(policy.answer_pattern or "", re.DOTALL)
        except re.error as error:
            raise ConfigError(f"answer_pattern is not a regular expression: {error}") from None
        self.extracts = policy.answer_pattern is not None
        self.names = policy.reward
        self.functions = {name: self._function(name) for name in policy.reward if name != "model"}
        if "model" in policy.reward and score is None:
            raise ConfigError("reward=model needs reward_model: the folder of a reward model")

    def __call__(
        self,
        records: Sequence[Record],
        answers: Sequence[str],
        dialogues: Sequence[Sequence[int]],
        places: Sequence[str],
    ) -> list[Scored]:
        """Of each answer; `dialogues` are the token ids that a reward model reads, `places` say
        where the records stand.
        """
        columns = []
        for name in self.names:
            if name == "model":
                assert self.score is not None
                columns.append([float(value) for value in self.score(dialogues)])
            else:
                rows = zip(records, answers, places, strict=True)
                columns.append([self._value(name, *row) for row in rows])
        return [
            Scored(sum(w * v for w, v in zip(self.weights, row)), row[0] >= 1)
            for row in zip(*columns, strict=True)
        ]

    def _value(self, name: str, record: Record, answer: str, where: str) -> float:
        try:
            value = self.functions[name](record, answer)
        except ConfigError:
            raise
        except Exception as error:  # whatever the user's code raises
            raise ConfigError(
                f"reward {name} failed on {where}: {_told(error)}; it is called with a record and "
                "the text of an answer, and must give a number for each"
            ) from error
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ConfigError(f"reward {name} gave {value!r} for an answer; it must give a number")
        return float(value)

    def _function(self, name: str) -> Reward:
        if name == "format":
            if not self.extracts:
                raise ConfigError("reward=format needs answer_pattern: what answers look like")
            return lambda record, answer: float(self.pattern.search(answer) is not None)
        if name == "record":
            return lambda record, answer: self._ruled(REWARDS[record["reward"]], record, answer)
        if name in REWARDS:
            return lambda record, answer: self._ruled(REWARDS[name], record, answer)
        if ".py:" in name:
            return function_of(name)
        known = [*REWARDS, "format", "record", "model"]
        raise ConfigError(
            f"reward={name!r} is not known{did_you_mean(name, known)}; use one of "
            f"{', '.join(known)}, or path/to/file.py:function"
        )

    def _ruled(self, rule: Reward, record: Record, answer: str) -> float:
        """A rule looks at what `answer_pattern` finds last, or without it at what follows the
        thought. The record's answer is read alike, if the pattern is found in it.
        """
        if not self.extracts:
            return rule(record, after_thought(answer))
        found, wanted = self._found(answer), self._found(str(record.get("answer", "")))
        if found is None:
            return 0.0
        return rule(record if wanted is None else {**record, "answer": wanted}, found)

    def _found(self, text: str) -> str | None:
        found = list(self.pattern.finditer(text))
        if not found:
            return None
        text = found[-1][1] if self.pattern.groups else found[-1][0]
        return None if text is None else text.strip()  # None: a branch without the group


def function_of(name: str) -> Reward:
    """The function `path/to/file.py:function`; runs that file."""
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise ConfigError(f"reward={name}: there is no file {path}")
    spec = importlib.util.spec_from_file_location("erniekit_reward", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's code raises
        raise ConfigError(
            f"reward={name}: {path} cannot be run: {_told(error)}; give a file that Python imports"
        ) from error
    found = getattr(module, function, None)
    if not callable(found):
        raise ConfigError(f"reward={name}: {path} has no function {function!r}")
    return found


def _told(error: Exception) -> str:
    """An error of code that is not ours, with its place; a SyntaxError names its own."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):
        return text
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{text} ({Path(place.filename).name}, line {place.lineno})"


def _last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text.replace(_MINUS, "-"))
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None
