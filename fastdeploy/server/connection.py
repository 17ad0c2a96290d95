"""One client's connection: how long it may take, and how much it may send before it is heard.

    headers     HEADERS_S from the first moment, MAX_HEADER_BYTES: else closed, or 431
    body        BODY_S, and a second more for each MIN_BYTES_PER_S that arrived: else 408;
                of one too long LINGER_S more are read and thrown away before the 413
    answers     UNSENT_BYTES wait in the kernel and about MAX_UNREAD_BYTES (`engine`) here; a client
                that leaves more unread is cut off, see `stream`

A client that is slow costs a socket and nothing else, and that not for long.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import sys
from collections.abc import AsyncIterator
from typing import Any

import h11
import msgspec
from starlette.requests import Request
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastdeploy.errors import RequestError
from fastdeploy.server.reply import error_body

HEADERS_S = 15.0
MAX_HEADER_BYTES = 64 * 1024
BODY_S = 15.0
MIN_BYTES_PER_S = 64 * 1024
LINGER_S = 2.0
UNSENT_BYTES = 256 * 1024


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 with these limits; routes find it as `scope["state"]["connection"]`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # Or Linux would let several MiB wait for each client that does not read.
        transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, UNSENT_BYTES
        )
        self.app_state = {**self.app_state, "connection": self}
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_watching()

    def send_more(self, data: bytes) -> bool:
        """Send more of a body that was begun through ASGI and whose length is not known. The layers
        of ASGI would only pass it on, which is a third of what the token of a stream costs here;
        h11 would frame it like this. False where it cannot leave at once, or goes without a frame:
        that is for ASGI's `send`.
        """
        is_framed = self.conn.their_http_version == b"1.1"
        if not is_framed or self.flow.write_paused or self.transport.is_closing():
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True

    def cut(self) -> None:
        """Drop the connection, with all that waits to be sent: what the kernel holds as well, where
        it would go on for as long as it takes.
        """
        linger = struct.pack("ii", 1, 0)
        self.transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, linger
        )
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """What could not be read as HTTP; uvicorn calls this while it handles h11's error."""
        error = sys.exception()
        if getattr(error, "error_status_hint", 400) == 431:
            self._refuse(431, f"the headers are longer than {MAX_HEADER_BYTES} bytes")
        else:
            self._refuse(400, "this is not a request in HTTP/1.1")

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: any client may ask for HTTP/2 or a web socket, and is answered as it is."""

    def _watch_headers(self) -> None:
        """Time runs while a request has begun, or is awaited for the first time, and while the rest
        of one comes in that has been answered.
        """
        cycle = self.cycle
        is_over = cycle is not None and cycle.response_complete
        if is_over and self.conn.their_state is h11.SEND_BODY:  # the rest of a body nobody reads
            if self.patience is None:
                self.patience = self.loop.call_later(LINGER_S, self.transport.close)
        elif self.conn.their_state is not h11.IDLE:
            self._stop_watching()
        elif self.patience is None:
            self.patience = self.loop.call_later(HEADERS_S, self.transport.close)

    def _stop_watching(self) -> None:
        if self.patience is not None:
            self.patience.cancel()
            self.patience = None

    def _refuse(self, status: int, message: str) -> None:
        content = msgspec.json.encode(error_body(message, status))
        headers = [("content-type", "application/json"), ("connection", "close")]
        headers.append(("content-length", str(len(content))))
        for event in (
            h11.Response(status_code=status, headers=headers),
            h11.Data(data=content),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event))
        self.transport.close()


async def read_body(request: Request, max_bytes: int, too_long: str) -> bytes:
    """The body of a request. Raises RequestError: 413 when it is known to be too long, 408 when it
    comes too slowly.
    """
    stream = request.stream()
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > max_bytes:
        if "expect" not in request.headers:  # else nothing has been sent yet, and nothing need be
            await _discard(stream)
        raise RequestError(too_long, status=413)
    body, began = bytearray(), asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout_at(began + BODY_S) as limit:
            async for chunk in stream:
                body += chunk
                if len(body) > max_bytes:
                    break
                limit.reschedule(began + BODY_S + len(body) / MIN_BYTES_PER_S)
    except TimeoutError:
        raise RequestError("the body of the request came too slowly", status=408) from None
    if len(body) > max_bytes:
        del body
        await _discard(stream)
        raise RequestError(too_long, status=413)
    return bytes(body)


async def _discard(stream: AsyncIterator[bytes]) -> None:
    """Read on for a moment: to a client that is still sending, a closed connection is a reset, and
    it may never see the answer."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            async for _ in stream:
                pass
