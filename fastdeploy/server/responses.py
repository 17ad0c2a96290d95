"""`/v1/responses`: OpenAI's newer form of a chat, which the server can remember.

A response is a chat underneath: its input becomes messages, its options those of `ChatRequest`, and
what comes out is told in other words (`response_events`). So whatever chats can do, responses can.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from fastdeploy.errors import RequestError
from fastdeploy.server.chat import ChatReply
from fastdeploy.server.limits import within
from fastdeploy.server.parts import told_as_sent
from fastdeploy.server.protocol import ChatRequest, read_json, validated
from fastdeploy.server.reply import Reply
from fastdeploy.server.response_events import ResponseWriter
from fastdeploy.server.response_items import as_items
from fastdeploy.server.response_request import (
    ResponseRequest,
    chat_of,
    empty_response,
    refuse_mistakes,
    truncate,
)
from fastdeploy.server.response_store import Item, Job, ResponseStore, Stored
from fastdeploy.server.stream import EventStream, drained, while_connected

if TYPE_CHECKING:
    from fastdeploy.server.app import Service

MAX_PAGE = 100


def add_responses(app: FastAPI, service: Service) -> None:
    store = ResponseStore()

    @app.post("/v1/responses")
    async def create(request: Request) -> Response:
        service.metrics.requests.inc()
        body = validated(ResponseRequest, read_json(await service.read(request)))
        owner = service.owner(request)
        history = _history(store, owner, body.previous_response_id)
        items = [*history, *as_items(body.input)]
        refuse_mistakes(body, items)
        chat = chat_of(body, items, len(history), service.reads)
        response = empty_response(body, service)
        reply = await _begun(request, chat, body, service)
        reply.answer.id = response["id"]
        chunks = reply.events()
        if body.background and service.config.timeout:
            chunks = within(chunks, service.config.timeout)
        events = ResponseWriter(response).events(chunks)
        stored = Stored(response, items)
        if body.background:
            stored.job = Job(reply.answer, request.state.place.pop_all())
            store.put(owner, stored)
            stored.job.start(_and_then(events, store, owner, stored))
            if body.stream:
                return EventStream(stored.job.follow(), Follower())
            return JSONResponse(response)
        if body.store is not False:
            events = _and_then(events, store, owner, stored)
        if body.stream:
            return EventStream(events, reply.answer)
        try:
            await while_connected(request.receive, drained(events))
        finally:
            reply.answer.close()
        if reply.error is not None:
            raise reply.error
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
        return EventStream(stored.job.follow(after), Follower())

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


class Follower:
    """Who listens to a response that goes on without them."""

    def __init__(self) -> None:
        self.is_streamed = False
        self.given_up = asyncio.Event()  # never: events are kept in any case

    def close(self) -> None:
        pass


async def _begun(
    request: Request, chat: ChatRequest, body: ResponseRequest, service: Service
) -> Reply:
    """The chat, put to work. Pictures that were read to see what fits are not read again."""
    processor = service.pictures.processor
    with told_as_sent(chat, "input"):
        if body.truncation == "auto":
            processor = processor and processor.remembering()
            await truncate(chat, body, service, processor)
        return await service.begin(request, chat, ChatReply, processor)


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


async def _and_then(
    events: AsyncIterator[dict[str, Any]],
    store: ResponseStore,
    owner: str,
    stored: Stored,
) -> AsyncIterator[dict[str, Any]]:
    """The events, and before the last one goes out the response is stored as it then is; one that
    is written in the background is there already, and counted anew when all its events are.
    """
    async for event in events:
        if stored.has_ended and stored.job is None:
            store.put(owner, stored)
        yield event
    if stored.job is not None:
        store.put(owner, stored)


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
            raise RequestError(
                f"after={after[:64]!r} is not an item of this response", param="after"
            )
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
