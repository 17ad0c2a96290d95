"""`/live`, `/ready`, `/health`, `/ping`: for whoever decides where requests go. They need no key.

live    this process answers: there is no reason to restart it
ready   a request would be served now; health and ping, FastDeploy's names, say the same
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
    @app.get("/health")
    @app.api_route("/ping", methods=["GET", "POST"])
    async def ready() -> Response:
        if engine.is_alive and not engine.draining and not engine.paused:
            return JSONResponse({"status": "ready"})
        reason = "paused" if engine.is_alive and engine.paused else engine.state
        body = {"status": "unavailable", "reason": reason}
        return JSONResponse(body, 503, headers={"retry-after": "1"})
