"""`/openapi.json`: what can be asked of this server, as a document.

Bodies are read by our own models, not by the framework, so it is made here: from these models, the
ranges of `fastdeploy.sampling` and the table of routes below. A route without a row is an error of
ours, and a test says so.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import fastdeploy
from fastdeploy.sampling import ABOVE, INTEGERS, NUMBERS
from fastdeploy.server import adapters
from fastdeploy.server.about import AbortRequest
from fastdeploy.server.messages_request import CountRequest, MessagesRequest
from fastdeploy.server.pooling import EmbeddingRequest, RerankRequest, ScoreRequest
from fastdeploy.server.protocol import ChatRequest, CompletionRequest
from fastdeploy.server.response_request import ResponseRequest
from fastdeploy.server.responses import MAX_PAGE
from fastdeploy.server.tokenise import DetokenizeRequest, TokenizeRequest

if TYPE_CHECKING:
    from fastdeploy.server.app import Service

Schema = dict[str, Any]

JSON, EVENTS, TEXT = "application/json", "text/event-stream", "text/plain"
# What can go wrong with any request; 401 comes with keys, 499 is seen by nobody.
ERRORS = {
    "400": "Something about the request is wrong; `param` says what.",
    "404": "There is no such thing here.",
    "409": "It is at odds with what is at work.",
    "413": "The body is too long.",
    "429": "Too many requests are in work; come back later.",
    "500": "An error of ours.",
    "503": "The engine rests, or has stopped.",
}


def an_object(*required: str) -> Schema:
    return {"type": "object", "required": list(required)}


def operation_id(method: str, path: str) -> str:
    return method.lower() + path.translate(str.maketrans("/-.{}", "_____"))


# Of a stream: each event, whose data is JSON, or [DONE] at the end.
EVENT = an_object("data") | {
    "properties": {"data": {"type": "string"}, "event": {"type": "string"}}
}
STATE = an_object("is_paused", "is_sleeping")
TOKENS = an_object("count", "max_model_len", "tokens")
VECTORS = an_object("id", "object", "created", "model", "data", "usage")
RESPONSE = an_object("id", "object", "created_at", "status", "model", "output")
MESSAGE = an_object("id", "type", "role", "model", "content", "stop_reason", "usage")
CARD = an_object("id", "object", "created", "owned_by", "max_model_len")


@dataclass(frozen=True, slots=True)
class Row:
    """One operation: what it is for, its body and its answer; `query` by name."""

    summary: str
    body: type[BaseModel] | Schema | None = None
    answer: Schema | str | None = None  # a str: a media type other than JSON
    streams: bool = False
    query: dict[str, Schema] = field(default_factory=dict)
    links: dict[str, Schema] = field(default_factory=dict)  # what can be done with the answer


PAGE: Schema = {
    "limit": {"type": "integer", "minimum": 1, "maximum": MAX_PAGE},
    "order": {"enum": ["asc", "desc"]},
    "after": {"type": "string"},
}
FOLLOW: Schema = {
    "stream": {"type": "boolean"},
    "starting_after": {"type": "integer", "minimum": -1, "maximum": 10**9 - 1},
}
FOLDER: Schema = {"type": "object", "properties": {"path": {"type": "string"}}}
TAGS: Schema = {"tags": {"enum": ["weight,kv_cache", "kv_cache,weight"]}}

LINKS = {
    name: {
        "operationId": operation_id(method, f"/v1/responses/{{response_id}}{rest}"),
        "parameters": {"response_id": "$response.body#/id"},
    }
    for name, method, rest in (
        ("get", "get", ""),
        ("items", "get", "/input_items"),
        ("cancel", "post", "/cancel"),
        ("delete", "delete", ""),
    )
}

ROWS: dict[str, Row] = {
    "POST /v1/chat/completions": Row(
        "Answer a conversation.", ChatRequest, an_object("id", "choices", "usage"), True
    ),
    "POST /v1/completions": Row(
        "Continue texts.", CompletionRequest, an_object("id", "choices", "usage"), True
    ),
    "POST /v1/chat/completions/render": Row("The prompt of a chat.", ChatRequest, TOKENS),
    "POST /v1/responses": Row(
        "Answer, and remember it.", ResponseRequest, RESPONSE, True, links=LINKS
    ),
    "GET /v1/responses/{response_id}": Row(
        "A response as it stands.", answer=RESPONSE, streams=True, query=FOLLOW
    ),
    "DELETE /v1/responses/{response_id}": Row(
        "Forget a response.", answer=an_object("id", "object", "deleted")
    ),
    "POST /v1/responses/{response_id}/cancel": Row(
        "End a response that is made in the background.", answer=RESPONSE
    ),
    "GET /v1/responses/{response_id}/input_items": Row(
        "What a response was given.", answer=an_object("object", "data", "has_more"), query=PAGE
    ),
    "POST /v1/messages": Row("Answer, in Anthropic's form.", MessagesRequest, MESSAGE, True),
    "POST /v1/messages/count_tokens": Row(
        "How many tokens a request to /v1/messages has.", CountRequest, an_object("input_tokens")
    ),
    "POST /v1/embeddings": Row("Texts as vectors.", EmbeddingRequest, VECTORS),
    "POST /rerank": Row("Order documents by a query.", RerankRequest, an_object("results")),
    "POST /score": Row("How near texts are.", ScoreRequest, VECTORS),
    "POST /tokenize": Row("Texts as token ids.", TokenizeRequest, TOKENS),
    "POST /detokenize": Row("Token ids as text.", DetokenizeRequest, an_object("prompt")),
    "GET /v1/models": Row("The model and its adapters.", answer=an_object("object", "data")),
    "GET /v1/models/{name}": Row("One model.", answer=CARD),
    "POST /v1/abort_requests": Row("End requests.", AbortRequest, an_object("aborted")),
    "GET /version": Row("The server's version.", answer=an_object("version")),
    "GET /config-info": Row("The settings in force.", answer=an_object("max_model_len")),
    "GET /load": Row("How much is going on.", answer=an_object("server_load")),
    "GET /live": Row("200 while the server's own loop works."),
    "GET /ready": Row("200 while requests are served, else 503 and why."),
    "GET /health": Row("200 while the engine works, also paused, else 503 and why."),
    "GET /ping": Row("As /health."),
    "POST /ping": Row("As /health."),
    "GET /metrics": Row("Figures for Prometheus.", answer=TEXT),
    "GET /openapi.json": Row("This document.", answer=an_object("openapi")),
    "GET /v1/is_paused": Row("Whether the engine rests.", answer=STATE),
    "POST /v1/pause": Row(
        "Take no requests.", answer=STATE, query={"mode": {"enum": ["abort", "keep"]}}
    ),
    "POST /v1/resume": Row("Go on.", answer=STATE),
    "POST /v1/sleep": Row(
        "Give memory back.", answer=STATE, query={"level": {"enum": [1, 2]}, **TAGS}
    ),
    "POST /v1/wakeup": Row("End of sleep.", answer=STATE, query=TAGS),
    "POST /v1/reset_prefix_cache": Row("Forget cached texts.", answer=STATE),
    "POST /v1/update_weights": Row("Go on with other weights.", FOLDER, STATE),
    "POST /v1/load_lora_adapter": Row("Offer an adapter.", adapters.LoadRequest, CARD),
    "POST /v1/unload_lora_adapter": Row(
        "Offer it no longer.", adapters.UnloadRequest, an_object("id", "deleted")
    ),
}
ROWS |= {
    f"POST /v1{path}": ROWS[f"POST {path}"]
    for path in ("/rerank", "/score", "/tokenize", "/detokenize")
}


def add_openapi(app: FastAPI, service: Service, open_paths: frozenset[str]) -> None:
    """`open_paths` take no key."""

    @app.get("/openapi.json")
    async def openapi() -> Response:
        return JSONResponse(document(app, open_paths, needs_key=service.config.has_key))


def document(app: FastAPI, open_paths: frozenset[str], *, needs_key: bool) -> Schema:
    """The document of an app's routes. Raises KeyError for one without a row."""
    paths: dict[str, Schema] = {}
    bodies = {row.body for row in ROWS.values() if isinstance(row.body, type)}
    _, schemas = models_json_schema(
        [(body, "validation") for body in sorted(bodies, key=lambda body: body.__name__)],
        ref_template="#/components/schemas/{model}",
    )
    for route in app.routes:
        if isinstance(route, APIRoute) and route.include_in_schema:
            for method in sorted((route.methods or set()) - {"HEAD"}):  # GET without a body
                path = route.path_format
                row = ROWS[f"{method} {path}"]
                operation = _operation(row, path, needs_key and path not in open_paths)
                operation["operationId"] = operation_id(method, path)
                paths.setdefault(path, {})[method.lower()] = operation
    components: Schema = {"schemas": _with_ranges(schemas["$defs"]) | {"Error": ERROR}}
    if needs_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "FastDeploy", "version": fastdeploy.__version__},
        "paths": paths,
        "components": components,
    }


ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}


def _operation(row: Row, path: str, needs_key: bool) -> Schema:
    errors = ERRORS | ({"401": "The key is missing or wrong."} if needs_key else {})
    said = {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
    responses = {code: {"description": text, "content": said} for code, text in errors.items()}
    operation: Schema = {
        "summary": row.summary,
        "parameters": list(_parameters(row, path)),
        "responses": {"200": _success(row), **responses},
    }
    if row.body is not None:
        schema, is_model = row.body, False
        if isinstance(row.body, type):
            schema, is_model = {"$ref": f"#/components/schemas/{row.body.__name__}"}, True
        operation["requestBody"] = {"required": is_model, "content": {JSON: {"schema": schema}}}
    if needs_key:
        operation["security"] = [{"key": []}]
    return operation


def _success(row: Row) -> Schema:
    content: Schema = {}
    if isinstance(row.answer, str):
        content[row.answer] = {"schema": {"type": "string"}}
    elif row.answer is not None:
        content[JSON] = {"schema": row.answer}
    if row.streams:
        content[EVENTS] = {"schema": EVENT}
    said = {"description": "As asked.", "content": content, "links": row.links}
    return {name: value for name, value in said.items() if value}


def _parameters(row: Row, path: str) -> Iterator[Schema]:
    for part in path.split("/"):
        if part.startswith("{"):
            schema = {"type": "string", "minLength": 1}
            yield {"name": part[1:-1], "in": "path", "required": True, "schema": schema}
    for name, schema in row.query.items():
        yield {"name": name, "in": "query", "required": False, "schema": schema}


def _with_ranges(schemas: dict[str, Schema]) -> dict[str, Schema]:
    """What `SamplingParams` checks, said in the fields of the bodies."""
    schemas = copy.deepcopy(schemas)
    for name in (ChatRequest.__name__, CompletionRequest.__name__):
        for key, schema in schemas[name]["properties"].items():
            for kind, ranges in (("integer", INTEGERS), ("number", NUMBERS)):
                for one in schema.get("anyOf", ()) if key in ranges else ():
                    if one.get("type") == kind:
                        low, high = ranges[key]
                        one["exclusiveMinimum" if key in ABOVE else "minimum"] = low
                        one |= {} if high is None else {"maximum": high}
    return schemas
