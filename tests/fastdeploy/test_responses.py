"""`/v1/responses` as the official client sees it: every object and event strictly parsed."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from helpers_server import app_client, wait_until
from openai import OpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from starlette.testclient import TestClient

from fastdeploy import LLM
from fastdeploy.config import EngineConfig, ServerConfig
from fastdeploy.engine.core import Engine
from fastdeploy.errors import RequestError
from fastdeploy.server import response_store
from fastdeploy.server.engine import Answer, Piece
from fastdeploy.server.limits import within
from fastdeploy.server.reply import error_body
from fastdeploy.server.response_events import ResponseWriter
from fastdeploy.server.response_items import as_items, as_messages
from fastdeploy.server.response_store import ResponseStore, Stored
from fastdeploy.server.responses import Follower
from fastdeploy.server.stream import EventStream

EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
HELLO: list[Any] = [{"role": "user", "content": "Hello!"}]


@pytest.fixture(scope="module")
def http(folder: Path) -> Iterator[TestClient]:
    config = EngineConfig(
        model=str(folder), max_model_len=500, block_size=8, dtype="float32", enable_logprob=True
    )
    with app_client(config, ServerConfig(api_key=["one", "two"])) as session:
        yield session


@pytest.fixture(scope="module")
def client(http: TestClient) -> OpenAI:
    return OpenAI(base_url="http://testserver/v1", api_key="one", http_client=http, max_retries=0)


@pytest.fixture(scope="module")
def stranger(http: TestClient) -> OpenAI:
    return OpenAI(base_url="http://testserver/v1", api_key="two", http_client=http, max_retries=0)


def create(client: OpenAI, **fields: Any) -> Any:
    return client.responses.create(**{"model": "m", "temperature": 0, **fields})


def strictly(response: Any) -> Response:
    return Response.model_validate(response.to_dict(), strict=False)


def test_a_response_is_what_the_chat_says(client: OpenAI) -> None:
    chat = client.chat.completions.create(
        model="m", messages=HELLO, temperature=0, max_tokens=9, logprobs=True
    )
    include: list[Any] = ["message.output_text.logprobs"]
    got = strictly(create(client, input="Hello!", max_output_tokens=9, include=include))
    assert got.output_text == chat.choices[0].message.content
    assert got.usage and got.usage.output_tokens == chat.usage.completion_tokens
    assert got.usage.input_tokens == chat.usage.prompt_tokens
    assert (got.status, got.error) == ("incomplete", None)
    assert got.incomplete_details and got.incomplete_details.reason == "max_output_tokens"
    logprobs = got.output[0].content[0].logprobs
    expected = [token.logprob for token in chat.choices[0].logprobs.content]
    assert [token.logprob for token in logprobs] == expected


def test_a_stream_ends_with_the_whole_response(client: OpenAI) -> None:
    whole = create(client, input=HELLO, max_output_tokens=12)
    events = [
        EVENTS.validate_python(event.to_dict())
        for event in create(client, input=HELLO, max_output_tokens=12, stream=True)
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == [
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "incomplete",
    ]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert events[0].response.output == [], "the first event told the end"
    text = "".join(event.delta for event in events[4:-4])
    assert text == events[-4].text == events[-1].response.output_text == whole.output_text
    stored = client.responses.retrieve(events[-1].response.id)
    assert stored.to_dict() == events[-1].response.to_dict()


def test_a_response_goes_on_from_the_one_before(client: OpenAI) -> None:
    first = create(client, input="One", max_output_tokens=5, instructions="Be brief")
    second = create(client, input="Two", max_output_tokens=5, previous_response_id=first.id)
    messages = [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "Two"},
    ]
    chat = client.chat.completions.create(model="m", messages=messages, temperature=0, max_tokens=5)
    assert second.output_text == chat.choices[0].message.content
    items = client.responses.input_items.list(second.id, order="asc").data
    assert [item.role for item in items] == ["user", "assistant", "user"]
    pages = client.responses.input_items.list(second.id, limit=1)
    assert [item.id for item in pages] == [item.id for item in reversed(items)], "by pages"


def test_what_belongs_to_another_key_does_not_exist(client: OpenAI, stranger: OpenAI) -> None:
    mine = create(client, input="Hello", max_output_tokens=3).id
    messages = []
    for name in (mine, "resp_" + "0" * 32):
        for attempt in (
            lambda name=name: stranger.responses.retrieve(name),
            lambda name=name: stranger.responses.delete(name),
            lambda name=name: stranger.responses.cancel(name),
            lambda name=name: stranger.responses.input_items.list(name),
            lambda name=name: create(stranger, input="x", previous_response_id=name),
        ):
            with pytest.raises(openai.NotFoundError) as caught:
                attempt()
            messages.append(caught.value.body["message"].replace(name, "NAME"))
    assert len(set(messages)) == 1, "the message tells whether it exists"
    assert client.responses.retrieve(mine).id == mine
    assert client.responses.delete(mine) is None
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(mine)
    unstored = create(client, input="Hello", max_output_tokens=3, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unstored.id)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "f"}, "banana"])
def test_a_choice_of_tools_that_are_not_there_is_refused(client: OpenAI, choice: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, input="x", max_output_tokens=1, tool_choice=choice)
    assert caught.value.param == "tool_choice"
    for choice in ("auto", "none"):
        create(client, input="x", max_output_tokens=1, tool_choice=choice)


def test_a_background_response_is_polled_followed_and_cancelled(client: OpenAI) -> None:
    fields: dict[str, Any] = {"input": "Hello", "background": True}
    endless = {"extra_body": {"ignore_eos": True}}
    queued = strictly(create(client, **fields, max_output_tokens=6, **endless))
    assert queued.status in ("queued", "in_progress") and queued.background
    events = list(client.responses.retrieve(queued.id, stream=True))
    assert [event.type.partition(".")[2] for event in events[:3]] == [
        *("created", "queued", "in_progress")
    ]
    assert events[0].response.status == events[1].response.status == "queued"
    assert events[2].response.status == "in_progress"
    assert events[-1].type == "response.incomplete"
    rest = list(client.responses.retrieve(queued.id, stream=True, starting_after=3))
    assert [e.sequence_number for e in rest] == list(range(4, len(events)))
    done = client.responses.retrieve(queued.id)
    assert done.status == "incomplete" and done.usage.output_tokens == 6
    with client.responses.stream(model="m", input="Hello", background=True) as stream:
        *_, last = stream  # the client's helper wants the order of OpenAI
    assert last.response.status in ("completed", "incomplete")
    running = create(client, **fields, **endless)
    for _ in range(2):  # the second time it is as it was
        cancelled = strictly(client.responses.cancel(running.id))
        assert cancelled.status == "cancelled"
    assert client.responses.retrieve(running.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="is cancelled"):
        create(client, input="x", previous_response_id=running.id)
    with pytest.raises(openai.BadRequestError, match="background=true"):
        client.responses.cancel(create(client, input="x", max_output_tokens=1).id)
    deleted = create(client, **fields, **endless)
    client.responses.delete(deleted.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(deleted.id)


def test_the_events_of_a_background_response_stay_as_they_were_and_count(
    stranger: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    include: list[Any] = ["message.output_text.logprobs"]

    def written() -> tuple[str, list[Any]]:
        response = create(
            stranger, input=HELLO, max_output_tokens=30, background=True, include=include
        )
        stream = stranger.responses.retrieve(response.id, stream=True)
        return response.id, [event.to_dict() for event in stream]

    name, events = written()
    (added,) = (event for event in events if event["type"] == "response.content_part.added")
    assert (added["part"]["text"], added["part"]["logprobs"]) == ("", [])
    again = [event.to_dict() for event in stranger.responses.retrieve(name, stream=True)]
    assert again == events
    size, of_events = len(json.dumps(events[-1]["response"])), len(json.dumps(events))
    assert of_events > size
    monkeypatch.setattr(response_store, "MAX_BYTES", 2 * size + of_events + 2000)
    second, _ = written()
    stranger.responses.retrieve(second)
    with pytest.raises(openai.NotFoundError):
        stranger.responses.retrieve(name)


def test_truncation_leaves_out_the_oldest_turns(client: OpenAI, llm: LLM) -> None:
    turns: list[Any] = []
    for i in range(40):
        turns += [{"role": "user", "content": f"Question {i} of many"}]
        turns += [{"role": "assistant", "content": f"Answer {i}"}]
    turns += HELLO
    with pytest.raises(openai.BadRequestError, match="max_model_len"):
        create(client, input=turns, max_output_tokens=4)
    got = create(
        client, input=turns, max_output_tokens=4, truncation="auto", instructions="Be brief"
    )
    prompts = [
        [{"role": "system", "content": "Be brief"}, *turns[2 * dropped :]] for dropped in range(41)
    ]
    lengths = [len(llm.template.encode(llm.tokenizer, prompt).token_ids) for prompt in prompts]
    assert got.usage.input_tokens == next(n for n in lengths if n <= 496)


IMAGE = {"type": "input_image", "image_url": "x"}
HALF_A_CALL = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{"}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"input": []}, "input"),
    ({"input": 5}, "input"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
    ({"input": [{"role": "boss", "content": "x"}]}, "input"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input",
    ),
    (
        {"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{"}]},
        "input",
    ),
    ({"background": True, "store": False}, "store"),
    ({"include": ["everything"]}, "include"),
    ({"tools": [{"type": "web_search"}]}, "tools"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"max_output_tokens": 0}, "max_tokens"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"truncation": "middle"}, "truncation"),
    ({"metadata": {"a": 1}}, "metadata"),
    ({"temprature": 1}, "temprature"),
    ({"stream_options": {}}, "stream_options"),
]


@pytest.mark.parametrize(("fields", "param"), BAD, ids=lambda value: repr(value)[:50])
def test_a_mistake_is_a_400_that_names_it(
    http: TestClient, fields: dict[str, Any], param: str
) -> None:
    body = {"input": "Hello", **fields}
    answer = http.post("/v1/responses", json=body, headers={"authorization": "Bearer one"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.text


def test_an_error_about_the_chat_names_the_item_that_was_sent(http: TestClient) -> None:
    result = {"type": "function_call_output", "call_id": "a", "output": "rain"}
    for more in ({}, {"instructions": "Be brief."}):
        body = {"input": [*HELLO, result], **more}
        answer = http.post("/v1/responses", json=body, headers={"authorization": "Bearer one"})
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == "input"
        assert error["message"].startswith("input[1] is the result of a tool"), error


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("chat/completions", {"messages": HELLO}),
        ("responses", {"input": HELLO}),
        ("messages", {"messages": HELLO, "max_tokens": 9}),
    ],
)
def test_a_mistake_that_shows_in_the_answer_is_a_400_in_every_form(
    http: TestClient, monkeypatch: pytest.MonkeyPatch, path: str, fields: dict[str, Any]
) -> None:
    async def stuck(answer: Answer) -> AsyncIterator[Piece]:
        raise RequestError("the bans leave no token")
        yield

    monkeypatch.setattr(Answer, "pieces", stuck)
    headers = {"authorization": "Bearer one"}
    answer = http.post(f"/v1/{path}", json=fields, headers=headers)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_items_become_the_messages_of_a_chat() -> None:
    items: list[Any] = [
        {"role": "developer", "content": "Use tools."},
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "b", "name": "g", "arguments": '{"x": 1}'},
        {"type": "function_call_output", "call_id": "a", "output": "rain"},
        {"type": "message", "role": "assistant", "content": "It rains."},
    ]
    messages = as_messages(as_items(items), "Be brief.")
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[0]["content"] == "Be brief.\n\nUse tools."
    assert messages[2]["reasoning_content"] == "Hm."
    assert [call["id"] for call in messages[2]["tool_calls"]] == ["a", "b"]
    sent_as = [m.pop("sent_as") for m in messages]
    assert sent_as == ["instructions", *(f"input[{i}]" for i in (1, 2, 5, 6))]
    assert messages[3] == {"role": "tool", "tool_call_id": "a", "content": "rain"}
    assert messages[4] == {"role": "assistant", "content": "It rains."}


def test_thoughts_text_and_calls_are_items_of_their_own() -> None:
    def chunk(reason: str | None = None, **delta: Any) -> dict[str, Any]:
        return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}

    def call(index: int, arguments: str, **names: str) -> dict[str, Any]:
        function = {"arguments": arguments} | ({"name": names["name"]} if names else {})
        return {"index": index, "function": function, **({"id": names["id"]} if names else {})}

    async def chunks() -> AsyncIterator[dict[str, Any]]:
        yield chunk(role="assistant", content="")
        yield chunk(reasoning_content="Hm")
        yield chunk(reasoning_content="m.", content="I ")
        yield chunk(content="look.")
        yield chunk(tool_calls=[call(0, "", id="a", name="f")])
        yield chunk(tool_calls=[call(0, '{"x"')])
        yield chunk(tool_calls=[call(0, ": 1}"), call(1, "{}", id="b", name="g")])
        yield chunk(reason="tool_calls")

    async def all_events() -> list[Any]:
        return [event async for event in writer.events(chunks())]

    base = {"id": "resp_1", "object": "response", "created_at": 0, "model": "m", "output": []}
    base |= {"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "background": False}
    writer = ResponseWriter(base)
    events = [EVENTS.validate_python(event) for event in asyncio.run(all_events())]
    last = events[-1]
    assert last.type == "response.completed" and last.response.status == "completed"
    kinds = [item.type for item in last.response.output]
    assert kinds == ["reasoning", "message", "function_call", "function_call"]
    texts = [item.content[0].text for item in last.response.output[:2]]
    assert texts == ["Hmm.", "I look."]
    calls = [(c.call_id, c.name, c.arguments) for c in last.response.output[2:]]
    assert calls == [("a", "f", '{"x": 1}'), ("b", "g", "{}")]
    assert {item.status for item in last.response.output} == {"completed"}
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert deltas == ['{"x"', ": 1}", "{}"]


def test_the_last_token_before_a_call_keeps_its_log_probability() -> None:
    """It wrote a line break too, and so is certain only when the call is."""

    def chunk(token: str, **delta: Any) -> dict[str, Any]:
        content = [{"token": token, "logprob": -1.0, "bytes": [], "top_logprobs": []}]
        choice = {"delta": delta, "finish_reason": None, "logprobs": {"content": content}}
        return {"choices": [choice]}

    call = {"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}}

    async def events() -> list[Any]:
        async def chunks() -> AsyncIterator[dict[str, Any]]:
            yield chunk("Look", content="Look.")
            yield chunk(".\n", tool_calls=[call])

        return [event async for event in writer.events(chunks())]

    writer = ResponseWriter({"output": [], "background": False})
    last = asyncio.run(events())[-1]["response"]
    assert [item["type"] for item in last["output"]] == ["message", "function_call"]
    (part,) = last["output"][0]["content"]
    assert [one["token"] for one in part["logprobs"]] == ["Look", ".\n"]


def test_the_rest_of_a_call_comes_before_the_text_that_follows_it() -> None:
    begun = {"index": 0, "id": "a", "function": {"name": "f", "arguments": '{"x": 1'}}
    rest = {"index": 0, "function": {"arguments": "}"}}

    async def events() -> list[Any]:
        async def chunks() -> AsyncIterator[dict[str, Any]]:
            for delta in ({"tool_calls": [begun]}, {"content": "Done", "tool_calls": [rest]}):
                yield {"choices": [{"delta": delta, "finish_reason": None}]}

        return [event async for event in writer.events(chunks())]

    writer = ResponseWriter({"output": [], "background": False})
    call, message = asyncio.run(events())[-1]["response"]["output"]
    assert (call["arguments"], call["status"]) == ('{"x": 1}', "completed")
    assert message["content"][0]["text"] == "Done"


def test_a_response_in_the_background_has_its_key_and_its_time(folder: Path) -> None:
    """After its request is over, too, and while its stream is."""
    config = EngineConfig(model=str(folder), max_model_len=500, block_size=8, dtype="float32")
    server = ServerConfig(api_key=["one", "two"], max_concurrency_per_key=1, timeout=4)
    with app_client(config, server) as session, pytest.MonkeyPatch.context() as patched:
        step = Engine.step
        patched.setattr(Engine, "step", lambda engine: time.sleep(0.02) or step(engine))
        one, two = (
            OpenAI(base_url="http://testserver/v1", api_key=k, http_client=session, max_retries=0)
            for k in ("one", "two")
        )

        def is_free() -> bool:
            try:
                return bool(create(one, input="Hello", max_output_tokens=1))
            except openai.RateLimitError:
                return False

        endless = {"input": "Hello", "background": True, "extra_body": {"ignore_eos": True}}
        running = create(one, **endless)
        with pytest.raises(openai.RateLimitError, match="requests of this key are in work"):
            create(one, input="Hello", max_output_tokens=1)
        create(two, input="Hello", max_output_tokens=1)
        one.responses.cancel(running.id)
        wait_until(is_free)
        with pytest.raises(openai.APIError, match="timeout=4"):  # one place is enough for both
            list(create(one, **endless, stream=True))
        wait_until(is_free)  # it ends a moment after its stream
        slow = create(one, **endless)
        wait_until(lambda: one.responses.retrieve(slow.id).status == "failed")
        wait_until(is_free)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_stream_whose_head_is_asked_for_goes_no_way_of_its_own(method: str) -> None:
    """What is written past ASGI would be read as the answer to the next request."""
    past: list[bytes] = []
    connection = SimpleNamespace(send_more=lambda data: past.append(data) or True)

    async def events() -> AsyncIterator[dict[str, Any]]:
        for n in range(3):
            yield {"n": n}

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {}

    async def send(message: dict[str, Any]) -> None:
        pass

    scope = {"type": "http", "method": method, "state": {"connection": connection}}
    asyncio.run(EventStream(events(), Follower())(scope, receive, send))
    assert len(past) == (2 if method == "GET" else 0)


@pytest.mark.parametrize("seconds", [0.05, 60.0])
def test_chunks_that_take_too_long_end_with_an_error(seconds: float) -> None:
    async def chunks() -> AsyncIterator[dict[str, Any]]:
        yield {"n": 1}
        await asyncio.sleep(0.2)
        yield {"n": 2}

    async def found() -> list[Any]:
        return [chunk async for chunk in within(chunks(), seconds)]

    first, last = asyncio.run(found())
    assert first == {"n": 1}
    if seconds > 1:
        assert last == {"n": 2}
    else:
        assert "longer than timeout=0.05" in last["error"]["message"]


@pytest.mark.parametrize(
    ("status", "code"),
    [(400, "invalid_prompt"), (429, "rate_limit_exceeded"), (500, "server_error")],
)
def test_a_response_that_has_failed_says_whose_fault_it_was(status: int, code: str) -> None:
    async def events() -> list[Any]:
        async def chunks() -> AsyncIterator[dict[str, Any]]:
            yield error_body("gone", status)

        return [event async for event in writer.events(chunks())]

    base = {"id": "resp_1", "object": "response", "created_at": 0, "model": "m", "output": []}
    base |= {"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "background": False}
    writer = ResponseWriter(base)
    last = EVENTS.validate_python(asyncio.run(events())[-1])
    assert last.type == "response.failed"
    assert (last.response.error.code, last.response.error.message) == (code, "gone")


def test_the_store_forgets_the_oldest_that_have_ended(monkeypatch) -> None:
    monkeypatch.setattr(response_store, "MAX_RESPONSES", 3)
    monkeypatch.setattr(response_store, "MAX_BYTES", 1000)
    store = ResponseStore()

    def put(name: str, status: str = "completed", text: str = "") -> None:
        response = {"id": name, "status": status, "text": text, "output": []}
        store.put("me", Stored(response, []))

    def kept() -> list[str]:
        return list(store.shelves["me"].responses)

    put("writing", "in_progress")
    for name in "abc":
        put(name)
    assert kept() == ["writing", "b", "c"]
    put("large", text="x" * 850)
    assert kept() == ["writing", "large"]
    store.shelves["me"].responses["writing"].at -= response_store.MAX_AGE_S + 1
    with pytest.raises(RequestError, match="no response 'writing'"):
        store.get("me", "writing")


def test_what_responses_share_counts_once_and_as_long_as_one_is_kept(monkeypatch) -> None:
    monkeypatch.setattr(response_store, "MAX_BYTES", 3000)
    store = ResponseStore()

    def put(name: str, *items: Any, follows: str | None = None) -> None:
        before = store.get("me", follows).conversation if follows else []
        response: dict[str, Any] = {"id": name, "status": "in_progress", "output": []}
        stored = Stored(response, [*before, *items])
        store.put("me", stored)  # once when it begins, and once when it has ended
        response |= {"status": "completed", "output": [{"text": "y" * 100}]}
        store.put("me", stored)

    def shelf() -> tuple[list[str], int]:
        return list(store.shelves["me"].responses), store.shelves["me"].num_bytes

    put("a", {"image": "x" * 1000})
    size = shelf()[1]
    assert 1100 < size < 1300
    put("b", {"text": "more"}, follows="a")
    put("c", {"text": "more"}, follows="b")
    assert shelf()[0] == ["a", "b", "c"] and shelf()[1] < size + 700, shelf()
    store.remove("me", "a")
    assert shelf()[1] > 1000, "the picture is held by those that follow, and counts"
    put("d", {"image": "z" * 1800})
    assert shelf()[0] == ["d"], "as long as one of them holds the picture, there is too much"
    store.remove("me", "d")
    assert shelf() == ([], 0)
