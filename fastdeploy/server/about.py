"""What a server says of itself: version, settings, load, models; and ending requests by name."""

from __future__ import annotations

import dataclasses
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict

import fastdeploy
from fastdeploy.errors import RequestError
from fastdeploy.server.protocol import read_json, validated

if TYPE_CHECKING:
    from fastdeploy.server.app import Service

# Folders and files: clients are told their names, not where they lie.
PATHS = frozenset(
    {"model", "tokenizer", "chat_template", "lora_root", "api_key_file", "allowed_local_media_path"}
)


class AbortRequest(BaseModel):
    """Ids as answers carry them, or (`abort_all`) every request of the key."""

    model_config = ConfigDict(strict=True, extra="forbid")
    request_ids: list[str] = []
    abort_all: bool = False


def add_about(app: FastAPI, service: Service) -> None:
    @app.get("/version")
    async def version() -> Response:
        return JSONResponse({"version": fastdeploy.__version__})

    @app.get("/config-info")
    async def config_info() -> Response:
        return JSONResponse(settings(service))

    @app.get("/load")
    async def load() -> Response:
        stats = service.engine.stats()
        num_taken = stats.num_blocks - stats.num_free_blocks
        return JSONResponse(
            {
                "server_load": len(service.engine.answers),
                "num_requests_running": stats.num_running,
                "num_requests_waiting": stats.num_waiting,
                "cache_usage": num_taken / max(stats.num_blocks, 1),  # 0 while it loads
            }
        )

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return JSONResponse(service.model(name))

    @app.post("/v1/abort_requests")
    async def abort_requests(request: Request) -> Response:
        body = validated(AbortRequest, read_json(await service.read(request)))
        if body.abort_all == bool(body.request_ids):
            raise RequestError("send either request_ids or abort_all=true", param="request_ids")
        owner, aborted = service.owner(request), []
        for answer in list(service.engine.answers):
            if answer.owner == owner and (body.abort_all or answer.id in body.request_ids):
                answer.abort()
                aborted.append(answer.id)
        if not body.abort_all and len(aborted) < len(set(body.request_ids)):
            missing = min(set(body.request_ids) - set(aborted))
            raise RequestError(
                f"no request {missing[:128]!r} is at work; {len(aborted)} others were ended",
                param="request_ids",
                status=404,
            )
        return JSONResponse({"aborted": aborted})


def settings(service: Service) -> dict[str, Any]:
    """The settings that are in force, without keys and without the places of files."""
    values = dataclasses.asdict(service.config) | dataclasses.asdict(service.loaded.config)
    values["api_key"] = len(service.config.all_keys())
    values["exporter_otlp_headers"] = (
        None if service.config.exporter_otlp_headers is None else "..."
    )
    for name in PATHS & values.keys():
        if isinstance(values[name], str):
            values[name] = PurePath(values[name]).name
    values["lora_modules"] = [
        entry.partition("=")[0] for entry in service.config.lora_modules or ()
    ]
    return values
