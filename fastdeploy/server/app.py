"""The HTTP server: routes, who is let in, how errors are said, start and stop.

Only translation happens here; the engine is behind `server.engine`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from ernie.adapters import Adapter
from ernie.chat import ChatError
from ernie.settings import ConfigError
from ernie.tokenizer import Tokenizer, TokenizerError
from fastdeploy.config import EngineConfig, ServerConfig
from fastdeploy.engine.loading import Loaded, load
from fastdeploy.errors import RequestError
from fastdeploy.metrics import Metrics
from fastdeploy.sampling import filled
from fastdeploy.server import adapters
from fastdeploy.server.chat import ChatReply, chat_prompts
from fastdeploy.server.completions import CompletionReply, completion_prompts
from fastdeploy.server.control import add_control
from fastdeploy.server.engine import ServerEngine, log_progress
from fastdeploy.server.grammars import GrammarCheck
from fastdeploy.server.protocol import (
    ChatRequest,
    Common,
    CompletionRequest,
    parse,
    read_json,
    validated,
)
from fastdeploy.server.reply import Context, Reply, error_body
from fastdeploy.server.stream import Disconnected, EventStream, while_connected

log = logging.getLogger("fastdeploy")

OPEN_PATHS = frozenset({"/health", "/ping"})  # all other paths need the key, if there is one


class Service:
    """What the routes share. One for each app."""

    def __init__(self, loaded: Loaded, config: ServerConfig) -> None:
        assert loaded.tokenizer is not None, "a server needs text"
        self.loaded, self.config = loaded, config
        self.tokenizer: Tokenizer = loaded.tokenizer
        self.name = config.served_model_name or Path(loaded.config.model).resolve().name
        self.metrics = Metrics(loaded.config)
        self.engine = ServerEngine(
            loaded, max_concurrency=config.max_concurrency, on_end=self.metrics.end
        )
        self.metrics.watch(self.engine.stats)
        self.grammars = GrammarCheck(loaded.grammars)
        self.started = int(time.time())

    async def answer(
        self, request: Request, kind: type[Common], reply_kind: type[Reply]
    ) -> Response:
        """Serve one of the two generating endpoints."""
        self.metrics.requests.inc()
        body = parse(kind, read_json(await self.read(request)))
        adapter = self._adapter(body.model)
        params = filled(body.sampling_params(), self.loaded.defaults)
        if form := body.form():
            params.guided_decoding = await self.grammars.checked(form[1], field=form[0])
        if isinstance(body, ChatRequest):
            prompts = chat_prompts(body, self.loaded)
        else:
            assert isinstance(body, CompletionRequest)
            prompts = completion_prompts(body, self.tokenizer)
            if body.echo and params.logprobs is not None:
                params.prompt_logprobs = params.logprobs
        salt = self._cache_salt(request, body)
        answer = self.engine.submit(
            prompts, params, priority=body.priority or 0, cache_salt=salt, adapter=adapter
        )
        name = self.name if adapter is None else str(body.model)
        context = Context(name, self.tokenizer, params.logprobs or 0, params.n)
        reply = reply_kind(body, answer, context)
        if body.stream:
            return EventStream(reply.events(), on_close=answer.close)
        try:
            return JSONResponse(await while_connected(request.receive, reply.whole()))
        except Disconnected:
            return Response(status_code=499)  # nobody reads it
        finally:
            answer.close()

    def _adapter(self, model: str | None) -> Adapter | None:
        """What the request's `model` names: an adapter, or (None) the model itself.

        Other names mean the model too where none was given to it, unless there may be adapters: a
        misspelt one would be answered by the wrong weights.
        """
        by_name = self.loaded.engine.adapters.by_name
        if model in by_name:
            return by_name[model]
        given = self.config.served_model_name
        known = {self.name} if given else {self.name, "default", None}
        if (given or self.loaded.config.enable_lora) and model not in known:
            names = ", ".join(map(repr, [self.name, *by_name]))
            raise RequestError(
                f"there is no model {str(model)[:200]!r} here; use {names}",
                param="model",
                status=404,
            )
        return None

    async def load_adapter(self, request: Request) -> Response:
        body = validated(adapters.LoadRequest, read_json(await self.read(request)))
        adapters.check_is_not_the_model(body.lora_name, self.name)
        await adapters.load(self.engine, body, self.config.lora_root)
        return JSONResponse(self._card(body.lora_name, parent=self.name))

    async def unload_adapter(self, request: Request) -> Response:
        body = validated(adapters.UnloadRequest, read_json(await self.read(request)))
        await self.engine.unload_adapter(body.lora_name)
        return JSONResponse({"id": body.lora_name, "object": "model", "deleted": True})

    def _cache_salt(self, request: Request, body: Common) -> str | None:
        """What keeps the cached texts of one tenant from another: its key, and what it adds."""
        headers = dict(request.scope["headers"])  # as the gate has read them
        key = headers[b"authorization"].decode() if self.config.api_key else None
        if key is None and body.cache_salt is None:
            return None
        return json.dumps([key, body.cache_salt])

    async def read(self, request: Request) -> bytes:
        """The body, refused as soon as it is known to be too long."""
        most = self.config.max_body_mib * 2**20
        too_long = RequestError(
            f"the body is longer than max_body_mib={self.config.max_body_mib} MiB", status=413
        )
        announced = request.headers.get("content-length", "0")
        if announced.isdigit() and int(announced) > most:
            raise too_long
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                raise too_long
        return bytes(body)

    def models(self) -> dict[str, Any]:
        loaded = self.loaded.engine.adapters.by_name
        cards = [self._card(self.name), *(self._card(name, parent=self.name) for name in loaded)]
        return {"object": "list", "data": cards}

    def _card(self, name: str, parent: str | None = None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": "FastDeploy",
            "root": self.name,
            "parent": parent,
            "max_model_len": self.loaded.config.max_model_len,
            "permission": [],
        }


def create_app(loaded: Loaded, config: ServerConfig) -> FastAPI:
    """The server's routes around a loaded model; its lifespan starts and stops the engine."""
    service = Service(loaded, config)
    adapters.load_modules(loaded.engine, config, service.name)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        logging_task = asyncio.create_task(log_progress(service.engine))
        yield
        logging_task.cancel()
        await service.grammars.close()
        service.engine.stop()

    # No pages of its own: bodies are read by `protocol`, not by the framework.
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    app.add_middleware(Gate, keys=tuple(config.api_key or ()))
    _add_error_handlers(app)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await service.answer(request, ChatRequest, ChatReply)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await service.answer(request, CompletionRequest, CompletionReply)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse(service.models())

    if config.enable_control_api:
        add_control(app, service.engine, service.read)
    if loaded.config.enable_lora:
        app.post("/v1/load_lora_adapter")(service.load_adapter)
        app.post("/v1/unload_lora_adapter")(service.unload_adapter)

    @app.get("/health")
    @app.api_route("/ping", methods=["GET", "POST"])
    async def health() -> Response:
        return Response(status_code=200 if service.engine.is_alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return app


class Gate:
    """Lets a request in that brings one of the keys as a bearer token."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self.app = app
        self.accepted = [f"Bearer {key}".encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.accepted and scope["path"] not in OPEN_PATHS:
            given = dict(scope["headers"]).get(b"authorization", b"")
            # All keys are compared, so that the time does not tell which one was near.
            if not sum(hmac.compare_digest(given, key) for key in self.accepted):
                message = "the key is missing or wrong; send `Authorization: Bearer KEY`"
                response = JSONResponse(
                    error_body(message, 401), 401, headers={"www-authenticate": "Bearer"}
                )
                await response(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _add_error_handlers(app: FastAPI) -> None:
    """Every error in OpenAI's form; what the user did not cause says nothing of our insides."""

    def body(message: str, status: int, param: str | None = None) -> Response:
        headers = {"retry-after": "1"} if status in (429, 503) else None
        return JSONResponse(error_body(message, status, param), status, headers=headers)

    @app.exception_handler(RequestError)
    @app.exception_handler(ChatError)
    @app.exception_handler(TokenizerError)
    async def user_error(_: Request, error: ValueError) -> Response:
        param = "messages" if isinstance(error, ChatError) else getattr(error, "param", None)
        return body(str(error), getattr(error, "status", 400), param)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        return body(message, error.status_code)

    @app.exception_handler(Exception)
    async def our_error(_: Request, error: Exception) -> Response:
        log.error("an error of ours", exc_info=error)
        return body("internal error; the server's log has the details", 500)


def serve(engine_config: EngineConfig, server_config: ServerConfig) -> int:
    """Load the model and serve until SIGINT or SIGTERM; returns the exit code.

    Raises ConfigError and the errors of loading. The port is taken before the model is read.
    """
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname).1s %(message)s"
    )
    with _bound_socket(server_config) as listener:
        loaded = load(engine_config)
        if loaded.tokenizer is None:
            raise ConfigError(f"{engine_config.model} has no tokenizer; give one with --tokenizer")
        app = create_app(loaded, server_config)
        settings = uvicorn.Config(
            app,
            http="h11",
            log_config=None,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=server_config.timeout_graceful_shutdown,
        )
        server = _Server(settings, _greeting(app.state.service, listener))
        signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again at its end
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
    return 0 if server.started else 1


class _Server(uvicorn.Server):
    """Says where it listens once it does."""

    def __init__(self, config: uvicorn.Config, greeting: str) -> None:
        super().__init__(config)
        self.greeting = greeting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            sys.stdout.write(self.greeting)
            sys.stdout.flush()


def _bound_socket(config: ServerConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {config.host} port {config.port}: {os.strerror(error.errno or 0)}; "
            "choose another --port or --host"
        ) from None
    return listener


def _greeting(service: Service, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    blocks = service.engine.stats().num_blocks * service.loaded.config.block_size
    key = ' -H "Authorization: Bearer $FD_API_KEY"' if service.config.api_key else ""
    body = '{"messages": [{"role": "user", "content": "Hello"}]}'
    return (
        f"{service.name} is served at {address} (cache of {blocks} tokens); try:\n"
        f"  curl {address}/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'\n"
    )
