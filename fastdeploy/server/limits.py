"""How much is taken on: the queue, each key's share, the size of a request, its time.

What is refused is refused before any work is done for it, with 429 and a `Retry-After` from the
rate at which texts have been ending.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastdeploy.config import ServerConfig
from fastdeploy.errors import RequestError
from fastdeploy.server.messages_events import error_at
from fastdeploy.server.reply import error_body

if TYPE_CHECKING:
    from fastdeploy.sampling import SamplingParams

WINDOW_S = 60.0  # how far back the rate looks
FIRST_GUESS_S = 2  # Retry-After before any text has ended
LONGEST_S = 300


class Pace:
    """Texts that end in a second, over the last minute; only the newest 256 are looked at."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.ends: deque[float] = deque(maxlen=256)

    def count(self) -> None:
        self.ends.append(self.clock())

    def per_second(self) -> float | None:
        """None where fewer than two texts have ended within the window."""
        now = self.clock()
        while self.ends and self.ends[0] < now - WINDOW_S:
            self.ends.popleft()
        if len(self.ends) < 2:
            return None
        return len(self.ends) / max(now - self.ends[0], 1e-3)


class Limits:
    """`num_waiting` gives the texts that wait for the engine."""

    def __init__(self, config: ServerConfig, num_waiting: Callable[[], int]) -> None:
        self.config, self.num_waiting = config, num_waiting
        self.pace = Pace()
        self.num_by_key: dict[str, int] = {}  # requests in work, of keys that have any

    def retry_after_s(self) -> int:
        """Seconds until the queue of this moment is worked off."""
        rate = self.pace.per_second()
        if rate is None:
            return FIRST_GUESS_S
        return max(1, min(LONGEST_S, math.ceil((self.num_waiting() + 1) / rate)))

    def admit(self) -> None:
        """Raise RequestError where the queue is too long for one more request."""
        waiting = self.num_waiting()
        most = self.config.max_num_waiting
        if most is not None and waiting >= most:
            raise RequestError(
                f"{waiting} texts are waiting, as many as max_num_waiting allows; try again later",
                status=429,
            )
        rate, longest = self.pace.per_second(), self.config.max_waiting_time
        if longest != -1 and rate is not None and waiting / rate > longest:
            raise RequestError(
                f"the queue takes {waiting / rate:.0f} s, more than max_waiting_time={longest:g} "
                "allows; try again later",
                status=429,
            )

    def check_tokens(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, max_model_len: int
    ) -> None:
        """Raise RequestError for a request that asks for too many tokens in all its texts; one that
        is pooled asks for none.
        """
        most = self.config.max_tokens_per_request
        if most is None or params.pooling is not None:
            return
        room = sum(
            min(params.max_tokens or max_model_len, max(max_model_len - len(prompt_ids), 0))
            for prompt_ids in prompts
        )
        if room * params.num_samples > most:
            raise RequestError(
                f"the request asks for {room * params.num_samples} tokens ({len(prompts)} prompts "
                f"x {params.num_samples} texts x max_tokens), more than max_tokens_per_request="
                f"{most}; lower max_tokens or n",
                param="max_tokens",
            )

    @contextlib.contextmanager
    def place_of(self, key: str | None) -> Iterator[None]:
        """Count one request of a key while it lasts. Raises RequestError if it has too many."""
        most = self.config.max_concurrency_per_key
        if most is None or key is None:
            yield
            return
        num = self.num_by_key.get(key, 0)
        if num >= most:
            raise RequestError(
                f"{num} requests of this key are in work, as many as max_concurrency_per_key "
                "allows; try again later",
                status=429,
            )
        self.num_by_key[key] = num + 1
        try:
            yield
        finally:
            self.num_by_key[key] -= 1
            if not self.num_by_key[key]:
                del self.num_by_key[key]


async def within(
    chunks: AsyncIterator[dict[str, Any]], seconds: float
) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a reply that no request waits for; after `seconds` an error ends them."""
    end = asyncio.get_running_loop().time() + seconds
    while True:
        try:
            left = end - asyncio.get_running_loop().time()
            chunk = await asyncio.wait_for(anext(chunks), left)
        except StopAsyncIteration:
            return
        except TimeoutError:
            yield error_body(_too_long(seconds), 504)
            return
        yield chunk


def _too_long(seconds: float) -> str:
    return f"the request took longer than timeout={seconds:g} seconds; ask for less"


class Deadline:
    """Ends a request after `seconds`: with 504, or as the last event of a stream."""

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self.app, self.seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        kind: bytes | None = None  # of what is being sent

        async def sending(message: Message) -> None:
            nonlocal kind
            if message["type"] == "http.response.start":
                kind = dict(message["headers"]).get(b"content-type", b"")
            await send(message)

        limit = asyncio.timeout(self.seconds)
        try:
            async with limit:
                await self.app(scope, receive, sending)
        except TimeoutError:
            if not limit.expired():
                raise
            body = error_at(scope["path"], error_body(_too_long(self.seconds), 504))
            if kind is None:
                await JSONResponse(body, 504)(scope, receive, send)
            elif kind.startswith(b"text/event-stream"):
                name = f"event: {body['type']}\n" if "type" in body else ""
                event = f"{name}data: {json.dumps(body)}\n\n".encode()
                await send({"type": "http.response.body", "body": event, "more_body": False})
            else:
                raise  # half an answer is out: all that is left is to close the connection
