"""The items of a response's input as the messages of a chat.

    message                 user, assistant, system (also called developer)
    reasoning               reasoning_content ┐
    message (assistant)     content           ├ of one assistant message
    function_call           tool_calls        ┘
    function_call_output    tool

Items of other types are refused by name.
"""

from __future__ import annotations

import json
from typing import Any

from fastdeploy.errors import RequestError
from fastdeploy.server.response_events import new_id
from fastdeploy.server.response_store import Item

Message = dict[str, Any]

TEXT_PARTS = frozenset({"input_text", "output_text", "text", "refusal", "reasoning_text"})


def as_items(value: str | list[Item]) -> list[Item]:
    """A request's `input` as items with type and id."""
    if isinstance(value, str):
        value = [{"role": "user", "content": [{"type": "input_text", "text": value}]}]
    prefix = {"function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}
    items = []
    for item in value:
        kind = item.get("type") or "message"
        given = item.get("id")
        name = given if isinstance(given, str) and given else new_id(prefix.get(str(kind), "msg"))
        items.append({**item, "type": kind, "id": name})
    return items


def as_messages(items: list[Item], instructions: str | None) -> list[Message]:
    """Raises RequestError naming the item at fault."""
    messages: list[Message] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    for i, item in enumerate(items):
        _add(messages, item, f"input[{i}]")
    return messages


def _add(messages: list[Message], item: Item, where: str) -> None:
    kind = item["type"]
    if kind == "message":
        role = {"developer": "system"}.get(item.get("role", ""), item.get("role"))
        if role not in ("system", "user", "assistant"):
            raise _error(f"{where} has the role {role!r}; use user, assistant, system or developer")
        text = _text(item.get("content"), f"{where}.content")
        if role == "assistant":
            _answer(messages, "content")["content"] = text
        elif role == "system" and messages and messages[-1]["role"] == "system":
            messages[-1]["content"] += "\n\n" + text  # most templates have a place for one
        else:
            messages.append({"role": role, "content": text})
    elif kind == "reasoning":
        text = _text(item.get("content") or [], f"{where}.content")
        if text:
            _answer(messages, "reasoning_content")["reasoning_content"] = text
    elif kind == "function_call":
        _add_call(messages, item, where)
    elif kind == "function_call_output":
        name = _string(item, "call_id", where)
        output = item.get("output")
        text = output if isinstance(output, str) else _text(output, f"{where}.output")
        messages.append({"role": "tool", "tool_call_id": name, "content": text})
    else:
        raise _error(
            f"{where} is of type {str(kind)[:64]!r}; this server reads message, reasoning, "
            "function_call and function_call_output"
        )


def _add_call(messages: list[Message], item: Item, where: str) -> None:
    names = ("call_id", "name", "arguments")
    call_id, name, arguments = (_string(item, key, where) for key in names)
    try:
        json.loads(arguments)
    except (ValueError, RecursionError):
        raise _error(f"{where}.arguments is not JSON") from None
    calls = _answer(messages, "").setdefault("tool_calls", [])
    function = {"name": name, "arguments": arguments}
    calls.append({"id": call_id, "type": "function", "function": function})


def _answer(messages: list[Message], part: str) -> Message:
    """The assistant message that is being put together, or a new one if that has such a part."""
    last = messages[-1] if messages else {"role": None}
    has_more = last.get("tool_calls") and part  # calls end a message
    if last["role"] != "assistant" or last.get(part) or has_more:
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _error(f"{where} is missing or of a wrong type; send a text or a list of parts")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else 0
        if kind not in TEXT_PARTS or not isinstance(text, str):
            raise _error(f"{where}[{i}] is of type {str(kind)[:64]!r}; this model reads texts")
        texts.append(text)
    return "\n".join(texts)


def _string(item: Item, name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise _error(f"{where}.{name} is missing or not a text")
    return value


def _error(message: str) -> RequestError:
    return RequestError(message, param="input")
