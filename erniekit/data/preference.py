"""Records of preferences: one beginning of a dialogue, and two ways on from there.

    erniekit  {"src": [question, ...], "tgt": [earlier answer, ...], "response": [a, b], "sort":
              [1, 0], "system"?}      the larger of `sort` is preferred; a response is a text, or a
              list answer, question, answer, ...
    alpaca    {"question", "chosen", "rejected", "system"?}
    messages  {"prompt": [message, ...], "chosen": [message, ...], "rejected": [message, ...]}

Whatever cannot be used raises `DataError`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from erniekit.data.dialogue import _opening, _text, _texts, read_dialogue
from erniekit.data.sources import DataError


@dataclass(frozen=True)
class Pair:
    """Two whole dialogues; only what follows their common prompt has label 1."""

    chosen: list[dict[str, Any]]
    rejected: list[dict[str, Any]]


def read_pair(record: Any, kind: str) -> Pair:
    """The pair in a record of a format; raises DataError for one that cannot be used."""
    if not isinstance(record, dict):
        raise DataError(f"a {type(record).__name__}; expected an object")
    prompt, chosen, rejected = _READERS[kind](record)
    if chosen == rejected:
        raise DataError("both answers are the same; expected one that is preferred")
    prompt = [{**m, "label": 0} if m.get("role") == "assistant" else m for m in prompt]
    pair = Pair(prompt + chosen, prompt + rejected)
    for messages in (pair.chosen, pair.rejected):
        read_dialogue({"messages": messages}, "messages")
    return pair


Parts = tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]


def _from_erniekit(record: Mapping[str, Any]) -> Parts:
    questions = _texts(record, "src")
    answers = _texts(record, "tgt") if record.get("tgt") else []
    if len(questions) != len(answers) + 1:
        raise DataError(
            f"{len(questions)} src and {len(answers)} tgt; expected one question more than answers"
        )
    system = record.get("system")
    if system is not None and not isinstance(system, str):
        raise DataError(f"system is a {type(system).__name__}; expected a string")
    responses, order = record.get("response"), record.get("sort")
    if not isinstance(responses, list) or len(responses) != 2:
        raise DataError("response is not a list of two; expected two answers to choose from")
    if not isinstance(order, list) or [type(n) for n in order] != [int, int]:
        raise DataError(f"sort is {order!r}; expected two integers")
    if order[0] == order[1]:
        raise DataError(f"sort is {order!r}; expected the larger at the preferred answer")
    turns = [{"role": "user", "content": questions[0]}]
    for answer, question in zip(answers, questions[1:], strict=True):
        turns.append({"role": "assistant", "content": answer})
        turns.append({"role": "user", "content": question})
    first, second = (_continuation(response) for response in responses)
    chosen, rejected = (first, second) if order[0] > order[1] else (second, first)
    return _opening(system) + turns, chosen, rejected


def _continuation(response: Any) -> list[dict[str, Any]]:
    texts = _texts({"response": response}, "response")
    if len(texts) % 2 == 0:
        raise DataError(f"a response of {len(texts)} texts; expected an odd number, answers last")
    return [
        {"role": "user" if i % 2 else "assistant", "content": text} for i, text in enumerate(texts)
    ]


def _from_alpaca(record: Mapping[str, Any]) -> Parts:
    question = {"role": "user", "content": _text(record, "question")}
    system = record.get("system")
    if system is not None and not isinstance(system, str):
        raise DataError(f"system is a {type(system).__name__}; expected a string")
    chosen, rejected = (_continuation(_text(record, key)) for key in ("chosen", "rejected"))
    return [*_opening(system), question], chosen, rejected


def _from_messages(record: Mapping[str, Any]) -> Parts:
    prompt, chosen, rejected = (record.get(key) for key in ("prompt", "chosen", "rejected"))
    for key, part in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if not isinstance(part, list) or not part or not all(isinstance(m, dict) for m in part):
            raise DataError(f"{key} is no list of messages; expected objects with role and content")
    return prompt, chosen, rejected  # type: ignore[return-value]


_READERS = {"erniekit": _from_erniekit, "alpaca": _from_alpaca, "messages": _from_messages}
