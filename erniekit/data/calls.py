"""Tools that a record declares, and whether the calls and results of its dialogue fit them.

A tool is that of the OpenAI API, `{"type": "function", "function": {"name", ...}}`, or its inner
object alone, which is wrapped: templates and servers see one form. A list may come as JSON text, as
in files whose columns are strings. A call to a tool that is not declared, and a result that answers
no call, are faults: a model would learn to make up tools.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from erniekit.data.fields import kind_of
from erniekit.data.sources import DataError


def read_tools(tools: Any) -> list[dict[str, Any]]:
    """The tools of a record, [] for none; raises DataError."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "[]")
        except (ValueError, RecursionError) as error:
            raise DataError(f"tools is not JSON: {error}", at="tools") from None
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise DataError(f"tools is {kind_of(tools)}; expected a list", at="tools")
    found = [_read_tool(i, tool) for i, tool in enumerate(tools)]
    names = [_name(tool) for tool in found]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise DataError(
                f"tools[{i}] is a second tool named {name!r}; give each a name of its own",
                at=f"tools[{i}]",
            )
    return found


def _read_tool(i: int, tool: Any) -> dict[str, Any]:
    wrapped = tool if isinstance(tool, Mapping) and "function" in tool else {"function": tool}
    function = wrapped["function"]
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise DataError(
            f"tools[{i}] has no name; expected an object with function.name", at=f"tools[{i}]"
        )
    return {"type": "function", **wrapped}


def _name(tool: Mapping[str, Any]) -> str:
    return tool["function"]["name"]


class Calls:
    """Goes through the checked messages of one dialogue; `tools` are those it declares."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self.names = [_name(tool) for tool in tools]
        self.waiting: list[Any] = []  # ids (None for none) of the calls without a result
        self.num_calls = 0

    def fault(self, message: Mapping[str, Any]) -> str:
        """What is wrong with the next message; the empty string for nothing."""
        if message["role"] == "tool":
            return self._fault_of_result(message.get("tool_call_id"))
        calls = message.get("tool_calls", [])
        self.waiting, self.num_calls = [call.get("id") for call in calls], len(calls)
        for call in calls:
            if (name := call["function"]["name"]) not in self.names:
                declared = ", ".join(self.names) or "none"
                return f"calls {name!r}, which is not declared; tools of the record: {declared}"
        return ""

    def _fault_of_result(self, answers: Any) -> str:
        if not self.num_calls:
            return "is the result of a tool, and no call stands before it"
        if not self.waiting:
            return f"is one result more than the {self.num_calls} calls before it"
        if answers is None or not any(self.waiting):
            self.waiting.pop(0)
        elif answers in self.waiting:
            self.waiting.remove(answers)
        else:
            return (
                f"has the tool_call_id {answers!r}, which is not a call without a result before it"
            )
        return ""
