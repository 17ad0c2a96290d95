"""`/v1/chat/completions`: messages to a prompt, pieces to chat messages."""

from __future__ import annotations

from typing import Any

from fastdeploy.engine.loading import Loaded
from fastdeploy.engine.prompt import chat_prompt
from fastdeploy.errors import RequestError
from fastdeploy.outputs import CompletionOutput, Logprob, TokenLogprobs
from fastdeploy.server.engine import Piece
from fastdeploy.server.protocol import ChatRequest
from fastdeploy.server.reply import Reply, likeliest


def chat_prompts(body: ChatRequest, loaded: Loaded) -> list[list[int]]:
    """The one prompt of a chat request."""
    if body.prompt_token_ids is not None:
        return [body.prompt_token_ids]
    if not body.messages:
        raise RequestError("messages is empty; send at least one", param="messages")
    options = body.chat_template_kwargs or {}
    return [chat_prompt(loaded.template, loaded.tokenizer, body.messages, None, options)]


class ChatReply(Reply):
    id_prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def first_choices(self) -> list[dict[str, Any]]:
        role = {"role": "assistant", "content": ""}
        return [self._event(i, role, None) for i in range(len(self.num_generated))]

    def delta(self, piece: Piece) -> dict[str, Any] | None:
        completion = piece.completion
        if not self.has_news(completion):
            return None
        delta = {"content": completion.text} if completion.text else {}
        delta |= self.tokens(piece.choice, completion)
        event = self._event(piece.choice, delta, completion.finish_reason)
        event["logprobs"] = self._logprobs(completion)
        return event | self.scores(piece.choice)

    def choice(self, completion: CompletionOutput) -> dict[str, Any]:
        return {
            "index": completion.index,
            "message": {
                "role": "assistant",
                "content": completion.text,
                **self.tokens(completion.index, completion),
            },
            "logprobs": self._logprobs(completion),
            "finish_reason": completion.finish_reason,
            **self.scores(completion.index),
        }

    def _event(self, index: int, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}

    def _logprobs(self, completion: CompletionOutput) -> dict[str, Any] | None:
        if completion.logprobs is None:
            return None
        return {"content": [self._token(entry) for entry in completion.logprobs]}

    def _token(self, entry: TokenLogprobs) -> dict[str, Any]:
        token, own = next(iter(entry.items()))
        top = likeliest(entry, self.context.num_top)
        return {
            **self._described(token, own),
            "top_logprobs": [self._described(other, value) for other, value in top],
        }

    def _described(self, token: int, value: Logprob) -> dict[str, Any]:
        return {
            "token": self.name_of(token, value.decoded_token),
            "logprob": value.logprob,
            "bytes": list(self.context.tokenizer.join_bytes([token])),
        }
