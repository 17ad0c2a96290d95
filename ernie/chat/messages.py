"""What goes into a chat template and what comes out: checked messages, and segments of text.

Messages are those of the OpenAI API. Refused, naming the message at fault: unknown roles, parts
of a kind that the model does not read, tool calls whose arguments are not a JSON object.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
# Kind of picture by the type of a part; the part holds its source under the same name.
MEDIA = {"image_url": "image", "image": "image", "video_url": "video", "video": "video"}


class ChatError(ValueError):
    """Messages or a chat template that cannot be rendered."""


class NoTemplate(ChatError):
    """A model folder without a chat template, which no built-in one fits: a base model."""


@dataclass(frozen=True)
class Segment:
    """A stretch of a rendered dialogue."""

    text: str
    is_trusted: bool = False  # control tokens it spells become their ids
    starts_answer: bool = False  # encoded apart from what stands before it
    is_trained: bool = False
    picture: str = ""  # "image" or "video": stands for one, whose size decides how many tokens


@dataclass(frozen=True)
class Dialogue:
    """Checked messages and how to render them.

    `content` is a str in each; for a model that reads pictures, that of users and tools may be a
    list of `{"type": "text", "text": ...}` and `{"type": "image"}` or `"video"`.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    add_generation_prompt: bool
    options: dict[str, Any]
    trained: frozenset[int]  # indices of the messages to be trained; none in a prompt


def checked_message(
    where: str, message: Mapping[str, Any], reads: Collection[str] = ()
) -> dict[str, Any]:
    """A copy with `content` as one string, arguments of tool calls as objects, no empty extras.

    `reads` are the kinds of pictures that the model reads; where there are any, parts stay apart.
    """
    if not isinstance(message, Mapping):
        raise ChatError(f"{where} is {message!r}; expected an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise ChatError(f"{where} has the role {role!r}; expected one of {', '.join(ROLES)}")
    calls = message.get("tool_calls") or []
    reasoning = message.get("reasoning_content")
    if role != "assistant" and (calls or reasoning):
        raise ChatError(f"{where} is of the {role}; only an assistant reasons and calls tools")
    if not isinstance(reasoning, (str, type(None))):
        raise ChatError(f"{where}.reasoning_content is {reasoning!r}; expected a string")
    if message.get("label", 1) not in (0, 1):
        raise ChatError(f"{where}.label is {message['label']!r}; expected 0 or 1")
    may_be_missing = bool(calls or reasoning)
    content = message.get("content")
    if role == "tool" and isinstance(content, Mapping):  # a result may be an object
        content = json.dumps(content, ensure_ascii=False)
    checked = dict(message)
    kinds = reads if role in ("user", "tool") else ()
    if isinstance(content, list):
        parts = _parts(f"{where}.content", content, kinds)
        checked["content"] = parts if reads and kinds else _joined(parts, "" if reads else "\n")
    else:
        checked["content"] = _text(f"{where}.content", content, may_be_missing)
    for key in ("tool_calls", "reasoning_content"):
        checked.pop(key, None)
    if calls:
        checked["tool_calls"] = [
            _checked_call(f"{where}.tool_calls[{n}]", call) for n, call in enumerate(calls)
        ]
    if reasoning:
        checked["reasoning_content"] = reasoning
    return checked


def _text(where: str, content: Any, may_be_missing: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and may_be_missing:
        return ""
    raise ChatError(f"{where} is {content!r}; expected a string or a list of text parts")


def _parts(where: str, content: list[Any], reads: Collection[str]) -> list[dict[str, Any]]:
    """Parts of text as they are, pictures as `{"type": kind}`; their sources are no template's
    business (`pictures_of`).
    """
    parts = []
    for n, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else part
        if isinstance(part, Mapping) and isinstance(kind, str) and MEDIA.get(kind) in reads:
            parts.append({"type": MEDIA[kind]})
            continue
        if not isinstance(part, Mapping) or kind != "text":
            known = " and ".join(repr(read) for read in ("text", *sorted(reads)))
            raise ChatError(
                f"{where}[{n}] is of type {kind!r}; this model reads parts of type {known}"
            )
        if not isinstance(part.get("text"), str):
            raise ChatError(f"{where}[{n}].text is {part.get('text')!r}; expected a string")
        parts.append({"type": "text", "text": part["text"]})
    return parts


def _joined(parts: Sequence[Mapping[str, Any]], between: str) -> str:
    return between.join(part["text"] for part in parts)


def pictures_of(messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any, str]]:
    """(kind, source, where) of every picture of messages as they came, in order; the source is what
    stands in the part under the name of its type, such as `{"url": ...}`.
    """
    return [
        (MEDIA[part["type"]], part.get(part["type"]), f"messages[{i}].content[{n}]")
        for i, message in enumerate(messages)
        if isinstance(message, Mapping) and isinstance(message.get("content"), list)
        for n, part in enumerate(message["content"])
        if isinstance(part, Mapping) and part.get("type") in tuple(MEDIA)
    ]


def _checked_call(where: str, call: Any) -> dict[str, Any]:
    """A tool call with its arguments as an object; the API carries them as JSON text."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ChatError(f"{where} is {call!r}; expected an object with function.name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise ChatError(f"{where}.function.arguments is not JSON: {error}") from None
    if not isinstance(arguments, Mapping):
        raise ChatError(f"{where}.function.arguments is {arguments!r}; expected an object")
    checked = {**function, "arguments": dict(arguments)}
    return {**call, "type": "function", "function": checked}


def written_differently(i: int) -> str:
    return (
        f"the answer messages[{i}] is written differently once the dialogue goes on, so it cannot "
        f"be trained in place; make messages[:{i + 1}] a sample of its own (one_answer_each here, "
        "split_multi_turn in a run)"
    )
