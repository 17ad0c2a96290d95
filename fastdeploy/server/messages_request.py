"""The body of `/v1/messages`, and the chat request underneath it.

    system                          message of the role system
    text                            content               ┐
    thinking                        reasoning_content     ├ of one message
    tool_use                        tool_calls            ┘
    image                           image_url, of users and of results of tools
    tool_result                     message of the role tool
    a last message by the assistant the beginning of the answer, which goes on from there

Blocks of other types are refused by name, as are tools that would run on the server.
`cache_control` changes nothing: what texts have in common is always cached.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field

from fastdeploy.errors import RequestError
from fastdeploy.server.parts import Part, joined, of_image_block
from fastdeploy.server.protocol import Addressed, ChatRequest, parse

if TYPE_CHECKING:
    from fastdeploy.server.app import Service

Message = dict[str, Any]
# Fields of the form that would change the answer and have no counterpart here.
NEVER = ("container", "context_management", "mcp_servers", "output_config")
TOOL_FIELDS = frozenset({"type", "name", "description", "input_schema", "strict", "cache_control"})
CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class Thinking(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: Literal["summarized"] | None = None  # thoughts are shown as they are


class CountRequest(Addressed):
    messages: list[dict[str, Any]] = Field(
        description="Turns; in those of users and in results of tools, pictures are blocks of the "
        "type image with a source of the type base64 or url."
    )
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: Thinking | None = None


class MessagesRequest(CountRequest):
    max_tokens: int
    stream: bool | None = False
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: dict[str, Any] | None = None  # of the user; changes nothing
    service_tier: str | None = None


def chat_of(body: CountRequest, service: Service) -> ChatRequest:
    """The chat underneath. Raises RequestError naming the field at fault."""
    for name in NEVER:
        if (body.model_extra or {}).get(name):
            raise _error(name, f"{name} is not available on this server; leave it out")
    messages = _messages(body, service.reads)
    values: dict[str, Any] = {
        "model": body.model,
        "messages": messages,
        "priority": body.priority,
        "cache_salt": body.cache_salt,
        "request_id": body.request_id,
        **_tools(body),
        **_thinking(body, service),
    }
    if isinstance(body, MessagesRequest):
        values |= {name: getattr(body, name) for name in ("max_tokens", "temperature", "top_p")}
        values |= {"top_k": body.top_k, "stop": body.stop_sequences or None}
        values |= {"stream": True, "stream_options": {"include_usage": True}}
    if messages and messages[-1]["role"] == "assistant":
        values["completion_token_ids"] = _beginning(messages.pop(), service)
    return parse(ChatRequest, values)


def _messages(body: CountRequest, reads: Collection[str]) -> list[Message]:
    """`reads` are the kinds of pictures that the model reads."""
    messages: list[Message] = []
    if body.system:
        system = _content(body.system, "system", ())
        messages.append({"role": "system", "content": system, "sent_as": "system"})
    for i, message in enumerate(body.messages):
        where, content = f"messages[{i}]", message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list):
            _refuse(f"{where}.content", "is missing or of a wrong type; send a text or blocks")
        if message.get("role") == "user":
            messages += _asked(content, f"{where}.content", reads)
        elif message.get("role") == "assistant":
            messages.append(_answered(content, f"{where}.content"))
            messages[-1]["sent_as"] = where
        else:
            role = str(message.get("role"))[:64]
            _refuse(where, f"has the role {role!r}; use user or assistant, and the field system")
    return messages


def _asked(blocks: list[Any], where: str, reads: Collection[str]) -> list[Message]:
    """What a user says: results of tools are messages of their own."""
    messages: list[Message] = []
    said: list[Part] = []

    def end() -> None:
        if said:
            messages.append({"role": "user", "content": joined(said), "sent_as": where})
            said.clear()

    for i, block in enumerate(blocks):
        if _kind(block) == "tool_result":
            end()
            messages.append(_result(block, f"{where}[{i}]", reads))
        else:
            said.append(_part(block, f"{where}[{i}]", reads, "tool_result"))
    end()
    return messages or [{"role": "user", "content": "", "sent_as": where}]


def _result(block: dict[str, Any], where: str, reads: Collection[str]) -> Message:
    name = _string(block, "tool_use_id", where)
    content = _content(block.get("content") or "", f"{where}.content", reads)
    if block.get("is_error"):
        content = _failed(content)
    return {"role": "tool", "tool_call_id": name, "content": content, "sent_as": where}


def _failed(content: str | list[Part]) -> str | list[Part]:
    """A word in front of the result."""
    if isinstance(content, str):
        return f"Error: {content}"
    begins_with_text = content[0]["type"] == "text"
    text = content[0]["text"] if begins_with_text else ""
    return [{"type": "text", "text": f"Error: {text}"}, *content[begins_with_text:]]


def _answered(blocks: list[Any], where: str) -> Message:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for i, block in enumerate(blocks):
        kind, place = _kind(block), f"{where}[{i}]"
        if kind == "text":
            texts.append(_string(block, "text", place))
        elif kind == "thinking":
            thoughts.append(_string(block, "thinking", place))
        elif kind == "tool_use":
            if not isinstance(block.get("input"), dict):
                _refuse(f"{place}.input", "is not an object")
            function = {
                "name": _string(block, "name", place),
                "arguments": json.dumps(block["input"], ensure_ascii=False),
            }
            name = _string(block, "id", place)
            calls.append({"id": name, "type": "function", "function": function})
        else:
            _refuse(
                place,
                f"is of type {kind!r}; an assistant's message has text, thinking and tool_use here",
            )
    message: Message = {"role": "assistant", "content": "\n".join(texts)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _beginning(message: Message, service: Service) -> list[int]:
    """The tokens of an answer that the request has begun."""
    if service.syntax.thoughts is not None or message.keys() - {"role", "content", "sent_as"}:
        _refuse(
            "messages",
            "ends with an assistant message; only an answer of a model that does not think, in "
            "text alone, can be gone on with: end with a user's message",
        )
    return service.tokenizer.encode(message["content"])


def _tools(body: CountRequest) -> dict[str, Any]:
    if not body.tools:
        if body.tool_choice is not None:
            raise _error("tool_choice", "tool_choice needs tools; send them as well")
        return {}
    tools = []
    for i, tool in enumerate(body.tools):
        if tool.get("type") not in (None, "custom"):
            kind = str(tool["type"])[:64]
            raise _error(
                "tools", f"tools[{i}] is of type {kind!r}; this server has none of its own"
            )
        if unknown := sorted(tool.keys() - TOOL_FIELDS):
            raise _error("tools", f"tools[{i}] has the field {unknown[0][:64]!r}; leave it out")
        function = {"name": tool.get("name"), "parameters": tool.get("input_schema")}
        function |= {k: tool[k] for k in ("description", "strict") if tool.get(k) is not None}
        tools.append({"type": "function", "function": function})
    choice = body.tool_choice or {"type": "auto"}
    parallel = choice.get("disable_parallel_tool_use") is not True
    return {"tools": tools, "tool_choice": _choice(choice), "parallel_tool_calls": parallel}


def _choice(choice: dict[str, Any]) -> str | dict[str, Any]:
    kind = str(choice.get("type"))[:64]
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if kind not in CHOICES:
        what = f"tool_choice has the type {kind!r}; it takes auto, any, tool or none"
        raise _error("tool_choice", what)
    return CHOICES[kind]


def _thinking(body: CountRequest, service: Service) -> dict[str, Any]:
    thinking = body.thinking
    if thinking is None or thinking.type == "adaptive":
        return {}
    if thinking.type == "disabled":
        return {"enable_thinking": False} if service.syntax.thoughts is not None else {}
    if service.syntax.thoughts is None:
        raise _error("thinking", "thinking is asked of a model that does not think; leave it out")
    budget, most = thinking.budget_tokens, getattr(body, "max_tokens", None)
    if budget is not None and most is not None and budget >= most:
        raise _error(
            "thinking",
            f"thinking.budget_tokens={budget} leaves no answer; use less than max_tokens={most}",
        )
    return {"enable_thinking": True, "reasoning_max_tokens": budget}


def _content(value: Any, where: str, reads: Collection[str]) -> str | list[Part]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        _refuse(where, "is of a wrong type; send a text or a list of blocks")
    return joined([_part(block, f"{where}[{i}]", reads) for i, block in enumerate(value)])


def _part(block: Any, where: str, reads: Collection[str], *known: str) -> Part:
    """A block of text, or of a picture where the model reads them; `known` are other types that may
    stand at its place.
    """
    kind = _kind(block)
    own = ("text", "image") if "image" in reads else ("text",)
    if kind not in own:
        _refuse(where, f"is of type {kind!r}; read here: {', '.join((*own, *known))}")
    if kind == "text":
        return {"type": "text", "text": _string(block, "text", where)}
    try:
        return of_image_block(block, where)
    except ValueError as error:
        raise _error("messages", f"{where} {error}") from None


def _kind(block: Any) -> str:
    return str(block.get("type") if isinstance(block, dict) else type(block).__name__)[:64]


def _string(block: dict[str, Any], name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        _refuse(f"{where}.{name}", "is missing or not a text")
    return value


def _refuse(where: str, what: str) -> NoReturn:
    raise _error(where.partition("[")[0].partition(".")[0], f"{where} {what}")


def _error(param: str, message: str) -> RequestError:
    return RequestError(message, param=param)
