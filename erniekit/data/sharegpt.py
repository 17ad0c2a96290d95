"""Records of the ShareGPT form, as in LLaMA-Factory's demo of tool calls, to chat messages.

    {"conversations": [{"from": "human", "value": "..."}, ...], "system"?: "...", "tools"?: [...]}

`from` is human or user, gpt or assistant, system, function_call (its value is the JSON of a call
`{"name", "arguments"}` or of a list of parallel ones, a thought may stand before it between <think>
and </think>) or observation (the result of a tool).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ernie.chat.sandbox import LEADING_THOUGHT
from erniekit.data.fields import kind_of
from erniekit.data.sources import DataError

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "system": "system",
}


def messages_of(record: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages, and where in the record each stands; raises DataError."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise DataError(
            "no conversations; expected a list of objects with from and value", at="conversations"
        )
    places = [f"conversations[{i}]" for i in range(len(turns))]
    return [_message(turn, where) for turn, where in zip(turns, places)], places


def _message(turn: Any, where: str) -> dict[str, Any]:
    speaker = turn.get("from") if isinstance(turn, Mapping) else None
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise DataError(
            f"{where} is from {str(speaker)[:40]!r}; expected one of {', '.join(ROLES)}", at=where
        )
    value = turn.get("value")
    if not isinstance(value, str):
        raise DataError(
            f"{where}.value is {kind_of(value)}; expected a string", at=f"{where}.value"
        )
    label = {key: turn[key] for key in ("label", "weight") if key in turn}
    if speaker == "function_call":
        return {**_calls(value, where), **label}
    return {"role": ROLES[speaker], "content": value, **label}


def _calls(value: str, where: str) -> dict[str, Any]:
    thought = LEADING_THOUGHT.fullmatch(value)
    inner, text = (thought.group(2).strip("\n"), thought.group(4)) if thought else ("", value)
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}.value is not JSON: {error}", at=f"{where}.value") from None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise DataError(
            f"{where}.value is not a call; expected an object with name and arguments, or a list "
            "of those",
            at=f"{where}.value",
        )
    tool_calls = [{"type": "function", "function": call} for call in calls]
    message = {"role": "assistant", "content": None, "tool_calls": tool_calls}
    return message | ({"reasoning_content": inner} if inner else {})
