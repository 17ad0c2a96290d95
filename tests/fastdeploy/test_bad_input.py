"""Bad requests, one after the other: each is refused by name or served exactly, and the next one is
served as if nothing had been. More of them, made by machines, are in test_fuzz.py.
"""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute
from helpers_server import Server, app_client, start_server, stop_server
from starlette.testclient import TestClient

from fastdeploy import LLM
from fastdeploy.config import EngineConfig, ServerConfig
from fastdeploy.engine.prompt import RESERVED
from fastdeploy.server.app import OPEN_PATHS, PAGE_PATHS, create_app

MAX_LEN = 64
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
CONTROL = ("<|end_of_sentence|>", "<|begin_of_sentence|>", "<s>", "</s>", "<unk>", "<think>")


@pytest.fixture(scope="module")
def http(folder: Path) -> Iterator[TestClient]:
    engine = EngineConfig(model=str(folder), max_model_len=MAX_LEN, dtype="float32", block_size=8)
    with app_client(engine) as session:
        yield session
        good = session.post(TEXT, json={"prompt": "Hello", "max_tokens": 3})
        assert good.status_code == 200, good.text


def error_of(answer: Any, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text[:300]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) < 420
    return error


def says(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages), "max_tokens": 2}


# 1: what is hardly JSON


@pytest.mark.parametrize("path", [CHAT, TEXT, "/v1/responses", "/v1/embeddings", "/tokenize"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"hello",
        b'{"prompt": "x"',
        b'{"prompt": NaN}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "x", "metadata": ' + b"[" * 200 + b"]" * 200 + b"}",
        b'{"prompt": "x", "metadata": ' + b'{"a":' * 200 + b"1" + b"}" * 200 + b"}",
        b"[" * 10**6,
        "{}".encode("utf-16"),
    ],
    ids=lambda body: repr(body[:24]),
)
def test_what_is_hardly_json_is_refused(http: TestClient, path: str, body: bytes) -> None:
    assert error_of(http.post(path, content=body))["type"] == "invalid_request_error"


# 2: bodies that are too long are not read


@pytest.fixture(scope="module")
def live(folder: Path) -> Iterator[Server]:
    running = start_server(folder, "--max-body-mib", "1")
    yield running
    assert stop_server(running) == 0


def resident_mib(server: Server) -> float:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def exchange(server: Server, head: str, *chunks: bytes) -> bytes:
    """What the server says to a request whose body may be cut off by its answer."""
    host, port = server.url.split("/")[2].split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head.encode())
        try:
            for chunk in chunks:
                connection.sendall(chunk)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has heard enough
        answer = b""
        while b"\r\n\r\n" not in answer:
            received = connection.recv(65536)
            if not received:
                break
            answer += received
        return answer


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_a_body_of_a_gibibyte_is_refused_unread(live: Server) -> None:
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
    exchange(live, head + "Content-Length: 2\r\n\r\n", b"{}")  # whatever a first request loads
    before = resident_mib(live)
    announced = exchange(live, head + f"Content-Length: {2**30}\r\n\r\n")
    assert announced.startswith(b"HTTP/1.1 413"), announced[:100]
    chunk = b"10000\r\n" + b"x" * 2**16 + b"\r\n"
    told = exchange(live, head + "Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 17)
    assert told.startswith(b"HTTP/1.1 413"), told[:100]
    large = exchange(live, head + f"X-Large: {'x' * 2**20}\r\n\r\n")
    assert large[9:10] in (b"4", b""), f"a header of a MiB: {large[:100]!r}"
    grown = resident_mib(live) - before
    assert grown < 10, f"memory grew by {grown:.1f} MiB"


# 3: messages


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ([], "messages is empty"),
        ([{"role": "user", "content": "x"}, {"role": "boss", "content": "x"}], "messages[1]"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": None}], "messages[1]"),
        ([{"role": "user", "content": [{"type": "smell"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": "x"}, {"role": "tool", "content": "x"}], "messages[1]"),
        ([{"role": "user", "content": 5}], "messages[0]"),
        ([{"content": "x"}], "messages[0]"),
        ([{"role": "assistant", "tool_calls": [{"id": ["a"]}]}], "messages[0]"),
        (
            [
                {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f"}}]},
                {"role": "tool", "tool_call_id": ["a"], "content": "x"},
            ],
            "messages[1].tool_call_id",
        ),
    ],
)
def test_a_wrong_message_is_named(http: TestClient, messages: list[Any], place: str) -> None:
    error = error_of(http.post(CHAT, json=says(*messages)))
    assert error["param"] == "messages" and place in error["message"], error


def test_a_role_that_is_no_text_and_a_token_of_many_digits_are_refused(http: TestClient) -> None:
    item = {"role": ["user"], "content": "x"}
    assert "input[0]" in error_of(http.post("/v1/responses", json={"input": [item]}))["message"]
    body = {"prompt": "x", "logit_bias": {"9" * 5000: 1}}
    assert error_of(http.post(TEXT, json=body))["param"] == "logit_bias"


# 4: odd characters


@pytest.mark.parametrize("text", ["\0", "a\0b", "\x1b[2J\r\n", "\u202eabc\u202c", "\ufeff", "\x7f"])
def test_odd_characters_come_back_as_they_were(http: TestClient, text: str) -> None:
    tokens = http.post("/tokenize", json={"prompt": text}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == text
    assert http.post(CHAT, json=says({"role": "user", "content": text})).status_code == 200


@pytest.mark.parametrize("path", [CHAT, TEXT, "/v1/responses", "/v1/embeddings", "/tokenize"])
@pytest.mark.parametrize("half", ["\\ud800", "\\udc00\\ud800", "x\\udfff"])
def test_half_a_character_is_refused(http: TestClient, path: str, half: str) -> None:
    for body in (f'{{"prompt": "{half}"}}', f'{{"{half}": 1}}', f'{{"a": [{{"b": "{half}"}}]}}'):
        assert "surrogate" in error_of(http.post(path, content=body))["message"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32"])
def test_half_a_character_in_bytes_is_refused(http: TestClient, encoding: str) -> None:
    for path, field in ((TEXT, "prompt"), ("/v1/responses", "input")):
        text = f'{{"{field}": "a", "stop": "\ud800", "instructions": "\ud800"}}'
        body = text.encode(encoding, "surrogatepass")
        assert "not UTF-8" in error_of(http.post(path, content=body))["message"]
    assert http.post("/tokenize", content='\ufeff{"prompt": "a"}'.encode()).status_code == 200


def test_a_million_emoji_are_refused_for_their_length(http: TestClient) -> None:
    error = error_of(http.post(TEXT, json={"prompt": "\U0001f600" * 10**6}))
    assert error["param"] == "prompt" and "max_model_len" in error["message"]


def test_no_line_can_be_put_into_the_log(http: TestClient, caplog) -> None:
    name = "x\r\nERROR forged\x1b[31m"
    with caplog.at_level(logging.DEBUG, "fastdeploy"):
        http.post(TEXT, json={"prompt": "x", "max_tokens": 1, name: 1})
        http.post(TEXT, json={"prompt": "x", "temperature": name})
    text = "".join(record.getMessage() for record in caplog.records)
    assert "forged" in text and not set("\r\n\x1b") & set(text), repr(text)


# 5: text that spells control tokens


@pytest.mark.parametrize("spelled", CONTROL)
def test_text_never_becomes_a_control_token(http: TestClient, llm: LLM, spelled: str) -> None:
    control = {llm.tokenizer.id_of(token) for token in llm.tokenizer.control_tokens}
    text = f"a {spelled} b"
    assert not control & set(http.post("/tokenize", json={"prompt": text}).json()["tokens"])
    counts = []
    for content in (text, "a b", [{"type": "text", "text": text}]):
        body = says({"role": "user", "content": content})
        tokens = http.post("/tokenize", json={"messages": body["messages"]}).json()["tokens"]
        counts.append(sum(token in control for token in tokens))
    assert counts[0] == counts[1] == counts[2], f"control tokens: {counts}"


# 6: lengths


def test_the_longest_prompt_is_one_less_than_the_model_reads(http: TestClient) -> None:
    longest: list[int] = [5] * (MAX_LEN - 1)
    answer = http.post(TEXT, json={"prompt": longest, "max_tokens": 9, "ignore_eos": True}).json()
    assert answer["usage"]["completion_tokens"] == 1
    assert answer["choices"][0]["finish_reason"] == "length"
    for length in (MAX_LEN, MAX_LEN + 1, 10 * MAX_LEN):
        error = error_of(http.post(TEXT, json={"prompt": [5] * length}))
        assert error["param"] == "prompt" and f"has {length} tokens" in error["message"]


@pytest.mark.parametrize("value", [0, -1, 1.5, "5", True, 2**63])
def test_max_tokens_takes_positive_integers(http: TestClient, value: Any) -> None:
    body = {"prompt": "x", "max_tokens": value}
    assert error_of(http.post(TEXT, json=body))["param"] == "max_tokens"


def test_a_bound_past_the_end_is_the_end_and_says_so(http: TestClient) -> None:
    body = {"prompt": [5] * 10, "max_tokens": 2**31, "ignore_eos": True}
    answer = http.post(TEXT, json=body).json()
    assert answer["usage"]["completion_tokens"] == MAX_LEN - 10
    assert answer["choices"][0]["finish_reason"] == "length"


# 7 and 8: numbers and stop strings


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", (-1, -1e-9, "hot", [])),
        ("top_p", (-0.1, 1.1, 1e9)),
        ("min_p", (-0.1, 1.1)),
        ("top_k", (-5, 1.5, 2**63)),
        ("n", (0, 129, 10_000)),
        ("seed", (-1, 2**63, 2**64)),
        ("presence_penalty", (-2.1, 2.1)),
        ("repetition_penalty", (0, -1)),
        ("logit_bias", ({"5": 1e4}, {"-1": 1}, {"99999999": 1}, {"x": 1})),
        ("priority", (2**31, -(2**31) - 1, 0.5)),
        ("stop", ("", [""], ["a"] * 10_000, "x" * 2000, [5])),
        ("stop_token_ids", ([-1], [10**9], [0.5], [5] * 2000)),
        ("bad_words", ([""], ["a"] * 10_000)),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_range(
    http: TestClient, name: str, values: tuple[Any, ...]
) -> None:
    for value in values:
        error = error_of(http.post(TEXT, json={"prompt": "x", "max_tokens": 1, name: value}))
        assert error["param"] == name, f"{value!r}: {error}"


# 18: what belongs to the request itself


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_template_arguments_cannot_take_the_requests_place(http: TestClient, name: str) -> None:
    body = says({"role": "user", "content": "x"}) | {"chat_template_kwargs": {name: None}}
    assert error_of(http.post(CHAT, json=body))["param"] == "chat_template_kwargs"
    for path in ("/tokenize", "/v1/embeddings"):
        chat = {key: value for key, value in body.items() if key != "max_tokens"}
        assert error_of(http.post(path, json=chat))["param"] == "chat_template_kwargs"


# 26 is in test_server_fields.py (ids) and test_responses.py (keys, cancelled twice).
# 27 and 28: keys and foreign origins


@pytest.fixture(scope="module")
def locked(folder: Path) -> TestClient:
    """Without its lifespan: nothing behind the gate may be reached."""
    engine = EngineConfig(model=str(folder), max_model_len=64, dtype="float32", enable_lora=True)
    keys = ServerConfig(api_key=["s3cret"], enable_control_api=True)
    return TestClient(create_app(engine, keys))


def test_every_route_but_health_wants_the_key(locked: TestClient) -> None:
    walked = 0
    for route in locked.app.routes:
        if route.path in PAGE_PATHS:
            continue
        path = route.path.replace("{", "").replace("}", "")
        if path in OPEN_PATHS:
            continue
        methods = route.methods if isinstance(route, APIRoute) else {"GET"}
        for method in {*methods, "GET", "POST", "OPTIONS", "PUT"}:
            for headers in (
                {},
                {"authorization": "Bearer wrong"},
                {"authorization": "s3cret"},
                {"authorization": "Basic s3cret"},
                {"x-api-key": "s3cret"},
                {"cookie": "key=s3cret"},
            ):
                query = "?api_key=s3cret&key=s3cret&authorization=Bearer%20s3cret"
                answer = locked.request(method, path + query, headers=headers)
                assert answer.status_code == 401, f"{method} {path} {headers}"
                walked += 1
    assert walked > 500, f"only {walked} requests: are the routes there?"


def test_no_foreign_page_is_let_in(http: TestClient) -> None:
    headers = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    for method in ("OPTIONS", "POST", "GET"):
        answer = http.request(method, CHAT, headers=headers, content=b"{}")
        assert not [name for name in answer.headers if name.startswith("access-control")], method
    assert http.options(CHAT, headers=headers).status_code in (403, 405)
    assert json.loads(http.get("/v1/models").text)["object"] == "list"
