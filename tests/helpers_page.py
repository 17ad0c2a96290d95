"""A scripted server that speaks our events, behind the real chat page; and headless Chromium."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from fastdeploy.server.page import add_page
from fastdeploy.server.reply import error_body

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)

Delta = dict[str, Any] | float | str  # what is sent, seconds to wait, or "error" or "break"


class Upstream:
    """Answers the next chat with `script`; remembers the bodies it was asked with."""

    def __init__(self) -> None:
        self.script: list[Delta] = [{"content": "Hello."}]
        self.refusal: tuple[int, str] | None = None
        self.key: str | None = None
        self.bodies: list[dict[str, Any]] = []
        self.num_left = 0  # streams whose reader went away
        self.names = ["ERNIE-4.5-0.3B"]
        self.reads = ["text", "image"]

    def app(self) -> FastAPI:
        app = FastAPI()
        add_page(app)

        @app.get("/v1/models")
        async def models(request: Request) -> Response:
            if refused := self._refused(request):
                return refused
            card = {"max_model_len": 131072, "owned_by": "FastDeploy", "created": 1_760_000_000}
            card |= {"input_modalities": self.reads}
            return JSONResponse({"data": [{"id": name, **card} for name in self.names]})

        @app.post("/v1/chat/completions")
        async def completions(request: Request) -> Response:
            if refused := self._refused(request):
                return refused
            self.bodies.append(await request.json())
            if self.refusal is not None:
                status, message = self.refusal
                headers = {"retry-after": "3"} if status == 429 else None
                return JSONResponse(error_body(message, status), status, headers=headers)
            return StreamingResponse(self._events(), media_type="text/event-stream")

        return app

    def _refused(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return JSONResponse(error_body("the key is missing or wrong", 401), 401)

    async def _events(self) -> AsyncIterator[str]:
        tokens = 0
        try:
            for item in self.script:
                if isinstance(item, float):
                    await asyncio.sleep(item)
                elif item == "break":
                    return
                elif item == "error":
                    yield _event(error_body("the engine has stopped", 503))
                    return
                else:
                    tokens += 1
                    choice = {"index": 0, "delta": item, "finish_reason": None}
                    usage = {"prompt_tokens": 5, "completion_tokens": tokens}
                    yield _event({"choices": [choice], "usage": usage})
            yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.num_left += 1
            raise


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """The app on a free port of loopback, in a thread; its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
