"""Server-sent events, and the end of work when the client has gone or does not read."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
_encode = msgspec.json.Encoder().encode


class Disconnected(Exception):
    """The client has closed the connection; nobody is there to be answered."""


class Source(Protocol):
    """What a stream needs of an Answer."""

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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        cutting = asyncio.create_task(self._cut(scope.get("state", {}).get("transport")))
        try:
            await while_connected(receive, self._send(send))
        except Disconnected:
            pass  # the ordinary end of a stream that somebody has stopped reading
        finally:
            cutting.cancel()
            self.source.close()

    async def _cut(self, transport: asyncio.WriteTransport | None) -> None:
        await self.source.given_up.wait()
        if transport is not None:
            # The kernel drops what it holds as well, where it would go on for as long as it takes.
            linger = struct.pack("ii", 1, 0)
            transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, linger
            )
            transport.abort()  # which `while_connected` sees as a disconnection

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self.events:
            name = b"event: %b\n" % event["type"].encode() if "type" in event else b""
            await send(_body(b"%bdata: %b\n\n" % (name, _encode(event)), more=True))
        last = b"" if self.last is None else b"data: %b\n\n" % self.last
        await send(_body(last, more=False))


def _body(data: bytes, *, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}
