"""The body of `/v1/responses`, and the chat request underneath it."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fastdeploy.errors import RequestError
from fastdeploy.server.protocol import Addressed, ChatRequest, parse
from fastdeploy.server.response_events import new_id
from fastdeploy.server.response_items import as_messages
from fastdeploy.server.response_store import Item

if TYPE_CHECKING:
    from ernie.vision.prompt import Processor
    from fastdeploy.server.app import Service

LOGPROBS = "message.output_text.logprobs"
# What else may be asked to be included; nothing here makes such things.
NEVER_MADE = frozenset(
    {
        "reasoning.encrypted_content",
        "file_search_call.results",
        "web_search_call.results",
        "web_search_call.action.sources",
        "message.input_image.image_url",
        "computer_call_output.output.image_url",
        "code_interpreter_call.outputs",
    }
)


class ResponseStreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    include_obfuscation: bool | None = None  # there is none


class TextOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    format: dict[str, Any] | None = None
    verbosity: str | None = None


class Reasoning(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    effort: str | None = None
    summary: Literal["auto"] | None = None  # thoughts are shown as they are, not in short


class ResponseRequest(Addressed):
    """Fields that are not here are those of a chat, where a response can have them."""

    input: str | list[dict[str, Any]] = Field(
        description="A text, or items; in those of users and tools, pictures are parts of the type "
        "input_image with an image_url."
    )
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = True
    stream: bool | None = False
    stream_options: ResponseStreamOptions | None = None
    background: bool | None = False
    metadata: dict[str, str] | None = Field(default=None, max_length=16)
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None  # of tools that run on the server: there are none
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    text: TextOptions | None = None
    truncation: Literal["auto", "disabled"] | None = "disabled"
    reasoning: Reasoning | None = None
    conversation: None = None
    prompt: None = None


# Fields of chats that responses say in another way.
NOT_PASSED = frozenset(
    {
        *("messages", "prompt_token_ids", "completion_token_ids", "return_token_ids"),
        *("n", "best_of", "max_tokens", "max_completion_tokens", "logprobs", "prompt_logprobs"),
        *("response_format", "max_streaming_response_tokens"),
    }
)


def refuse_mistakes(body: ResponseRequest, items: list[Item]) -> None:
    if not items:
        raise RequestError("input is empty; send a text or at least one item", param="input")
    if body.background and body.store is False:
        raise RequestError("background=true needs store, to be asked for later", param="store")
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream=true", param="stream_options")
    unknown = set(body.include or ()) - NEVER_MADE - {LOGPROBS}
    if unknown:
        raise RequestError(f"include has {min(unknown)[:64]!r}; use {LOGPROBS}", param="include")
    passed = ", ".join(sorted(NOT_PASSED & (body.model_extra or {}).keys()))
    if passed:
        raise RequestError(
            f"{passed}: a field of chats, which responses say in another way",
            param=passed.split(",")[0],
        )


def chat_of(
    body: ResponseRequest, items: list[Item], num_old: int, reads: Collection[str]
) -> ChatRequest:
    """The chat underneath; see `as_messages`."""
    return _chat(body, as_messages(items, body.instructions, num_old=num_old, reads=reads))


async def truncate(
    chat: ChatRequest, body: ResponseRequest, service: Service, processor: Processor | None
) -> None:
    """Leave out the oldest turns until the rest fits, in place."""
    assert chat.messages is not None
    room = service.loaded.config.max_model_len - (body.max_output_tokens or 1)
    system = [m for m in chat.messages[:1] if m["role"] == "system"]
    turns = chat.messages[len(system) :]
    starts = [i for i, message in enumerate(turns) if message["role"] == "user"] or [0]
    low, high = 0, len(starts) - 1  # how many turns to leave out: the fewest that will do
    while low < high and processor is not None and processor.are_too_many(turns[starts[low] :]):
        low += 1
    while low < high:
        middle = (low + high) // 2
        chat.messages = [*system, *turns[starts[middle] if middle else 0 :]]
        if len(await service.prompt_of(chat, processor)) <= room:
            high = middle
        else:
            low = middle + 1
    chat.messages = [*system, *turns[starts[low] if low else 0 :]]


def _chat(body: ResponseRequest, messages: list[dict[str, Any]]) -> ChatRequest:
    values: dict[str, Any] = {
        **(body.model_extra or {}),
        "model": body.model,
        "messages": messages,
        "priority": body.priority,
        "cache_salt": body.cache_salt,
        "request_id": body.request_id,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "tool_choice": _tool_choice(body.tool_choice),
    }
    if body.top_logprobs or LOGPROBS in (body.include or ()):
        values |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    if body.tools:
        values |= {"tools": [_tool(tool) for tool in body.tools]}
        values |= {"parallel_tool_calls": body.parallel_tool_calls}
    if body.text is not None and body.text.format is not None:
        values["response_format"] = _response_format(body.text.format)
    if body.text is not None and body.text.verbosity is not None:
        values["verbosity"] = body.text.verbosity
    if body.reasoning is not None and body.reasoning.effort is not None:
        values["reasoning_effort"] = body.reasoning.effort
    return parse(ChatRequest, values)


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise RequestError(
            f"a tool is of type {str(tool.get('type'))[:64]!r}; this server has none of its own: "
            "use function",
            param="tools",
        )
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}


def _tool_choice(choice: str | dict[str, Any] | None) -> Any:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return "auto" if choice is None else choice


def _response_format(form: dict[str, Any]) -> dict[str, Any]:
    if form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {k: v for k, v in form.items() if k != "type"}}


def empty_response(body: ResponseRequest, service: Service) -> dict[str, Any]:
    """The object before anything has been written."""
    defaults = service.engine.defaults
    form = body.text.format if body.text else None
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "queued" if body.background else "in_progress",
        "background": bool(body.background),
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "model": service.name_of(body),
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": _first(body.temperature, defaults.get("temperature"), 1.0),
        "text": {"format": form or {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": _first(body.top_p, defaults.get("top_p"), 1.0),
        "truncation": body.truncation or "disabled",
        "usage": None,
    }


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)
