"""Server-sent events, and the end of work when the client has gone or does not read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
_encode = msgspec.json.Encoder().encode


class Disconnected(Exception):
    """The client has closed the connection; nobody is there to be answered. A route lets it
    through: the app's handler makes a 499 of it, for the log.
    """


class Connection(Protocol):
    """What a stream needs of a client's connection beside ASGI; see `connection`."""

    def send_more(self, data: bytes) -> bool: ...
    def cut(self) -> None: ...


class Source(Protocol):
    """What a stream needs of an Answer."""

    is_streamed: bool
    given_up: asyncio.Event

    def close(self) -> None: ...


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client closes the connection.

    Raises Disconnected. The request's body must have been read.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnection(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Disconnected
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnection(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def drained(events: AsyncIterator[dict[str, Any]]) -> None:
    """Wait for the last event."""
    async for _ in events:
        pass


class EventStream(Response):
    """Sends each dict of `events` as one `data:` line, after an `event:` line with its `type` if it
    has one, and `last`, if any, at the end.

    `source` is closed exactly once, however it ends: done, failed, the client gone, or (when the
    source gives up) the client asleep, whose connection is then cut.
    """

    def __init__(
        self,
        events: AsyncIterator[dict[str, Any]],
        source: Source,
        last: bytes | None = b"[DONE]",
    ) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self.events, self.source, self.last = events, source, last
        source.is_streamed = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection: Connection | None = scope.get("state", {}).get("connection")
        if scope["method"] == "HEAD":  # has no body, which only ASGI's `send` knows
            connection = None
        cutting = asyncio.create_task(self._cut(connection))
        try:
            await while_connected(receive, self._send(send, connection))
        except Disconnected:
            pass  # the ordinary end of a stream that somebody has stopped reading
        finally:
            cutting.cancel()
            self.source.close()

    async def _cut(self, connection: Connection | None) -> None:
        await self.source.given_up.wait()
        if connection is not None:
            connection.cut()  # which `while_connected` sees as a disconnection

    async def _send(self, send: Send, connection: Connection | None) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        has_begun = False  # the layers around want to see the first event and the last
        async for event in self.events:
            name = b"event: %b\n" % event["type"].encode() if "type" in event else b""
            data = b"%bdata: %b\n\n" % (name, _encode(event))
            if not (has_begun and connection is not None and connection.send_more(data)):
                await send(_body(data, more=True))
                has_begun = True
        last = b"" if self.last is None else b"data: %b\n\n" % self.last
        await send(_body(last, more=False))


def _body(data: bytes, *, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}
