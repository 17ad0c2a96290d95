"""HTTP/1.1 as the client programs need it: JSON out, JSON or events back, on kept connections.

A load generator that spends more time on a token than the server measures itself; this one is the
sockets of asyncio and little else. No redirects, no proxies, no compression.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ernie.settings import ConfigError

Event = dict[str, Any]
MAX_LINE = 2**20


class ServerError(ValueError):
    """The server refused, failed or went away; `status` is 0 where it gave no answer."""

    def __init__(self, message: str, status: int = 0, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after_s = status, retry_after_s


@dataclass(slots=True)
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    is_new: bool = True


@dataclass(slots=True)
class _Head:
    status: int
    headers: dict[str, str]


class Client:
    """A server at `base_url` (with or without `/v1`). Use it within one event loop, and close it.

    The key is `api_key`, else FD_API_KEY or OPENAI_API_KEY of the environment.
    Raises ConfigError for an address that is none.
    """

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        url = urlsplit(base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ConfigError(f"{base_url!r} is no address; write http://HOST:PORT")
        self.host, self.is_tls = url.hostname, url.scheme == "https"
        self.port = url.port or (443 if self.is_tls else 80)
        self.name = f"{url.scheme}://{url.netloc.rpartition('@')[2]}"
        self.prefix = url.path.rstrip("/").removesuffix("/v1")
        key = api_key or os.environ.get("FD_API_KEY") or os.environ.get("OPENAI_API_KEY")
        self.fixed = f"Host: {url.netloc.rpartition('@')[2]}\r\n"
        self.fixed += f"Authorization: Bearer {key.split(',')[0]}\r\n" if key else ""
        self.idle: list[_Connection] = []

    async def get(self, path: str) -> bytes:
        """Raises ServerError."""
        return await self._whole("GET", path, None)

    async def post(self, path: str, body: Any) -> dict[str, Any]:
        """The JSON object of the answer. Raises ServerError, also for an answer that is none."""
        return self._object(await self._whole("POST", path, body))

    async def stream(self, path: str, body: Any) -> AsyncGenerator[tuple[float, Event], None]:
        """Events and when each arrived, as `time.perf_counter()` says it.

        Leaving the loop early closes the connection, which ends the work on the server.
        Raises ServerError, also for an error inside the stream and one that breaks off.
        """
        head, connection = await self._ask("POST", path, body)
        rest, is_read = b"", False
        try:
            async with aclosing(self._parts(head, connection)) as parts:
                async for part in parts:
                    arrived = time.perf_counter()
                    *blocks, rest = (rest + part).replace(b"\r\n", b"\n").split(b"\n\n")
                    for data in filter(None, map(_data, blocks)):
                        if data == b"[DONE]":
                            # What follows is the end of the body: read, so that it can be kept.
                            async for _ in parts:
                                pass
                            is_read = True
                            return
                        event = self._object(data)
                        if "error" in event:
                            raise ServerError(_message(data), 500)
                        yield arrived, event
            raise ServerError("the connection was lost in the middle of the answer")
        finally:
            if is_read:
                self._put_back(head, connection)
            else:
                connection.writer.close()

    async def model(self) -> str:
        """The name of the first model served. Raises ServerError."""
        listed = self._object(await self.get("/v1/models"))
        try:
            return listed["data"][0]["id"]
        except (LookupError, TypeError):
            raise ServerError(f"{self.name}/v1/models lists no models; is it a server?") from None

    async def close(self) -> None:
        for connection in self.idle:
            connection.writer.close()
        self.idle.clear()

    def _object(self, content: bytes) -> dict[str, Any]:
        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            said = content[:200].decode(errors="replace")
            raise ServerError(f"{self.name} answered what is no JSON object: {said!r}")
        return found

    async def _whole(self, method: str, path: str, body: Any) -> bytes:
        head, connection = await self._ask(method, path, body)
        try:
            content = b"".join([part async for part in self._parts(head, connection)])
        except BaseException:
            connection.writer.close()
            raise
        self._put_back(head, connection)
        return content

    async def _ask(self, method: str, path: str, body: Any) -> tuple[_Head, _Connection]:
        """Send a request and read the head of a good answer."""
        sent = "" if body is None else json.dumps(body, ensure_ascii=False)
        content = sent.encode(errors="backslashreplace")  # half characters as JSON escapes them
        kind = "Content-Type: application/json\r\n" if body is not None else ""
        request = f"{method} {self.prefix}{path} HTTP/1.1\r\n{self.fixed}{kind}"
        message = f"{request}Content-Length: {len(content)}\r\n\r\n".encode() + content
        while True:
            connection = await self._connection()
            try:
                connection.writer.write(message)
                await connection.writer.drain()
                head = await _head(connection.reader)
                break
            except (OSError, EOFError) as error:
                connection.writer.close()
                if connection.is_new:
                    raise ServerError(f"{self.name} closed the connection") from error
            except BaseException:
                connection.writer.close()
                raise
        if head.status >= 400:
            text = b"".join([part async for part in self._parts(head, connection)])
            self._put_back(head, connection)
            raise ServerError(_message(text), head.status, _seconds(head.headers))
        return head, connection

    async def _connection(self) -> _Connection:
        while self.idle:
            connection = self.idle.pop()
            if not connection.reader.at_eof():
                connection.is_new = False  # the server may have closed it meanwhile: see `_ask`
                return connection
            connection.writer.close()
        context = ssl.create_default_context() if self.is_tls else None
        try:
            streams = await asyncio.open_connection(
                self.host, self.port, ssl=context, limit=MAX_LINE
            )
        except OSError as error:
            raise ServerError(f"no server answers at {self.name}; is it running?") from error
        return _Connection(*streams)

    async def _parts(self, head: _Head, connection: _Connection) -> AsyncGenerator[bytes, None]:
        """The body as it comes."""
        reader = connection.reader
        try:
            if head.headers.get("transfer-encoding", "").lower() == "chunked":
                while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
                    yield (await reader.readexactly(size + 2))[:-2]
                await reader.readuntil(b"\r\n")
            elif (length := head.headers.get("content-length")) is not None:
                yield await reader.readexactly(int(length))
            else:
                while part := await reader.read(65536):
                    yield part
        except (OSError, EOFError) as error:
            message = "the connection was lost in the middle of the answer"
            raise ServerError(message) from error

    def _put_back(self, head: _Head, connection: _Connection) -> None:
        is_framed = "content-length" in head.headers or "transfer-encoding" in head.headers
        if is_framed and head.headers.get("connection", "").lower() != "close":
            self.idle.append(connection)
        else:
            connection.writer.close()


async def _head(reader: asyncio.StreamReader) -> _Head:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines[1:] if line)
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    return _Head(int(lines[0].split()[1]), headers)


def _data(block: bytes) -> bytes:
    lines = (line for line in block.split(b"\n") if line.startswith(b"data:"))
    return b"\n".join(line[5:].strip() for line in lines)


def _message(text: bytes) -> str:
    try:
        return json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):  # not our server: something between here and there
        return text[:500].decode(errors="replace") or "no reason given"


def _seconds(headers: dict[str, str]) -> float | None:
    value = headers.get("retry-after", "")
    return float(value) if value.isdigit() else None
