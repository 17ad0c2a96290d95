"""The events of `/v1/messages`, made from those of a chat stream.

    chat    delta.reasoning_content    delta.content    delta.tool_calls
    block   thinking                   text             tool_use

One machine writes streamed and whole messages: a whole one is what stands at the end.
"""

from __future__ import annotations

import copy
import json
import uuid
from collections.abc import AsyncIterator, Collection, Iterator
from typing import Any

Event = dict[str, Any]

_FIELD = {"text": "text", "thinking": "thinking"}  # of a block, and of its deltas
# An abort from outside cuts an answer as well; the form has no word of its own for it.
_STOP = {"tool_calls": "tool_use", "length": "max_tokens", "abort": "max_tokens"}
_KIND_BY_CODE = {"not_found": "not_found_error", "request_too_large": "request_too_large"}
PATH = "/v1/messages"


def empty_message(model: str, num_prompt: int) -> dict[str, Any]:
    """The object before anything has been written."""
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage_of({"prompt_tokens": num_prompt, "completion_tokens": 0}),
    }


def usage_of(usage: dict[str, Any]) -> dict[str, Any]:
    """A chat's usage in the words of messages, where cached tokens are no input tokens."""
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage["completion_tokens"],
    }


def error_at(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """An error (see `reply.error_body`) in the words of the route that it is about."""
    return error_of(body["error"]) if path.startswith(PATH) else body


def error_of(error: dict[str, Any]) -> dict[str, Any]:
    """An error of ours in the form's words."""
    kind = "api_error" if error["type"] == "server_error" else error["type"]
    return {"type": "error", "error": {**error, "type": _KIND_BY_CODE.get(error["code"], kind)}}


class MessageWriter:
    """Fed with the chunks of a chat stream; `message` is the object as it stands."""

    def __init__(self, message: dict[str, Any], stop_sequences: Collection[str]) -> None:
        self.message, self.stop_sequences = message, stop_sequences
        self.block: dict[str, Any] | None = None  # the open one, the last of the content
        self.arguments = ""  # of the call that the open block is
        self.error: dict[str, Any] | None = None

    async def events(self, chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[Event]:
        """Everything from the first event to the last one."""
        yield {"type": "message_start", "message": copy.deepcopy(self.message)}
        async for chunk in chunks:
            for event in self._push(chunk):
                yield event
        for event in self._end():
            yield event

    def _push(self, chunk: dict[str, Any]) -> Iterator[Event]:
        self.error = chunk.get("error") or self.error
        if chunk.get("usage"):
            self.message["usage"] = usage_of(chunk["usage"])
        for choice in chunk.get("choices", ()):
            delta = choice["delta"]
            calls = delta.get("tool_calls") or ()
            for call in calls:
                if "id" not in call:  # the rest of one, before what follows it
                    yield from self._call(call)
            if delta.get("reasoning_content"):
                yield from self._text("thinking", delta["reasoning_content"])
            if delta.get("content"):
                yield from self._text("text", delta["content"])
            for call in calls:
                if "id" in call:
                    yield from self._call(call)
            if choice["finish_reason"] is not None:
                self._stop(choice["finish_reason"], choice.get("stop_reason"))

    def _stop(self, reason: str, by: Any) -> None:
        self.message["stop_reason"] = _STOP.get(reason, "end_turn")
        if reason == "stop" and by in self.stop_sequences:
            self.message |= {"stop_reason": "stop_sequence", "stop_sequence": by}

    def _text(self, kind: str, text: str) -> Iterator[Event]:
        if self.block is None or self.block["type"] != kind:
            signature = {"signature": ""} if kind == "thinking" else {}  # there is none
            yield from self._open({"type": kind, _FIELD[kind]: "", **signature})
        assert self.block is not None
        self.block[_FIELD[kind]] += text
        yield self._event("delta", delta={"type": f"{kind}_delta", _FIELD[kind]: text})

    def _call(self, call: dict[str, Any]) -> Iterator[Event]:
        """A tool call, or more of its arguments."""
        function = call.get("function", {})
        if call.get("id"):
            block = {"type": "tool_use", "id": call["id"], "name": function["name"], "input": {}}
            yield from self._open(block)
        if function.get("arguments"):
            self.arguments += function["arguments"]
            delta = {"type": "input_json_delta", "partial_json": function["arguments"]}
            yield self._event("delta", delta=delta)

    def _open(self, block: dict[str, Any]) -> Iterator[Event]:
        yield from self._close()
        self.block, self.arguments = block, ""
        self.message["content"].append(block)
        yield self._event("start", content_block=dict(block))

    def _close(self) -> Iterator[Event]:
        if self.block is None:
            return
        yield self._event("stop")
        if self.block["type"] == "tool_use":
            try:
                self.block["input"] = json.loads(self.arguments)
            except ValueError:  # it was cut: a whole message has it as text
                self.message["content"][-1] = {"type": "text", "text": self.arguments}
        self.block = None

    def _end(self) -> Iterator[Event]:
        if self.error is not None:
            yield error_of(self.error)
            return
        yield from self._close()
        delta = {name: self.message[name] for name in ("stop_reason", "stop_sequence")}
        yield {"type": "message_delta", "delta": delta, "usage": self.message["usage"]}
        yield {"type": "message_stop"}

    def _event(self, what: str, **fields: Any) -> Event:
        index = len(self.message["content"]) - 1
        return {"type": f"content_block_{what}", "index": index, **fields}
