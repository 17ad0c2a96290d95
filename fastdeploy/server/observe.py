"""What is recorded of requests: in the metrics, in the log, in traces. Never what they say.

`Observe` sees HTTP requests come and go; `Observer.ended` is told of each text. Every answer gets
the request's id, and the headers that keep browsers from guessing and framing.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastdeploy.config import ServerConfig
from fastdeploy.server.log import ORIGIN, Origin, request_id_of
from fastdeploy.server.tracing import Tracing

if TYPE_CHECKING:
    from fastdeploy.metrics import Metrics
    from fastdeploy.server.engine import Ended

log = logging.getLogger("fastdeploy")

METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
CLIENT_WENT = 499  # the status of an answer that nobody was there to get
HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"x-frame-options": b"DENY",
    b"cross-origin-resource-policy": b"same-origin",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
}


class Observer:
    """Where records go. One for each app."""

    def __init__(self, config: ServerConfig, metrics: Metrics) -> None:
        self.config, self.metrics = config, metrics
        self.tracing = Tracing.of(config)

    def ended(self, ended: Ended) -> None:
        """Record a text that has ended."""
        self.metrics.end(ended)
        if self.tracing is not None:
            self.tracing.end_text(ended)
        if not self.config.enable_log_requests:
            return
        times = ended.timing
        seconds = [
            f"{name} {moment - times.arrival_time:.3f} s"
            for name, moment in (
                ("started", times.inference_start_time),
                ("first token", times.first_token_time),
                ("ended", times.finished_time),
            )
            if moment is not None
        ]
        log.info(
            "%d prompt tokens (%d cached) | %d generated | %s | %s",
            ended.num_prompt,
            ended.num_cached,
            ended.num_output,
            ended.finish_reason,
            ", ".join(seconds),
            extra={"origin": ended.origin},
        )

    def answered(self, scope: Scope, status: int, seconds: float) -> None:
        """Record an HTTP request that is over, by the pattern of its route where it met one."""
        method = scope["method"] if scope["method"] in METHODS else "OTHER"
        route = getattr(scope.get("route"), "path", "none")
        self.metrics.http(method, route, status, seconds)
        if self.config.access_log:
            client = scope.get("client")
            log.info(
                "%s %s %.200s %d %.1f ms",
                client[0] if client else "-",
                method,
                scope["path"],
                status,
                1000 * seconds,
            )


class Observe:
    def __init__(self, app: ASGIApp, observer: Observer) -> None:
        self.app, self.observer = app, observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began = time.monotonic()
        headers = dict(scope["headers"])
        request_id = request_id_of(headers.get(b"x-request-id", b""))
        tracing = self.observer.tracing
        span = tracing.start(scope, request_id) if tracing is not None else None
        ORIGIN.set(Origin(request_id, span))  # for this request's task, and it alone
        status, begun = CLIENT_WENT, False

        async def sending(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = _completed(message["headers"], request_id)
            elif tracing is not None:
                tracing.sent(span, first=not begun, last=not message.get("more_body", False))
                begun = True
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except Exception:
            status = 500
            raise
        finally:
            if tracing is not None:
                tracing.end(span, scope, status)
            self.observer.answered(scope, status, time.monotonic() - began)


def _completed(headers: list[tuple[bytes, bytes]], request_id: str) -> list[tuple[bytes, bytes]]:
    """With the request's id, and with `HEADERS` where the route has not said otherwise."""
    said = {name for name, _ in headers}
    added = [(name, value) for name, value in HEADERS.items() if name not in said]
    return [*headers, (b"x-request-id", request_id.encode()), *added]
