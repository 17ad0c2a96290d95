"""`/live`, `/ready`, `/health`, `/ping`: for whoever decides where requests go. They need no key.

live    this process answers: there is no reason to restart it
ready   a request would be served now: not so while the engine is paused
health  the engine works, paused or not; ping is the same
"""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from fastdeploy.server.engine import ServerEngine

OPEN_PATHS = frozenset({"/live", "/ready", "/health", "/ping"})  # all others need the key


def add_health(app: FastAPI, engine: ServerEngine) -> None:
    @app.get("/live")
    async def live() -> Response:
        return JSONResponse({"status": "live"})

    @app.get("/ready")
    async def ready() -> Response:
        return state(is_paused=engine.is_alive and engine.paused)

    @app.get("/health")
    @app.api_route("/ping", methods=["GET", "POST"])
    async def health() -> Response:
        return state(is_paused=False)

    def state(*, is_paused: bool) -> Response:
        if engine.is_alive and not engine.draining and not is_paused:
            return JSONResponse({"status": "ready"})
        reason = "paused" if is_paused else engine.state
        body = {"status": "unavailable", "reason": reason}
        return JSONResponse(body, 503, headers={"retry-after": "1"})
