"""`/v1/messages` by plain HTTP, against the documented shapes of Anthropic's form."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_server import app_client
from starlette.testclient import TestClient

from fastdeploy.config import EngineConfig, ServerConfig
from fastdeploy.server.messages_events import MessageWriter, empty_message, error_at
from fastdeploy.server.reply import error_body

HELLO: list[Any] = [{"role": "user", "content": "Hello!"}]
KEY = {"x-api-key": "one", "anthropic-version": "2023-06-01"}


@pytest.fixture(scope="module")
def http(folder: Path) -> Iterator[TestClient]:
    config = EngineConfig(model=str(folder), max_model_len=500, block_size=8, dtype="float32")
    with app_client(config, ServerConfig(api_key=["one"]), headers=KEY) as session:
        yield session


def create(http: TestClient, **fields: Any) -> Any:
    body = {"model": "m", "max_tokens": 9, "messages": HELLO, "temperature": 0, **fields}
    return http.post("/v1/messages", json=body)


def events_of(text: str) -> list[dict[str, Any]]:
    """Each event's data, which has to say the event's name as its type."""
    events = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def put_together(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client makes of a stream."""
    events = copy.deepcopy(events)
    message = events[0]["message"]
    arguments: dict[int, str] = {}
    for event in events[1:]:
        kind, index = event["type"], event.get("index")
        if kind == "content_block_start":
            assert index == len(message["content"])
            message["content"].append(event["content_block"])
        elif kind == "content_block_delta":
            delta, block = event["delta"], message["content"][index]
            if delta["type"] == "input_json_delta":
                arguments[index] = arguments.get(index, "") + delta["partial_json"]
            else:
                name = delta["type"].removesuffix("_delta")
                assert name == block["type"]
                block[name] += delta[name]
        elif kind == "content_block_stop":
            if index in arguments:
                message["content"][index]["input"] = json.loads(arguments[index])
        elif kind == "message_delta":
            message |= event["delta"] | {"usage": message["usage"] | event["usage"]}
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    return message


def test_a_message_is_what_the_chat_says_whole_and_streamed(http: TestClient) -> None:
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    bearer = {"authorization": "Bearer one"}
    body = {"messages": messages, "max_tokens": 9, "temperature": 0}
    chat = http.post("/v1/chat/completions", json=body, headers=bearer).json()
    answers = [create(http, system=system).json()]
    streamed = create(http, system=system, stream=True)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    answers.append(put_together(events_of(streamed.text)))
    for answer in answers:
        assert answer["id"].startswith("msg_")
        assert (answer["type"], answer["role"]) == ("message", "assistant")
        assert answer["content"] == [
            {"type": "text", "text": chat["choices"][0]["message"]["content"]}
        ]
        assert (answer["stop_reason"], answer["stop_sequence"]) == ("max_tokens", None)
        usage = answer["usage"]
        assert usage["output_tokens"] == 9 and usage["cache_creation_input_tokens"] == 0
        read = usage["input_tokens"] + usage["cache_read_input_tokens"]
        assert read == chat["usage"]["prompt_tokens"]
    assert answers[1]["usage"]["cache_read_input_tokens"] > 0
    counted = http.post("/v1/messages/count_tokens", json={"messages": HELLO, "system": system})
    assert counted.json() == {"input_tokens": chat["usage"]["prompt_tokens"]}


@pytest.mark.parametrize("stream", [False, True])
def test_the_stop_sequence_that_ended_it_is_named(http: TestClient, stream: bool) -> None:
    text = create(http, max_tokens=30).json()["content"][0]["text"]
    stop = next(c for c in text[3:] if c.isascii() and c not in text[:3])
    answer = create(http, max_tokens=30, stop_sequences=["\n\n\n\n", stop], stream=stream)
    message = put_together(events_of(answer.text)) if stream else answer.json()
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", stop)
    assert message["content"][0]["text"] == text[: text.index(stop)]


def test_an_answer_goes_on_from_its_beginning(http: TestClient) -> None:
    text = create(http, max_tokens=20).json()["content"][0]["text"]
    begun = [*HELLO, {"role": "assistant", "content": text[:5]}]
    more = create(http, messages=begun, max_tokens=20).json()
    assert more["usage"]["input_tokens"] + more["usage"]["cache_read_input_tokens"] > 5
    bearer = {"authorization": "Bearer one"}
    ids = http.post("/tokenize", json={"prompt": text[:5]}, headers=bearer).json()["tokens"]
    body = {"messages": HELLO, "completion_token_ids": ids, "max_tokens": 20, "temperature": 0}
    chat = http.post("/v1/chat/completions", json=body, headers=bearer).json()
    assert more["content"][0]["text"] == chat["choices"][0]["message"]["content"]


def block(kind: str, role: str = "user", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": [{"type": kind, **fields}]}]}


MISTAKES: list[tuple[dict[str, Any], str, str]] = [
    ({"max_tokens": None}, "max_tokens", "max_tokens"),
    ({"messages": "Hello"}, "messages", "list"),
    ({"messages": []}, "messages", "empty"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages", "field system"),
    (block("image", source={}), "messages", "content[0] is of type 'image'"),
    (block("document"), "messages", "'document'"),
    (block("redacted_thinking", "assistant", data=""), "messages", "'redacted_thinking'"),
    (block("text"), "messages", "messages[0].content[0].text is missing"),
    (
        block("tool_result", tool_use_id="a"),
        "messages",
        "messages[0].content[0] is the result of a tool, but no assistant message with tool_calls",
    ),
    (
        {"system": "x", "messages": [*HELLO, *block("tool_result", tool_use_id="a")["messages"]]},
        "messages",
        f"messages[{len(HELLO)}].content[0] is the result of a tool",
    ),
    ({"system": [{"type": "image"}]}, "system", "'image'"),
    ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, "tools", "none of its own"),
    (
        {"tools": [{"name": "f", "input_schema": {}, "allowed_callers": []}]},
        "tools",
        "leave it out",
    ),
    ({"tool_choice": {"type": "any"}}, "tool_choice", "needs tools"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking", "does not think"),
    ({"mcp_servers": [{"url": "http://x"}]}, "mcp_servers", "not available"),
    ({"temperature": -1}, "temperature", "temperature"),
    ({"stop_sequence": ["x"]}, "stop_sequence", "stop_sequences"),
    ({"n": 2}, "n", "chat completions"),
]


@pytest.mark.parametrize(("fields", "param", "said"), MISTAKES)
def test_a_mistake_is_a_400_in_the_forms_words(
    http: TestClient, fields: dict[str, Any], param: str, said: str
) -> None:
    answer = create(http, **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["type"] == "error"
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error", error
    assert error["param"] == param and said in error["message"], error


def test_other_errors_have_the_forms_names(http: TestClient) -> None:
    wrong = create(http, model="m").status_code, http.get("/v1/messages").status_code
    assert wrong == (200, 405)
    gone = http.post("/v1/messages/batches", json={}).json()
    assert (gone["type"], gone["error"]["type"]) == ("error", "not_found_error")
    refused = http.post("/v1/messages", json={}, headers={"x-api-key": "two"})
    assert refused.status_code == 401
    assert refused.json()["type"] == "error"
    assert refused.json()["error"]["type"] == "authentication_error"


def chunk(reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


def call(index: int, arguments: str, **names: str) -> dict[str, Any]:
    function = {"arguments": arguments} | ({"name": names["name"]} if names else {})
    return {"index": index, "function": function, **({"id": names["id"]} if names else {})}


def written(chunks: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    async def feed() -> AsyncIterator[dict[str, Any]]:
        for one in chunks:
            yield one

    async def all_events() -> list[dict[str, Any]]:
        return [json.loads(json.dumps(event)) async for event in writer.events(feed())]

    writer = MessageWriter(empty_message("m", 3), ())
    return writer.message, asyncio.run(all_events())


def test_the_rest_of_a_call_comes_before_the_text_that_follows_it() -> None:
    """In one piece, where a stop string had held both back."""
    message, events = written(
        [
            chunk(tool_calls=[call(0, '{"x": 1', id="a", name="f")]),
            chunk(content="Done", tool_calls=[call(0, "}")]),
            chunk(reason="tool_calls"),
        ]
    )
    assert message["content"] == [
        {"type": "tool_use", "id": "a", "name": "f", "input": {"x": 1}},
        {"type": "text", "text": "Done"},
    ]
    assert put_together(events) == message


def test_thoughts_text_and_calls_are_blocks_of_their_own() -> None:
    message, events = written(
        [
            chunk(reasoning_content="Hm"),
            chunk(reasoning_content="m."),
            chunk(content="I look."),
            chunk(tool_calls=[call(0, "", id="a", name="f")]),
            chunk(tool_calls=[call(0, '{"x"')]),
            chunk(tool_calls=[call(0, ": 1}"), call(1, "{}", id="b", name="g")]),
            chunk(reason="tool_calls"),
        ]
    )
    assert message["content"] == [
        {"type": "thinking", "thinking": "Hmm.", "signature": ""},
        {"type": "text", "text": "I look."},
        {"type": "tool_use", "id": "a", "name": "f", "input": {"x": 1}},
        {"type": "tool_use", "id": "b", "name": "g", "input": {}},
    ]
    assert message["stop_reason"] == "tool_use"
    assert put_together(events) == message
    starts = [e["content_block"] for e in events if e["type"] == "content_block_start"]
    assert starts[2] == {"type": "tool_use", "id": "a", "name": "f", "input": {}}


def test_a_lost_engine_is_the_last_event() -> None:
    _, events = written([chunk(content="Hel"), error_body("gone", 503)])
    assert events[-1]["type"] == "error"
    assert (events[-1]["error"]["type"], events[-1]["error"]["message"]) == ("api_error", "gone")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (404, "not_found_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (504, "api_error"),
    ],
)
def test_an_error_in_a_stream_has_the_kind_of_a_whole_answers(status: int, kind: str) -> None:
    body = error_body("gone", status)
    _, events = written([chunk(content="Hel"), body])
    assert events[-1]["error"]["type"] == kind
    assert error_at("/v1/messages", body) == events[-1]
    assert error_at("/v1/chat/completions", body) == body
