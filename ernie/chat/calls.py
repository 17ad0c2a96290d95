"""The text of a tool call: where it ends, and what it says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

CALL, END_CALL = "<tool_call>", "</tool_call>"
BEGIN = re.compile(r'\s*\{"name": "([^"\\]+)", "arguments": (?=\{)')  # as grammars have it written
END = re.compile(r"\}\s*\}\s*")  # of the arguments and of the call; then comes the tag


@dataclass(frozen=True, slots=True)
class Call:
    name: str
    arguments: str  # JSON text of an object


class CallScan:
    """Looks for the end of a call whose JSON begins at `opened`; a tag within a string is none."""

    def __init__(self, opened: int = 0) -> None:
        self.opened = self.at = opened
        self.in_string = False

    def end_of_call(self, text: str) -> int:
        """Where the closing tag begins, -1 while it is not there. `text` only ever grows."""
        while self.at < len(text):
            character = text[self.at]
            if character == "\\" and self.in_string:
                if self.at + 1 == len(text):
                    break
                self.at += 1
            elif character == '"':
                self.in_string = not self.in_string
            elif character == "\n":
                self.in_string = False  # no valid string has one: the rest is not lost to it
            elif character == "<" and not self.in_string:
                if text.startswith(END_CALL, self.at):
                    return self.at
                if END_CALL.startswith(text[self.at :]):
                    break
            self.at += 1
        return -1


class Braces:
    """Looks for the last brace of an object, in text that is valid JSON as far as it goes."""

    def __init__(self) -> None:
        self.depth = 0
        self.in_string = self.is_escaped = self.closed = False

    def end_of_object(self, text: str) -> int:
        """Where the last brace stands, else the length of `text`; what follows is asked next."""
        for at, character in enumerate(text):
            if self.is_escaped:
                self.is_escaped = False
            elif self.in_string:
                self.is_escaped = character == "\\"
                self.in_string = character != '"'
            elif character == '"':
                self.in_string = True
            elif character in "{}":
                self.depth += 1 if character == "{" else -1
                if self.depth == 0:
                    self.closed = True
                    return at
        return len(text)


def read_calls(text: str) -> tuple[Call, ...]:
    """The calls that JSON text says: an object with name and arguments, or a list of those.

    Empty where it is anything else: not JSON, no name, arguments that are no object, text or
    numbers that JSON cannot carry on.
    """
    try:
        value = json.loads(text)
        calls = [_read_call(one) for one in (value if isinstance(value, list) else [value])]
    except (ValueError, RecursionError):
        return ()
    return tuple(calls)


def _read_call(value: Any) -> Call:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        raise ValueError("no call")
    arguments = value.get("arguments", {})
    if isinstance(arguments, str):  # some models quote them
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("no arguments")
    call = Call(value["name"], json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    (call.name + call.arguments).encode()  # fails on half a surrogate pair
    return call


def calls_in(text: str) -> tuple[Call, ...]:
    """The whole and valid calls between tags in an answer, in order; those in its thoughts are none
    (`</think>` ends them). What a server would make of the same answer.
    """
    calls: list[Call] = []
    at = max(text.rfind("</think>"), 0)
    while (found := text.find(CALL, at)) >= 0:
        begin = found + len(CALL)
        end = CallScan(begin).end_of_call(text)
        if end < 0:
            break
        calls += read_calls(text[begin:end])
        at = end + len(END_CALL)
    return tuple(calls)


def written(calls: Iterable[Mapping[str, Any]]) -> list[str]:
    """The JSON text of each checked call, as a model of this family writes it between the tags."""
    functions = ({key: call["function"][key] for key in ("name", "arguments")} for call in calls)
    return [json.dumps(function, ensure_ascii=False) for function in functions]
