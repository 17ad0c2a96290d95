"""`/v1/messages`: Anthropic's form of a chat, for the clients that speak it.

A translation and no more: `messages_request` makes a chat request of it, `messages_events` tells
what comes out in that form's words. What has no counterpart in a chat is refused by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from fastdeploy.server.chat import ChatReply
from fastdeploy.server.messages_events import PATH, MessageWriter, empty_message
from fastdeploy.server.messages_request import CountRequest, MessagesRequest, chat_of
from fastdeploy.server.parts import told_as_sent
from fastdeploy.server.protocol import read_json, with_extras
from fastdeploy.server.stream import EventStream, drained, while_connected

if TYPE_CHECKING:
    from fastdeploy.server.app import Service


def add_messages(app: FastAPI, service: Service) -> None:
    @app.post(PATH)
    async def create(request: Request) -> Response:
        service.metrics.requests.inc()
        body = with_extras(MessagesRequest, read_json(await service.read(request)))
        chat = chat_of(body, service)
        with told_as_sent(chat, "messages"):
            reply = await service.begin(request, chat, ChatReply)
        num_prompt = sum(map(len, reply.answer.prompts))
        message = empty_message(service.name_of(body), num_prompt)
        reply.answer.id = message["id"]
        writer = MessageWriter(message, body.stop_sequences or ())
        events = writer.events(reply.events())
        if body.stream:
            return EventStream(events, reply.answer, last=None)
        try:
            await while_connected(request.receive, drained(events))
        finally:
            reply.answer.close()
        if reply.error is not None:
            raise reply.error
        return JSONResponse(message)

    @app.post(f"{PATH}/count_tokens")
    async def count_tokens(request: Request) -> Response:
        body = with_extras(CountRequest, read_json(await service.read(request)))
        chat = chat_of(body, service)
        with told_as_sent(chat, "messages"):
            prompt = await service.prompt_of(chat)
        num_tokens = len(prompt) + len(chat.completion_token_ids or ())
        return JSONResponse({"input_tokens": num_tokens})
