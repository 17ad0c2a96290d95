"""`/v1/embeddings`, `/v1/rerank`, `/v1/score`: texts as vectors, and how near they are.

There is no model of its own behind the last two: both are the cosine of the texts' vectors. See
`fastdeploy.vectors` for what these are worth.
"""

from __future__ import annotations

import base64
import struct
import time
from typing import TYPE_CHECKING, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from fastdeploy.engine.prompt import chat_prompt
from fastdeploy.errors import RequestError
from fastdeploy.sampling import SamplingParams
from fastdeploy.server.engine import Answer
from fastdeploy.server.protocol import Addressed, Kind, read_json, with_extras
from fastdeploy.server.stream import while_connected
from fastdeploy.vectors import cosine, shaped

if TYPE_CHECKING:
    from fastdeploy.server.app import Service


class PooledRequest(Addressed):
    pooling: Literal["mean", "last"] = "mean"
    # Longer texts keep their last so many tokens; -1: as many as the model reads; none: refused.
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)


class EmbeddingRequest(PooledRequest):
    input: str | list[int] | list[str] | list[list[int]] | None = None
    messages: list[dict[str, Any]] | None = None  # one chat instead of `input`
    chat_template_kwargs: dict[str, Any] | None = None
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: int | None = Field(default=None, ge=1)
    normalize: bool | None = True


class Document(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    text: str


class RerankRequest(PooledRequest):
    query: str
    documents: list[str | Document] = Field(min_length=1)
    top_n: int | None = Field(default=None, ge=1)
    return_documents: bool = True


class ScoreRequest(PooledRequest):
    """One text against each of several, or two lists of the same length side by side."""

    text_1: str | list[str]
    text_2: str | list[str]


def add_pooling(app: FastAPI, service: Service) -> None:
    async def read(kind: type[Kind], request: Request) -> Kind:
        service.metrics.requests.inc()
        service.limits.admit()
        return with_extras(kind, read_json(await service.read(request)))

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        body = await read(EmbeddingRequest, request)

        def answer(vectors: list[list[float]]) -> dict[str, Any]:
            normalize = body.normalize is not False
            rows = [shaped(vector, body.dimensions, normalize) for vector in vectors]
            encode = base64_floats if body.encoding_format == "base64" else list
            data = [
                {"object": "embedding", "index": i, "embedding": encode(row)}
                for i, row in enumerate(rows)
            ]
            return {"object": "list", "data": data}

        return await pooled(
            service, request, body, embedding_prompts(body, service), "embd", answer
        )

    @app.post("/rerank")
    @app.post("/v1/rerank")
    async def rerank(request: Request) -> Response:
        body = await read(RerankRequest, request)
        texts = [one if isinstance(one, str) else one.text for one in body.documents]
        prompts = [service.tokenizer.encode(text) for text in (body.query, *texts)]

        def answer(vectors: list[list[float]]) -> dict[str, Any]:
            scores = [cosine(vectors[0], vector) for vector in vectors[1:]]
            order = sorted(range(len(texts)), key=lambda i: -scores[i])[: body.top_n]
            results: list[dict[str, Any]] = [
                {"index": i, "relevance_score": scores[i]} for i in order
            ]
            for result in results if body.return_documents else ():
                result["document"] = {"text": texts[result["index"]]}
            return {"results": results}

        return await pooled(service, request, body, prompts, "rerank", answer)

    @app.post("/score")
    @app.post("/v1/score")
    async def score(request: Request) -> Response:
        body = await read(ScoreRequest, request)
        left, right = as_pairs(body)
        prompts = [service.tokenizer.encode(text) for text in (*left, *right)]

        def answer(vectors: list[list[float]]) -> dict[str, Any]:
            firsts, seconds = vectors[: len(left)], vectors[len(left) :]
            firsts = firsts * (len(seconds) // len(firsts))
            scores = [cosine(a, b) for a, b in zip(firsts, seconds, strict=True)]
            data = [
                {"object": "score", "index": i, "score": value} for i, value in enumerate(scores)
            ]
            return {"object": "list", "data": data}

        return await pooled(service, request, body, prompts, "score", answer)


async def pooled(
    service: Service,
    request: Request,
    body: PooledRequest,
    prompts: list[list[int]],
    prefix: str,
    answer_of: Any,
) -> Response:
    """The vectors of the prompts, made by the engine and put into an answer by `answer_of`."""
    longest = body.truncate_prompt_tokens
    if longest is not None:
        most = service.loaded.config.max_model_len - 1
        longest = most if longest == -1 else longest
        if not 1 <= longest <= most:
            raise RequestError(
                f"truncate_prompt_tokens={longest} is out of range; it takes 1 to {most}, or -1",
                param="truncate_prompt_tokens",
            )
        prompts = [ids[-longest:] for ids in prompts]
    name = service.name_of(body)  # now: its adapter may be unloaded meanwhile
    answer = service.submit(request, body, prompts, SamplingParams(pooling=body.pooling), prefix)
    try:
        vectors = await while_connected(request.receive, collected(answer))
    finally:
        answer.close()
    num_tokens = sum(map(len, prompts))
    return JSONResponse(
        {
            "id": answer.id,
            "created": int(time.time()),
            "model": name,
            **answer_of(vectors),
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }
    )


async def collected(answer: Answer) -> list[list[float]]:
    """The vector of each prompt, in order."""
    vector_by_choice: dict[int, list[float]] = {}
    async for piece in answer.pieces():
        if piece.vector is None:
            raise RequestError("the request was aborted")
        vector_by_choice[piece.choice] = piece.vector
    return [vector_by_choice[i] for i in range(answer.num_choices)]


def embedding_prompts(body: EmbeddingRequest, service: Service) -> list[list[int]]:
    if (body.input is None) == (body.messages is None):
        raise RequestError("send either input or messages", param="input")
    if body.messages is not None:
        options = body.chat_template_kwargs or {}
        template, tokenizer = service.loaded.template, service.tokenizer
        return [
            chat_prompt(
                template, tokenizer, body.messages, None, options, add_generation_prompt=False
            )
        ]
    if not body.input:
        raise RequestError("input is empty; send a text or token ids", param="input")
    if isinstance(body.input, str):
        return [service.tokenizer.encode(body.input)]
    if isinstance(body.input[0], int):
        return [list(body.input)]
    return [
        service.tokenizer.encode(one) if isinstance(one, str) else list(one) for one in body.input
    ]


def as_pairs(body: ScoreRequest) -> tuple[list[str], list[str]]:
    """Texts to compare: the first list has one entry, or as many as the second."""
    left = [body.text_1] if isinstance(body.text_1, str) else body.text_1
    right = [body.text_2] if isinstance(body.text_2, str) else body.text_2
    if not left or not right:
        raise RequestError("a list of texts is empty; send at least one", param="text_1")
    if len(left) not in (1, len(right)):
        raise RequestError(
            f"text_1 has {len(left)} texts and text_2 {len(right)}; send one against several, or "
            "as many as there",
            param="text_1",
        )
    return left, right


def base64_floats(vector: list[float]) -> str:
    """Little-endian float32, as OpenAI packs them."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
