"""Routes that stand in for the server's own, behind the real gate."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.testclient import TestClient

from fastdeploy.config import EngineConfig, ServerConfig
from fastdeploy.metrics import Metrics
from fastdeploy.outputs import RequestMetrics, Stats
from fastdeploy.server.engine import Ended
from fastdeploy.server.gate import guard
from fastdeploy.server.limits import Limits
from fastdeploy.server.log import ORIGIN
from fastdeploy.server.observe import Observer

ORIGINAL = EngineConfig(model="m")


def make_stats(**values: int) -> Stats:
    zeros = {field.name: 0 for field in dataclasses.fields(Stats)}
    return Stats(**zeros | values)


class Gated:
    """An app whose figures a test sets; `client` talks to it."""

    def __init__(self, **settings: Any) -> None:
        self.config = ServerConfig(**settings)
        self.stats = make_stats()
        self.metrics = Metrics(ORIGINAL)
        self.observer = Observer(self.config, self.metrics)
        self.limits = Limits(self.config, lambda: self.stats.num_waiting)
        self.release = asyncio.Event()
        self.app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        guard(self.app, self.config, self.limits, self.observer, frozenset({"/health"}))
        self._add_routes()
        self.client = TestClient(self.app, raise_server_exceptions=False)

    def _add_routes(self) -> None:
        @self.app.api_route("/v1/echo/{name}", methods=["GET", "POST"])
        async def echo(request: Request) -> Any:
            return {"tenant": request.state.tenant}

        @self.app.post("/v1/text")
        async def text() -> Any:
            self.observer.ended(make_ended())
            return {}

        @self.app.post("/v1/slow")
        async def slow() -> Any:
            await self.release.wait()

        @self.app.post("/v1/stream")
        @self.app.post("/v1/messages/stream")
        async def stream() -> Any:
            async def events() -> AsyncIterator[str]:
                yield "data: one\n\n"
                await self.release.wait()

            return StreamingResponse(events(), media_type="text/event-stream")

        @self.app.post("/v1/broken")
        async def broken() -> Any:
            raise ArithmeticError("secret")

        @self.app.get("/health")
        async def health() -> Any:
            return {}


def make_ended(**values: Any) -> Ended:
    """A text that waited 1 s, read its prompt for 2 s and wrote for 4 s."""
    timing = RequestMetrics(10.0, 11.0, 13.0, 17.0)
    known = {
        "timing": timing,
        "num_prompt": 20,
        "num_output": 5,
        "finish_reason": "stop",
        "max_tokens": 9,
        "num_cached": 16,
        "origin": ORIGIN.get(),
    }
    return Ended(**known | values)
