"""The events of a response, made from those of a chat stream.

    chat    delta.reasoning_content    delta.content    delta.tool_calls
    item    reasoning                  message          function_call

One machine writes streamed and whole answers: a whole one is what stands at the end. Items follow
each other; one is open at a time.
"""

from __future__ import annotations

import copy
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

Event = dict[str, Any]

_PART = {"message": "output_text", "reasoning": "reasoning_text"}  # of an item's content
_CUT = {"length": "max_output_tokens", "content_filter": "content_filter"}
# The kinds of errors that are the request's own; all others are the server's.
_CODE = {"invalid_request_error": "invalid_prompt", "rate_limit_error": "rate_limit_exceeded"}


def new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


class ResponseWriter:
    """Fed with the chunks of a chat stream; `response` is the object as it stands."""

    def __init__(self, response: dict[str, Any]) -> None:
        self.response = response
        self.num_events = 0
        self.item: dict[str, Any] | None = None  # the open one, the last of the output
        self.call_index: int | None = None  # of the tool call that the open item is
        self.reason: str | None = None
        self.error: dict[str, Any] | None = None

    async def events(self, chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[Event]:
        """Everything from the first event to the last one."""
        yield self._event("response.created", response=self._snapshot())
        if self.response["background"]:
            yield self._event("response.queued", response=self._snapshot())
        self.response["status"] = "in_progress"
        yield self._event("response.in_progress", response=self._snapshot())
        async for chunk in chunks:
            for event in self._push(chunk):
                yield event
        for event in self._end():
            yield event

    def _push(self, chunk: dict[str, Any]) -> Iterator[Event]:
        self.error = chunk.get("error") or self.error
        if chunk.get("usage"):
            self.response["usage"] = usage_of(chunk["usage"])
        for choice in chunk.get("choices", ()):
            self.reason = choice["finish_reason"] or self.reason
            delta = choice["delta"]
            logprobs = (choice.get("logprobs") or {}).get("content") or []
            calls = delta.get("tool_calls") or ()
            for call in calls:
                if "id" not in call:  # the rest of one, before what follows it
                    yield from self._call(call)
            if delta.get("reasoning_content"):
                yield from self._text("reasoning", delta["reasoning_content"], [])
            goes_on = self.item is not None and self.item["type"] == "message"
            if delta.get("content") or (logprobs and (goes_on or not calls)):
                yield from self._text("message", delta.get("content") or "", logprobs)
            for call in calls:
                if "id" in call:
                    yield from self._call(call)

    def _text(self, kind: str, text: str, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        """More text of the answer, or of its thoughts."""
        if self.item is None or self.item["type"] != kind:
            yield from self._close()
            yield from self._open_text(kind)
        assert self.item is not None
        part = self.item["content"][0]
        part["text"] += text
        extra: dict[str, Any] = {}
        if kind == "message":
            part["logprobs"] += logprobs
            extra["logprobs"] = logprobs
        name = f"response.{_PART[kind]}.delta"
        yield self._event(name, **self._place(), content_index=0, delta=text, **extra)

    def _open_text(self, kind: str) -> Iterator[Event]:
        item: dict[str, Any] = {"type": kind, "status": "in_progress", "content": []}
        if kind == "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item |= {"id": new_id("msg"), "role": "assistant"}
        else:
            part = {"type": "reasoning_text", "text": ""}
            item |= {"id": new_id("rs"), "summary": []}
        yield from self._open(item)
        item["content"].append(part)
        yield self._event(
            "response.content_part.added",
            **self._place(),
            content_index=0,
            part=copy.deepcopy(part),
        )

    def _call(self, call: dict[str, Any]) -> Iterator[Event]:
        """A tool call, or more of its arguments."""
        function = call.get("function", {})
        if self.item is None or self.call_index != call["index"]:
            yield from self._close()
            item = {"type": "function_call", "id": new_id("fc"), "status": "in_progress"}
            item |= {"call_id": call["id"], "name": function["name"], "arguments": ""}
            yield from self._open(item)
            self.call_index = call["index"]
        assert self.item is not None
        arguments = function.get("arguments") or ""
        if arguments:
            self.item["arguments"] += arguments
            name = "response.function_call_arguments.delta"
            yield self._event(name, **self._place(), delta=arguments)

    def _open(self, item: dict[str, Any]) -> Iterator[Event]:
        self.item = item
        self.response["output"].append(item)
        yield self._event(
            "response.output_item.added",
            output_index=len(self.response["output"]) - 1,
            item=copy.deepcopy(item),
        )

    def _close(self, status: str = "completed") -> Iterator[Event]:
        item = self.item
        if item is None:
            return
        place = self._place()
        if item["type"] == "function_call" and status == "completed":
            yield self._event(
                "response.function_call_arguments.done",
                **place,
                name=item["name"],
                arguments=item["arguments"],
            )
        elif item["type"] != "function_call":
            part, name = item["content"][0], _PART[item["type"]]
            extra = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
            yield self._event(
                f"response.{name}.done", **place, content_index=0, text=part["text"], **extra
            )
            yield self._event("response.content_part.done", **place, content_index=0, part=part)
        item["status"] = status
        yield self._event(
            "response.output_item.done", output_index=place["output_index"], item=item
        )
        self.item = self.call_index = None

    def _end(self) -> Iterator[Event]:
        """The end of everything; the response has its last form with the last event."""
        response = self.response
        status = "completed"
        if self.error is not None:
            status = "failed"
            code = _CODE.get(self.error["type"], "server_error")
            response["error"] = {"code": code, "message": self.error["message"]}
        elif self.reason == "abort":
            status = "cancelled"
        elif self.reason in _CUT:
            status = "incomplete"
            response["incomplete_details"] = {"reason": _CUT[self.reason]}
        if status == "completed" and not response["output"]:
            yield from self._open_text("message")  # the model had nothing to say
        yield from self._close("completed" if status == "completed" else "incomplete")
        response["status"] = status
        response["completed_at"] = int(time.time()) if status == "completed" else None
        # Nobody has an event for "cancelled": it is an end before the end.
        name = "incomplete" if status == "cancelled" else status
        yield self._event(f"response.{name}", response=self._snapshot())

    def _place(self) -> dict[str, Any]:
        assert self.item is not None
        return {"item_id": self.item["id"], "output_index": len(self.response["output"]) - 1}

    def _snapshot(self) -> dict[str, Any]:
        return {**self.response, "output": list(self.response["output"])}

    def _event(self, kind: str, **fields: Any) -> Event:
        self.num_events += 1
        return {"type": kind, "sequence_number": self.num_events - 1, **fields}


def usage_of(usage: dict[str, Any]) -> dict[str, Any]:
    """A chat's usage in the words of responses."""
    read = usage.get("prompt_tokens_details") or {}
    written = usage.get("completion_tokens_details") or {}
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": read.get("cached_tokens", 0),
            "cache_write_tokens": 0,
            **{name: read[name] for name in ("image_tokens", "video_tokens") if name in read},
        },
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": written.get("reasoning_tokens", 0)},
        "total_tokens": usage["total_tokens"],
    }
