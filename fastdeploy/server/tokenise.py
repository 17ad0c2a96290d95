"""`/tokenize`, `/detokenize` and the prompt that a chat request becomes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict

from ernie.chat.messages import pictures_of
from fastdeploy.engine.prompt import chat_inputs, chat_prompt
from fastdeploy.errors import RequestError
from fastdeploy.server.protocol import ChatRequest, parse, read_json, with_extras

if TYPE_CHECKING:
    from fastdeploy.server.app import Service


class TokenizeRequest(BaseModel):
    """A `prompt`, or the `messages` of a chat. Nothing is added to a prompt, as in completions;
    `add_special_tokens` puts the token in front that begins a text.
    """

    model_config = ConfigDict(strict=True, extra="allow")
    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = False
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = False


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    model: str | None = None
    tokens: list[int]


def add_tokenise(app: FastAPI, service: Service) -> None:
    tokenizer = service.tokenizer

    @app.post("/tokenize")
    @app.post("/v1/tokenize")
    async def tokenize(request: Request) -> Response:
        body = with_extras(TokenizeRequest, read_json(await service.read(request)))
        ids = await token_ids(body, service)
        return JSONResponse(described(service, ids, body.return_token_strs))

    @app.post("/detokenize")
    @app.post("/v1/detokenize")
    async def detokenize(request: Request) -> Response:
        body = with_extras(DetokenizeRequest, read_json(await service.read(request)))
        for token in body.tokens:
            if not 0 <= token < tokenizer.vocab_size:
                raise RequestError(
                    f"tokens has {token}; ids end at {tokenizer.vocab_size - 1}", param="tokens"
                )
        return JSONResponse({"prompt": tokenizer.decode(body.tokens)})

    @app.post("/v1/chat/completions/render")
    async def render(request: Request) -> Response:
        body = parse(ChatRequest, read_json(await service.read(request)))
        ids = await service.prompt_of(body)
        return JSONResponse({"prompt": tokenizer.decode(ids), **described(service, ids)})


async def token_ids(body: TokenizeRequest, service: Service) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("send either prompt or messages", param="prompt")
    if body.messages is not None:
        options = body.chat_template_kwargs or {}
        arguments = service.loaded.template, service.tokenizer, body.messages, None, options
        ends: dict[str, Any] = {"add_generation_prompt": body.add_generation_prompt}
        processor = service.pictures.processor
        if processor is None or not pictures_of(body.messages):
            return chat_prompt(*arguments, **ends)
        read = partial(chat_inputs, processor, *arguments, **ends)
        return (await service.pictures.in_thread(read)).token_ids
    ids = service.tokenizer.encode(body.prompt or "")
    if not body.add_special_tokens:
        return ids
    if service.tokenizer.bos_id is None:
        raise RequestError(
            "this model has no token that begins a text; leave out add_special_tokens",
            param="add_special_tokens",
        )
    return [service.tokenizer.bos_id, *ids]


def described(service: Service, ids: list[int], strings: bool | None = False) -> dict[str, Any]:
    """Token ids in vLLM's form, with the text of each one if `strings`."""
    return {
        "count": len(ids),
        "max_model_len": service.loaded.config.max_model_len,
        "tokens": ids,
        "token_strs": [service.tokenizer.decode([i]) for i in ids] if strings else None,
    }
