"""`/v1/responses`: OpenAI's newer form of a chat, which the server can remember.

A response is a chat underneath: its input becomes messages, its options those of `ChatRequest`, and
what comes out is told in other words (`response_events`). So whatever chats can do, responses can.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from fastdeploy.errors import RequestError
from fastdeploy.server.chat import ChatReply, chat_prompts
from fastdeploy.server.protocol import Addressed, ChatRequest, parse, read_json, validated
from fastdeploy.server.response_events import ResponseWriter, new_id
from fastdeploy.server.response_items import as_items, as_messages
from fastdeploy.server.response_store import Item, Job, ResponseStore, Stored
from fastdeploy.server.stream import Disconnected, EventStream, while_connected

if TYPE_CHECKING:
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
MAX_PAGE = 100


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

    input: str | list[dict[str, Any]]
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


def add_responses(app: FastAPI, service: Service) -> None:
    store = ResponseStore()

    @app.post("/v1/responses")
    async def create(request: Request) -> Response:
        service.metrics.requests.inc()
        body = validated(ResponseRequest, read_json(await service.read(request)))
        owner = service.owner(request)
        history = _history(store, owner, body.previous_response_id)
        items = [*history, *as_items(body.input)]
        _refuse(body, items)
        chat = _fitting_chat(body, items, service)
        response = _response(body, service)
        reply = service.begin(request, chat, ChatReply)
        reply.answer.id = response["id"]
        events = ResponseWriter(response).events(reply.events())
        stored = Stored(response, items)
        if body.background:
            stored.job = Job(reply.answer)
            store.put(owner, stored, len(history))
            stored.job.start(_and_then(events, store, owner, stored, len(history)))
            if body.stream:
                return EventStream(stored.job.follow(), on_close=lambda: None)
            return JSONResponse(response)
        if body.store is not False:
            events = _and_then(events, store, owner, stored, len(history))
        if body.stream:
            return EventStream(events, on_close=reply.answer.close)
        try:
            await while_connected(request.receive, _drained(events))
        except Disconnected:
            return Response(status_code=499)  # nobody reads it
        finally:
            reply.answer.close()
        if response["status"] == "failed":
            raise RequestError(response["error"]["message"], status=503)
        return JSONResponse(response)

    @app.get("/v1/responses/{response_id}")
    async def get(request: Request, response_id: str) -> Response:
        stored = store.get(service.owner(request), response_id)
        query = request.query_params
        if query.get("stream", "false").lower() != "true":
            return JSONResponse(stored.response)
        if stored.job is None:
            raise RequestError(
                "the events of a response are kept if it is made with background=true",
                param="stream",
            )
        after = _number(query.get("starting_after", "-1"), "starting_after", -1)
        return EventStream(stored.job.follow(after), on_close=lambda: None)

    @app.delete("/v1/responses/{response_id}")
    async def delete(request: Request, response_id: str) -> Response:
        store.remove(service.owner(request), response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    @app.post("/v1/responses/{response_id}/cancel")
    async def cancel(request: Request, response_id: str) -> Response:
        stored = store.get(service.owner(request), response_id)
        if stored.job is None:
            raise RequestError("only a response that is made with background=true can be cancelled")
        stored.job.answer.abort()
        await stored.job.finished()  # the same again if it has ended before
        return JSONResponse(stored.response)

    @app.get("/v1/responses/{response_id}/input_items")
    async def input_items(request: Request, response_id: str) -> Response:
        stored = store.get(service.owner(request), response_id)
        return JSONResponse(_page(stored.input, dict(request.query_params)))


def _history(store: ResponseStore, owner: str, response_id: str | None) -> list[Item]:
    if response_id is None:
        return []
    previous = store.get(owner, response_id, param="previous_response_id")
    if previous.response["status"] not in ("completed", "incomplete"):
        raise RequestError(
            f"the response {response_id[:64]!r} is {previous.response['status']}; only one that "
            "has an answer can be followed",
            param="previous_response_id",
        )
    return previous.conversation


def _refuse(body: ResponseRequest, items: list[Item]) -> None:
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


def _fitting_chat(body: ResponseRequest, items: list[Item], service: Service) -> ChatRequest:
    """The chat underneath; with truncation="auto" the oldest turns are left out until it fits."""
    chat = _chat(body, as_messages(items, body.instructions))
    if body.truncation != "auto":
        return chat
    assert chat.messages is not None
    room = service.loaded.config.max_model_len - (body.max_output_tokens or 1)
    system = [m for m in chat.messages[:1] if m["role"] == "system"]
    turns = chat.messages[len(system) :]
    starts = [i for i, message in enumerate(turns) if message["role"] == "user"] or [0]
    low, high = 0, len(starts) - 1  # how many turns to leave out: the fewest that will do
    while low < high:
        middle = (low + high) // 2
        chat.messages = [*system, *turns[starts[middle] if middle else 0 :]]
        if len(chat_prompts(chat, service.loaded)[0]) <= room:
            high = middle
        else:
            low = middle + 1
    chat.messages = [*system, *turns[starts[low] if low else 0 :]]
    return chat


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
    }
    if body.top_logprobs or LOGPROBS in (body.include or ()):
        values |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    if body.tools:
        values |= {"tools": [_tool(tool) for tool in body.tools]}
        values |= {"parallel_tool_calls": body.parallel_tool_calls}
        values |= {"tool_choice": _tool_choice(body.tool_choice)}
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


def _response(body: ResponseRequest, service: Service) -> dict[str, Any]:
    """The object before anything has been written."""
    defaults = service.loaded.defaults
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


async def _and_then(
    events: AsyncIterator[dict[str, Any]],
    store: ResponseStore,
    owner: str,
    stored: Stored,
    num_old: int,
) -> AsyncIterator[dict[str, Any]]:
    """The events, and before the last one goes out the response is stored as it then is."""
    async for event in events:
        if stored.has_ended:
            store.put(owner, stored, num_old)
        yield event


async def _drained(events: AsyncIterator[dict[str, Any]]) -> None:
    async for _ in events:
        pass


def _page(items: list[Item], query: dict[str, str]) -> dict[str, Any]:
    """A page of a list in OpenAI's form: `limit`, `order` and `after` choose it."""
    limit = _number(query.get("limit", "20"), "limit", 1, MAX_PAGE)
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise RequestError(f"order={order[:64]!r} is not known; use asc or desc", param="order")
    listed = items if order == "asc" else items[::-1]
    after = query.get("after")
    if after is not None:
        ids = [item["id"] for item in listed]
        if after not in ids:
            raise RequestError(f"after={after[:64]!r} is no item of this response", param="after")
        listed = listed[ids.index(after) + 1 :]
    page = listed[:limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(listed) > limit,
    }


def _number(text: str, name: str, low: int, high: int | None = None) -> int:
    span = f"{low} or more" if high is None else f"{low} to {high}"
    is_integer = text.removeprefix("-").isdecimal() and len(text) < 10
    if not is_integer or int(text) < low or (high is not None and int(text) > high):
        raise RequestError(f"{name}={text[:64]!r} is out of range; it takes {span}", param=name)
    return int(text)
