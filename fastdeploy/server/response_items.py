"""The items of a response's input as the messages of a chat.

    message                 user, assistant, system (also called developer)
    reasoning               reasoning_content ┐
    message (assistant)     content           ├ of one assistant message
    function_call           tool_calls        ┘
    function_call_output    tool

Users and tools also send pictures (`input_image`), to models that read them. Items of other types
are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from fastdeploy.errors import RequestError
from fastdeploy.server.parts import Part, joined, of_input_image
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
        for field in ("content", "output"):
            if isinstance(item.get(field), list):
                items[-1][field] = [_with_detail(part) for part in item[field]]
    return items


def _with_detail(part: Any) -> Any:
    is_image = isinstance(part, dict) and part.get("type") == "input_image"
    return {"detail": "auto", **part} if is_image else part


def as_messages(
    items: list[Item],
    instructions: str | None,
    *,
    num_old: int = 0,
    reads: Collection[str] = (),
) -> list[Message]:
    """`reads` are the kinds of pictures that the model reads; the first `num_old` items are those
    of the responses before. Raises RequestError naming the item at fault; later errors can name it
    by the `sent_as` of its message, which is that of its first item.
    """
    messages: list[Message] = []
    if instructions:
        system = {"role": "system", "content": instructions, "sent_as": "instructions"}
        messages.append(system)
    for i, item in enumerate(items):
        where = f"input[{i - num_old}]" if i >= num_old else f"item {i} of the responses before"
        _add(messages, item, where, reads)
    return messages


def _add(messages: list[Message], item: Item, where: str, reads: Collection[str]) -> None:
    num_before, kind = len(messages), item["type"]
    if kind == "message":
        role = "system" if item.get("role") == "developer" else item.get("role")
        if role not in ("system", "user", "assistant"):
            raise _error(f"{where} has the role {role!r}; use user, assistant, system or developer")
        given = item.get("content")
        content = _content(given, f"{where}.content", reads if role == "user" else ())
        if role == "assistant":
            _answer(messages, "content")["content"] = content
        elif role == "system" and messages and messages[-1]["role"] == "system":
            messages[-1]["content"] += f"\n\n{content}"  # most templates have a place for one
        else:
            messages.append({"role": role, "content": content})
    elif kind == "reasoning":
        thought = _content(item.get("content") or [], f"{where}.content")
        if thought:
            _answer(messages, "reasoning_content")["reasoning_content"] = thought
    elif kind == "function_call":
        _add_call(messages, item, where)
    elif kind == "function_call_output":
        name = _string(item, "call_id", where)
        content = _content(item.get("output"), f"{where}.output", reads)
        messages.append({"role": "tool", "tool_call_id": name, "content": content})
    else:
        raise _error(
            f"{where} is of type {str(kind)[:64]!r}; this server reads message, reasoning, "
            "function_call and function_call_output"
        )
    for message in messages[num_before:]:
        message["sent_as"] = where


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


def _content(content: Any, where: str, reads: Collection[str] = ()) -> str | list[Part]:
    """A text, but for those who may send pictures."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _error(f"{where} is missing or of a wrong type; send a text or a list of parts")
    parts: list[Part] = []
    for i, part in enumerate(content):
        place = f"{where}[{i}]"
        kind = str(part.get("type") if isinstance(part, dict) else type(part).__name__)[:64]
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else 0
        if kind == "input_image" and "image" in reads:
            try:
                parts.append(of_input_image(part, place))
            except ValueError as error:
                raise _error(f"{place} {error}") from None
        elif kind in TEXT_PARTS and isinstance(text, str):
            parts.append({"type": "text", "text": text})
        else:
            known = "text and input_image" if "image" in reads else "text"
            raise _error(f"{place} is of type {kind!r}; {known} is read here")
    return joined(parts)


def _string(item: Item, name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise _error(f"{where}.{name} is missing or not a text")
    return value


def _error(message: str) -> RequestError:
    return RequestError(message, param="input")
