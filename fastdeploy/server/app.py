"""The routes: what each does, who is let in, how errors are said.

Only translation happens here: the engine is behind `server.engine`, the sockets before
`server.listener`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route

from ernie.chat import ChatError
from ernie.chat.messages import pictures_of
from ernie.tokenizer import TokenizerError
from ernie.vision.prompt import Processor
from ernie.vision.sources import MediaError
from fastdeploy.config import EngineConfig, ServerConfig
from fastdeploy.engine.grammar import Grammars, make_grammars, why_none
from fastdeploy.engine.language import Language
from fastdeploy.engine.request import Order
from fastdeploy.errors import RequestError
from fastdeploy.metrics import Metrics
from fastdeploy.sampling import SamplingParams, filled
from fastdeploy.server import adapters
from fastdeploy.server.about import add_about
from fastdeploy.server.chat import ChatOrder, ChatReply, chat_order
from fastdeploy.server.completions import CompletionReply, completion_prompts
from fastdeploy.server.connection import read_body
from fastdeploy.server.control import add_control
from fastdeploy.server.engine import Answer, Ended, EngineStopped, ServerEngine, log_progress
from fastdeploy.server.gate import guard
from fastdeploy.server.grammars import GrammarCheck
from fastdeploy.server.health import OPEN_PATHS, add_health
from fastdeploy.server.limits import Limits
from fastdeploy.server.log import ORIGIN
from fastdeploy.server.message import Reading
from fastdeploy.server.messages import add_messages
from fastdeploy.server.messages_events import error_at
from fastdeploy.server.observe import Observer
from fastdeploy.server.openapi import add_openapi
from fastdeploy.server.page import PATHS as PAGE_PATHS
from fastdeploy.server.page import add_page
from fastdeploy.server.parsers import find_syntax
from fastdeploy.server.pictures import Pictures, PromptPictures
from fastdeploy.server.pooling import add_pooling
from fastdeploy.server.protocol import (
    Addressed,
    ChatRequest,
    Common,
    CompletionRequest,
    parse,
    read_json,
    validated,
)
from fastdeploy.server.reply import Context, Reply, error_body, given_id, larger
from fastdeploy.server.responses import add_responses
from fastdeploy.server.stream import Disconnected, EventStream, while_connected
from fastdeploy.server.supervisor import Child, spawn
from fastdeploy.server.tokenise import add_tokenise

log = logging.getLogger("fastdeploy")


class Service:
    """What the routes share. One for each app."""

    def __init__(
        self, engine_config: EngineConfig, config: ServerConfig, spawn: Callable[[], Child]
    ) -> None:
        self.loaded, self.config = Language.read(engine_config), config
        self.tokenizer = self.loaded.tokenizer
        folder = Path(engine_config.model).resolve().name
        self.names = config.served_model_name or [folder]  # the first one in answers
        self.name = self.names[0]
        self.metrics = Metrics(engine_config, has_vision=bool(self.reads))
        self.observer = Observer(config, self.metrics)
        enabled = engine_config.enable_lora
        folders = adapters.folder_by_name(config, self.names, enabled=enabled)
        for name, its_folder in folders.items():
            self.loaded.check_training(its_folder, f"the adapter {name!r}")
        self.engine = ServerEngine(
            self.loaded,
            max_concurrency=config.max_concurrency,
            on_end=self._on_end,
            adapters=folders,
            step_timeout_s=config.engine_step_timeout,
            spawn=spawn,
        )
        self.limits = Limits(config, self.engine.num_waiting)
        self.metrics.watch(self.engine.stats)
        template = self.loaded.template
        tags = template.tags if template else ()
        self.syntax = find_syntax(config.reasoning_parser, config.tool_call_parser, tags)
        self.grammars = GrammarCheck(self._make_grammars)
        self.pictures = Pictures(config, self.loaded)
        self.started = int(time.time())

    def _make_grammars(self) -> Grammars:
        ready = self.engine.ready
        if ready is None:
            raise EngineStopped(self.engine.state)
        config, tokenizer = self.loaded.config, self.tokenizer
        grammars = make_grammars(config, tokenizer, ready.vocab_size, ready.eos_ids)
        if grammars is None:
            raise why_none(config)
        return grammars

    def _on_end(self, ended: Ended) -> None:
        self.limits.pace.count()
        self.observer.ended(ended)

    async def answer(
        self, request: Request, kind: type[Common], reply_kind: type[Reply]
    ) -> Response:
        """Serve one of the two generating endpoints."""
        self.metrics.requests.inc()
        body = parse(kind, read_json(await self.read(request)))
        reply = await self.begin(request, body, reply_kind)
        answer = reply.answer
        if body.stream:
            return EventStream(reply.events(), answer)
        try:
            return JSONResponse(await while_connected(request.receive, reply.whole()))
        finally:
            answer.close()

    async def begin(
        self,
        request: Request,
        body: Common,
        reply_kind: type[Reply],
        processor: Processor | None = None,
    ) -> Reply:
        """Put a request to work; whoever gets the reply must close its answer. `processor` reads
        the pictures of a chat, the server's if none is given.
        """
        self.limits.admit()
        params = filled(body.sampling_params(), self.engine.defaults)
        field, params.guided_decoding = body.form() or ("tools", None)
        pictures = None
        if isinstance(body, ChatRequest):
            order = await self._order(body, params, processor, field)
            prompts, params, reading = [order.prompt], order.params, order.reading
            pictures = order.pictures
        else:
            assert isinstance(body, CompletionRequest)
            prompts, reading = completion_prompts(body, self.tokenizer), Reading()
            if body.echo and params.logprobs is not None:
                params.prompt_logprobs = larger(params.prompt_logprobs, params.logprobs)
        if body.completion_token_ids:
            if len(prompts) > 1:
                raise RequestError(
                    f"completion_token_ids continues one answer, there are {len(prompts)} prompts",
                    param="completion_token_ids",
                )
            if params.guided_decoding is not None:
                raise RequestError(
                    f"completion_token_ids begins an answer, and {field} holds it to a form from "
                    "its beginning on; leave out one of them",
                    param="completion_token_ids",
                )
            prompts = [[*prompts[0], *body.completion_token_ids]]
        if params.guided_decoding is not None:
            checked = await self.grammars.checked(params.guided_decoding, field)
            params = replace(params, guided_decoding=checked)
        prefix, shown = reply_kind.id_prefix, reading.shown
        answer = self.submit(request, body, prompts, params, prefix, shown, pictures)
        num_top, on_divergence = params.logprobs or 0, self.metrics.stream_divergence.inc
        name = self.name_of(body)
        context = Context(name, self.tokenizer, num_top, params.n, on_divergence, reading)
        return reply_kind(body, answer, context)

    async def _order(
        self,
        body: ChatRequest,
        params: SamplingParams,
        processor: Processor | None = None,
        form_field: str = "tools",
    ) -> ChatOrder:
        """A chat as the engine takes it, in the form in `params`, for which `form_field` asks; its
        pictures are read in a thread, by the server's processor if no other is given.
        """
        make = partial(
            chat_order,
            body,
            params,
            self.loaded,
            self.syntax,
            trusts=self.config.trust_request_chat_template,
            form_field=form_field,
        )
        processor = processor or self.pictures.processor
        if processor is None or not pictures_of(body.messages or ()):
            return make()
        return await self.pictures.in_thread(partial(make, processor=processor))

    async def prompt_of(self, body: ChatRequest, processor: Processor | None = None) -> list[int]:
        """The token ids of a chat."""
        return (await self._order(body, body.sampling_params(), processor)).prompt

    @property
    def reads(self) -> Collection[str]:
        """The kinds of pictures that the model reads."""
        return self.loaded.template.reads if self.loaded.template else ()

    def submit(
        self,
        request: Request,
        body: Addressed,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        prefix: str,
        shown: Collection[int] = (),
        pictures: PromptPictures | None = None,
    ) -> Answer:
        """Queue the prompts in the engine; whoever gets the answer must close it. Its id begins
        with `prefix`; special tokens in `shown` are part of its text, `pictures` of its prompt.

        Raises RequestError, 409 for a `request_id` that is at work already.
        """
        self.limits.admit()  # others may have come while it was read
        self.limits.check_tokens(prompts, params, self.loaded.config.max_model_len)
        adapter = self._adapter(body.model)
        owner, name = self.owner(request), given_id(prefix, body.request_id)
        if any((other.owner, other.id) == (owner, name) for other in self.engine.answers):
            raise RequestError(
                f"a request {name!r} is at work already; choose another request_id",
                param="request_id",
                status=409,
            )
        answer = self.engine.submit(
            prompts,
            params,
            Order(priority=body.priority or 0, cache_salt=self._cache_salt(request, body)),
            adapter=adapter,
            shown=shown,
            pictures=pictures,
        )
        answer.owner, answer.id = owner, name
        return answer

    def name_of(self, body: Addressed) -> str:
        """What answers call the model that a request names."""
        return self._adapter(body.model) or self.name

    def _adapter(self, model: str | None) -> str | None:
        """What the request's `model` names: an adapter, or (None) the model itself.

        Other names mean the model too where none was given to it, unless there may be adapters: a
        misspelt one would be answered by the wrong weights.
        """
        if model in self.engine.adapters:
            return model
        given = self.config.served_model_name
        known = set(self.names) if given else {self.name, "default", None}
        if (given or self.loaded.config.enable_lora) and model not in known:
            names = ", ".join(map(repr, [*self.names, *self.engine.adapters]))
            raise RequestError(
                f"there is no model {str(model)[:200]!r} here; use {names}",
                param="model",
                status=404,
            )
        return None

    async def load_adapter(self, request: Request) -> Response:
        body = validated(adapters.LoadRequest, read_json(await self.read(request)))
        adapters.check_is_not_the_model(body.lora_name, self.names)
        await adapters.load(self.engine, body, self.config.lora_root)
        return JSONResponse(self._card(body.lora_name, parent=self.name))

    async def unload_adapter(self, request: Request) -> Response:
        body = validated(adapters.UnloadRequest, read_json(await self.read(request)))
        await self.engine.unload_adapter(body.lora_name)
        return JSONResponse({"id": body.lora_name, "object": "model", "deleted": True})

    def owner(self, request: Request) -> str:
        """Whose request it is: a digest of what it is let in by. Who may see or end what depends on
        it; without keys all are one.
        """
        return request.state.tenant or ""

    def _cache_salt(self, request: Request, body: Addressed) -> str | None:
        """What keeps the cached texts of one tenant from another: its key, and what it adds."""
        key = request.state.tenant
        if key is None and body.cache_salt is None:
            return None
        return json.dumps([key, body.cache_salt])

    async def read(self, request: Request) -> bytes:
        """The body; see `connection.read_body`."""
        most = self.config.max_body_mib
        return await read_body(request, most * 2**20, f"the body is longer than {most} MiB")

    def models(self) -> dict[str, Any]:
        cards = [self._card(name) for name in self.names]
        cards += [self._card(name, parent=self.name) for name in self.engine.adapters]
        return {"object": "list", "data": cards}

    def model(self, name: str) -> dict[str, Any]:
        """The card of one model. Raises RequestError if there is none of that name."""
        for card in self.models()["data"]:
            if card["id"] == name:
                return card
        raise RequestError(f"there is no model {name[:200]!r} here", param="model", status=404)

    def _card(self, name: str, parent: str | None = None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": "FastDeploy",
            "root": self.name,
            "parent": parent,
            "max_model_len": self.loaded.config.max_model_len,
            "input_modalities": ["text", *sorted(self.reads)],
            "permission": [],
        }


def create_app(
    engine_config: EngineConfig, config: ServerConfig, spawn: Callable[[], Child] = spawn
) -> FastAPI:
    """The server's routes; its lifespan starts the engine, without waiting for it, and stops it.

    Raises ConfigError and what reading the tokenizer raises.
    """
    service = Service(engine_config, config, spawn)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        logging_task = asyncio.create_task(log_progress(service.engine))
        yield
        logging_task.cancel()
        await service.grammars.close()
        await service.pictures.close()
        await service.engine.stop()

    # No pages of its own: bodies are read by `protocol`, not by the framework.
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    open_paths = OPEN_PATHS | (PAGE_PATHS if config.web else frozenset())
    guard(app, config, service.limits, service.observer, open_paths)
    _add_error_handlers(app, service.limits)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await service.answer(request, ChatRequest, ChatReply)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await service.answer(request, CompletionRequest, CompletionReply)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse(service.models())

    add_health(app, service.engine)
    add_about(app, service)
    add_pooling(app, service)
    add_responses(app, service)
    add_messages(app, service)
    add_tokenise(app, service)
    if config.web:
        add_page(app)
    if config.enable_control_api:
        add_control(app, service.engine, service.read)
    if engine_config.enable_lora:
        app.post("/v1/load_lora_adapter")(service.load_adapter)
        app.post("/v1/unload_lora_adapter")(service.unload_adapter)

    add_openapi(app, service, OPEN_PATHS)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    for route in app.routes:
        if isinstance(route, Route) and route.methods and "GET" in route.methods:
            route.methods.add("HEAD")  # probes ask so; nothing but the head is sent
    return app


def _add_error_handlers(app: FastAPI, limits: Limits) -> None:
    """Every error in the form of its route; what the user did not cause says nothing of our
    insides.
    """

    def body(
        request: Request,
        message: str,
        status: int,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        headers = dict(headers or {})
        if status == 503:
            headers["retry-after"] = "1"
        if status == 429:
            headers["retry-after"] = str(limits.retry_after_s())
        if status in (408, 413):
            headers["connection"] = "close"  # or what is left of the body would come in
        if status == 500 and (origin := ORIGIN.get()):  # it is answered outside of all else
            headers["x-request-id"] = origin.request_id
        said = error_at(request.url.path, error_body(message, status, param))
        return JSONResponse(said, status, headers=headers)

    @app.exception_handler(RequestError)
    @app.exception_handler(ChatError)
    @app.exception_handler(MediaError)
    @app.exception_handler(TokenizerError)
    async def user_error(request: Request, error: ValueError) -> Response:
        param = (
            "messages"
            if isinstance(error, (ChatError, MediaError))
            else getattr(error, "param", None)
        )
        return body(request, str(error), getattr(error, "status", 400), param)

    @app.exception_handler(ClientDisconnect)
    @app.exception_handler(Disconnected)
    async def gone(_: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        headers = dict(error.headers or {})
        if error.status_code == 405:  # the framework names the methods of one route, not of all
            routes = [r for r in app.routes if r.matches(request.scope)[0] is not Match.NONE]
            methods = {m for route in routes for m in getattr(route, "methods", None) or ()}
            headers["allow"] = ", ".join(sorted(methods))
        return body(request, message, error.status_code, headers=headers)

    @app.exception_handler(Exception)
    async def our_error(request: Request, error: Exception) -> Response:
        log.error("an error of ours", exc_info=error)
        return body(request, "internal error; the server's log has the details", 500)
