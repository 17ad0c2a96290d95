"""The body of `/v1/messages`, and the chat request underneath it.

    system                          message of the role system
    text                            content               ┐
    thinking                        reasoning_content     ├ of one message
    tool_use                        tool_calls            ┘
    tool_result                     message of the role tool
    a last message by the assistant the beginning of the answer, which goes on from there

Blocks of other types are refused by name, as are tools that would run on the server.
`cache_control` changes nothing: what texts have in common is always cached.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict

from fastdeploy.errors import RequestError
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
    messages: list[dict[str, Any]]
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
    messages = _messages(body)
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


def _messages(body: CountRequest) -> list[Message]:
    messages: list[Message] = []
    if body.system:
        messages.append({"role": "system", "content": _text(body.system, "system")})
    for i, message in enumerate(body.messages):
        where, content = f"messages[{i}]", message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list):
            _refuse(f"{where}.content", "is missing or of a wrong type; send a text or blocks")
        if message.get("role") == "user":
            messages += _asked(content, f"{where}.content")
        elif message.get("role") == "assistant":
            messages.append(_answered(content, f"{where}.content"))
        else:
            role = str(message.get("role"))[:64]
            _refuse(where, f"has the role {role!r}; use user or assistant, and the field system")
    return messages


def _asked(blocks: list[Any], where: str) -> list[Message]:
    """What a user says: results of tools are messages of their own."""
    messages: list[Message] = []
    for i, block in enumerate(blocks):
        kind, place = _kind(block), f"{where}[{i}]"
        if kind == "tool_result":
            name = _string(block, "tool_use_id", place)
            text = _text(block.get("content") or "", f"{place}.content")
            if block.get("is_error"):
                text = f"Error: {text}"
            messages.append({"role": "tool", "tool_call_id": name, "content": text})
        elif kind == "text":
            text = _string(block, "text", place)
            if messages and messages[-1]["role"] == "user":
                messages[-1]["content"] += "\n" + text
            else:
                messages.append({"role": "user", "content": text})
        else:
            _refuse(place, f"is of type {kind!r}; a user's message has text and tool_result here")
    return messages or [{"role": "user", "content": ""}]


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
    if service.syntax.thoughts is not None or message.keys() - {"role", "content"}:
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


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        _refuse(where, "is of a wrong type; send a text or a list of text blocks")
    for i, block in enumerate(value):
        if _kind(block) != "text":
            _refuse(f"{where}[{i}]", f"is of type {_kind(block)!r}; this model reads text")
    return "\n".join(_string(block, "text", f"{where}[{i}]") for i, block in enumerate(value))


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
