"""`/v1/pause`, `/v1/sleep`, `/v1/update_weights` and their relatives: for whoever runs the server.

Off unless the server is started with `--enable-control-api`; with API keys they need one, as every
route does. FastDeploy's order is kept: pause; sleep, wakeup or update_weights; resume.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from fastdeploy.errors import RequestError
from fastdeploy.server.engine import ServerEngine
from fastdeploy.server.protocol import read_json

TAGS = frozenset({"weight", "kv_cache"})


def add_control(
    app: FastAPI, engine: ServerEngine, read: Callable[[Request], Awaitable[bytes]]
) -> None:
    """Add the routes; `read` gives the body of a request."""
    lock = asyncio.Lock()  # one change at a time
    home = engine.config.model

    async def state() -> Response:
        return JSONResponse({"is_paused": engine.paused, "is_sleeping": engine.asleep})

    @app.get("/v1/is_paused")
    async def is_paused() -> Response:
        return await state()

    @app.post("/v1/pause")
    async def pause(request: Request) -> Response:
        mode = _options(request, {"mode": ("abort", "keep")}).get("mode", "abort")
        async with lock:
            was = engine.paused
            engine.paused = True  # from now on nothing is submitted behind the command
            try:
                await engine.command("pause", mode=mode)
            except RequestError:
                engine.paused = was
                raise
        return await state()

    @app.post("/v1/resume")
    async def resume(request: Request) -> Response:
        _options(request, {})
        async with lock:
            if engine.asleep:
                raise RequestError("the engine sleeps; send wakeup first", status=409)
            await engine.command("resume")
            engine.paused = False
        return await state()

    @app.post("/v1/sleep")
    async def sleep(request: Request) -> Response:
        level = int(_options(request, {"level": ("1", "2"), "tags": None}).get("level", "1"))
        return await paused_command("sleep", level=level)

    @app.post("/v1/wakeup")
    async def wakeup(request: Request) -> Response:
        _options(request, {"tags": None})
        return await paused_command("wake_up", source=home)

    @app.post("/v1/reset_prefix_cache")
    async def reset_prefix_cache(request: Request) -> Response:
        _options(request, {})
        async with lock:
            await engine.command("reset_prefix_cache")
        return await state()

    @app.post("/v1/update_weights")
    async def update_weights(request: Request) -> Response:
        _options(request, {})
        body = await read(request)
        return await paused_command("update_weights", source=_folder(body, home))

    async def paused_command(name: str, **arguments: Any) -> Response:
        async with lock:
            if not engine.paused:
                raise RequestError("the engine is at work; send pause first", status=409)
            await engine.command(name, **arguments)
            if name in ("sleep", "wake_up"):
                engine.asleep = name == "sleep"
        return await state()


def _options(request: Request, choices: dict[str, tuple[str, ...] | None]) -> dict[str, str]:
    """The query's values. `tags` may only name all there is: cache and weights sleep together."""
    values = dict(request.query_params)
    for name, value in values.items():
        if name not in choices:
            raise RequestError(f"unknown parameter {name[:64]!r}; leave it out", param=name[:64])
        if name == "tags" and set(value.split(",")) != TAGS:
            raise RequestError(
                f"tags={value[:64]!r}; weight and kv_cache sleep and wake together: leave it out",
                param="tags",
            )
        allowed = choices[name]
        if allowed is not None and value not in allowed:
            raise RequestError(
                f"{name}={value[:64]!r} is not known; use {' or '.join(allowed)}", param=name
            )
    return values


def _folder(body: bytes, home: str) -> str:
    """The folder that a body names as `path`; without a body the one the server started with."""
    if not body:
        return home
    values = read_json(body)
    path = values.pop("path", None)
    if values:
        name = min(values)[:64]
        raise RequestError(f"unknown field {name!r}; send path", param=name)
    if not isinstance(path, str) or not os.path.isdir(path):  # never an error
        raise RequestError("path is not a folder of the server; give one", param="path")
    return path
