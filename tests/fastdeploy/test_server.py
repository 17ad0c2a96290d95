"""The server as its users meet it: a process on loopback, and the official client."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from helpers_server import MAX_LEN, Server, app_client, start_server, stop_server, wait_until
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from fastdeploy import LLM, SamplingParams
from fastdeploy.config import EngineConfig, ServerConfig
from fastdeploy.engine.core import Engine
from fastdeploy.server.app import OPEN_PATHS, PAGE_PATHS, create_app
from fastdeploy.server.supervisor import MAX_BAD_STARTS

GOLDEN = Path(__file__).parents[1] / "golden"
HELLO: list[Any] = [{"role": "user", "content": "Hello!"}]


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=server.url, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def http(server: Server):
    with httpx.Client(base_url=server.url, timeout=30) as session:
        yield session


def figures(server: Server) -> dict[str, float]:
    """Metrics without labels, by name."""
    text = httpx.get(server.url.removesuffix("/v1") + "/metrics").text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return {s.name.removeprefix("fastdeploy:"): s.value for s in samples if not s.labels}


def test_chat_gives_what_the_library_gives(client: OpenAI, llm: LLM) -> None:
    answer = client.chat.completions.create(
        model="any name", messages=HELLO, temperature=0, max_completion_tokens=12
    )
    expected = llm.chat(HELLO, SamplingParams(temperature=0, max_tokens=12))[0]
    assert answer.choices[0].message.content == expected.outputs.text
    assert answer.choices[0].finish_reason == expected.outputs.finish_reason
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == len(expected.outputs.token_ids)


def test_a_stream_concatenates_to_the_whole_answer(client: OpenAI) -> None:
    settings: dict[str, Any] = {
        "model": "m",
        "messages": HELLO,
        "seed": 3,
        "max_tokens": 40,
        "n": 2,
    }
    whole = client.chat.completions.create(**settings)
    texts, reasons, usage = ["", ""], [None, None], None
    options = {"include_usage": True}
    for chunk in client.chat.completions.create(**settings, stream=True, stream_options=options):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        usage = chunk.usage or usage
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_a_stop_string_cuts_the_answer_streamed_or_not(client: OpenAI) -> None:
    settings: dict[str, Any] = {"model": "m", "prompt": "The quick", "temperature": 0}
    settings |= {"max_tokens": 24, "extra_body": {"ignore_eos": True}}
    text = client.completions.create(**settings).choices[0].text
    stop = text[7:10]
    expected = text[: text.index(stop)]
    cut = client.completions.create(**settings, stop=stop).choices[0]
    assert (cut.text, cut.finish_reason) == (expected, "stop")
    chunks = list(client.completions.create(**settings, stop=[stop], stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected


def test_completions_take_texts_and_ids_and_echo_them(client: OpenAI, llm: LLM) -> None:
    texts = ["Hello", "The dog sleeps"]
    ids = [llm.tokenizer.encode(text) for text in texts]
    settings: dict[str, Any] = {"model": "m", "temperature": 0, "max_tokens": 5}
    by_text = client.completions.create(prompt=texts, n=2, **settings)
    by_ids = client.completions.create(prompt=ids, n=2, **settings)
    assert [c.text for c in by_text.choices] == [c.text for c in by_ids.choices]
    assert [c.index for c in by_text.choices] == [0, 1, 2, 3]
    one = client.completions.create(prompt=ids[0], **settings).choices[0].text
    echo = client.completions.create(prompt="Hello", echo=True, logprobs=1, **settings).choices[0]
    assert by_text.choices[0].text == one and echo.text == "Hello" + one
    assert "".join(echo.logprobs.tokens) == echo.text or "\ufffd" in echo.text
    assert echo.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in echo.logprobs.token_logprobs[1:])


def test_logprobs_are_in_openai_form(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="m", messages=HELLO, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for token in content:
        values = [top.logprob for top in token.top_logprobs]
        assert len(values) == 3 and values == sorted(values, reverse=True)
        assert token.logprob == values[0], "greedy takes the likeliest"
    text = b"".join(bytes(token.bytes) for token in content).decode("utf-8", "replace")
    assert text.startswith(answer.choices[0].message.content)


def test_control_tokens_in_text_stay_text(client: OpenAI, llm: LLM) -> None:
    end = llm.tokenizer.id_of("<|end_of_sentence|>")
    counts = []
    for content in ("a <|end_of_sentence|> b", "a b"):
        body = {"return_token_ids": True}
        messages: list[Any] = [{"role": "user", "content": content}]
        answer = client.chat.completions.create(
            model="m", messages=messages, max_tokens=1, extra_body=body
        )
        counts.append(answer.choices[0].message.prompt_token_ids.count(end))
    assert counts[0] == counts[1]


def test_models_health_and_metrics(client: OpenAI, server: Server) -> None:
    (card,) = client.models.list().data
    assert (card.id, card.max_model_len) == ("tiny", MAX_LEN)
    root = server.url.removesuffix("/v1")
    assert httpx.get(root + "/health").status_code == httpx.post(root + "/ping").status_code == 200
    before = figures(server)
    client.completions.create(model="m", prompt=[5] * 20, max_tokens=7)
    after = figures(server)
    for name, change in {
        "requests_number_total": 1,
        "prompt_tokens_total": 20,
        "e2e_request_latency_seconds_count": 1,
        "time_to_first_token_seconds_count": 1,
        "request_params_max_tokens_sum": 7,
    }.items():
        assert after[name] - before[name] == change, name
    assert after["num_requests_running"] == after["gpu_cache_usage_perc"] == 0
    assert after["max_batch_size"] == 4


def test_the_transcript_of_a_stream(http: httpx.Client, llm: LLM) -> None:
    """Byte for byte what a client reads; the bias makes the random model say HHH."""
    body = {
        "messages": HELLO,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 3,
        "temperature": 0,
        "logit_bias": {str(llm.tokenizer.encode("H")[0]): 100},
        "return_token_ids": False,
    }
    answer = http.post("/chat/completions", json=body)
    text = re.sub(r'"id":"chatcmpl-[0-9a-f]{32}"', '"id":"ID"', answer.text)
    text = re.sub(r'"created":\d+', '"created":0', text)
    text = re.sub(r'"arrival_time":[0-9.e-]+', '"arrival_time":0', text)
    text = re.sub(r'"(prompt_tokens|total_tokens|cached_tokens)":\d+', r'"\1":0', text)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert text == (GOLDEN / "chat_stream.txt").read_text(encoding="utf-8")


def test_a_stream_to_a_client_of_http_1_0_has_no_frames(server: Server) -> None:
    """Most events go past ASGI, framed for HTTP/1.1; this client would take frames for text."""
    content = b'{"prompt": [5, 6], "max_tokens": 9, "stream": true, "ignore_eos": true}'
    head = b"POST /v1/completions HTTP/1.0\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    address = httpx.URL(server.url)
    with socket.create_connection((address.host, address.port), timeout=30) as connection:
        connection.sendall(head % len(content) + content)
        _, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    *lines, done, rest = body.decode().split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert len(events) >= 2 and events[-1]["choices"][0]["finish_reason"] == "length"
    assert (done, rest) == ("data: [DONE]", "")


BIG = "x" * 1000
BAD: list[tuple[str, Any, str | None]] = [
    ("chat", b"{", None),
    ("chat", b"\xff\xfe", None),
    ("chat", b"[1]", None),
    ("chat", b'{"temperature": NaN}', None),
    ("chat", b"[" * 100_000, None),
    ("chat", b'{"n": ' + b"9" * 5000 + b"}", None),
    (
        "chat",
        b'{"temperature": 1e999, "messages": [{"role": "user", "content": "x"}]}',
        None,
    ),
    ("chat", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', None),
    ("chat", {"messages": []}, "messages"),
    ("chat", {"messages": None}, "messages"),
    ("chat", {"messages": "hello"}, "messages"),
    ("chat", {"messages": [{"role": "boss", "content": "x"}]}, "messages"),
    ("chat", {"messages": [{"role": "user", "content": None}]}, "messages"),
    ("chat", {"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "messages"),
    ("chat", {"messages": [{"role": "user"}]}, "messages"),
    ("chat", {"temperature": -1}, "temperature"),
    ("chat", {"temperature": "hot"}, "temperature"),
    ("chat", {"top_p": 1.5}, "top_p"),
    ("chat", {"top_k": -5}, "top_k"),
    ("chat", {"n": 10_000}, "n"),
    ("chat", {"n": 0}, "n"),
    ("chat", {"n": True}, "n"),
    ("chat", {"seed": 2**64}, "seed"),
    ("chat", {"max_tokens": 0}, "max_tokens"),
    ("chat", {"max_tokens": 1.5}, "max_tokens"),
    ("chat", {"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
    ("chat", {"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
    ("chat", {"stop": ""}, "stop"),
    ("chat", {"stop": ["a"] * 10_000}, "stop"),
    ("chat", {"logit_bias": {"x": 1}}, "logit_bias"),
    ("chat", {"logit_bias": {"1000000": 1}}, "logit_bias"),
    ("chat", {"logit_bias": {str(i): 1 for i in range(200_000)}}, "logit_bias"),
    ("chat", {"top_logprobs": 2}, "top_logprobs"),
    ("chat", {"logprobs": True, "top_logprobs": 21}, "logprobs"),
    ("chat", {"stream_options": {"include_usage": True}}, "stream_options"),
    ("chat", {"stream": True, "stream_options": {"x": 1}}, "stream_options"),
    ("chat", {"tools": [{"type": "function"}]}, "tools"),
    ("chat", {"response_format": {"type": "json"}}, "response_format"),
    ("chat", {"temprature": 1}, "temprature"),
    ("chat", {"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs"),
    ("chat", {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ("chat", {"logits_processors_args": {"logit_bias": {"x": 1}}}, "logits_processors_args"),
    ("chat", {"messages": [{"role": "user", "content": BIG}]}, "prompt"),
    ("text", {}, "prompt"),
    ("text", {"prompt": ""}, "prompt"),
    ("text", {"prompt": []}, "prompt"),
    ("text", {"prompt": [[]]}, "prompt"),
    ("text", {"prompt": [10**6]}, "prompt"),
    ("text", {"prompt": ["a", 1]}, "prompt"),
    ("text", {"prompt": [5] * MAX_LEN}, "prompt"),
    ("text", {"prompt": ["a"] * 100, "n": 100}, "n"),
    ("text", {"prompt": "a", "suffix": "b"}, "suffix"),
    ("text", {"prompt": "a", "best_of": 3, "stream": True}, "best_of"),
    ("text", {"prompt": "a", "best_of": 2, "n": 3}, "best_of"),
    ("text", {"prompt": "a", "priority": 0.5}, "priority"),
    ("chat", {"reasoning_max_tokens": 5}, "reasoning_max_tokens"),
]


@pytest.mark.parametrize(("kind", "body", "param"), BAD, ids=lambda v: repr(v)[:60])
def test_a_mistake_of_the_user_is_a_400_that_names_it(
    http: httpx.Client, kind: str, body: Any, param: str | None
) -> None:
    path = {"chat": "/chat/completions", "text": "/completions"}[kind]
    if isinstance(body, dict):
        body = json.dumps(({"messages": HELLO} if kind == "chat" else {}) | body).encode()
    answer = http.post(path, content=body)
    assert answer.status_code == 400, answer.text[:300]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert len(error["message"]) < 400 and "Traceback" not in error["message"]
    assert "/" not in error["message"].replace("</", ""), f"a path? {error}"


def test_unknown_routes_and_methods(http: httpx.Client) -> None:
    assert http.get("/nothing").status_code == 404
    assert http.get("/chat/completions").status_code == 405
    assert http.get("/nothing").json()["error"]["message"]


def test_whatever_can_be_got_has_a_head(http: httpx.Client, server: Server) -> None:
    root = server.url.removesuffix("/v1")
    for path in ("/v1/models", "/health", "/metrics", "/openapi.json"):
        whole, head = (call(root + path) for call in (http.get, http.head))
        assert (whole.status_code, head.status_code, head.content) == (200, 200, b"")
        assert head.headers["content-type"] == whole.headers["content-type"]
    assert http.head("/chat/completions").status_code == 405


def test_harmless_and_unknown_fields_are_accepted(client: OpenAI) -> None:
    body = {"metadata": None, "user": "u", "store": True, "zzz": 1, "tools": [], "stop": None}
    answer = client.chat.completions.create(
        model="", messages=HELLO, max_tokens=1, extra_body=body | {"max_tokens": 2}
    )
    assert answer.usage.completion_tokens <= 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_takes_its_work_with_it(server: Server, stream: bool) -> None:
    body = {"prompt": "Hello", "max_tokens": 240, "n": 100, "ignore_eos": True, "stream": stream}
    content = json.dumps(body)
    address = server.url.removeprefix("http://").removesuffix("/v1").split(":")
    before = figures(server)["generation_tokens_total"]
    with socket.create_connection((address[0], int(address[1]))) as session:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        session.sendall((head + content).encode())
        wait_until(lambda: figures(server)["generation_tokens_total"] > before)
    wait_until(lambda: is_idle(server))
    now = figures(server)
    assert now["free_gpu_block_num"] == now["max_gpu_block_num"]
    made = now["generation_tokens_total"] - before
    assert made < 24_000, "all of it was made, for nobody"


def is_idle(server: Server) -> bool:
    now = figures(server)
    return now["num_requests_running"] + now["num_requests_waiting"] == 0


@pytest.fixture(scope="module")
def strict(folder: Path):
    """A server with a key, a name, and little room."""
    running = start_server(
        folder,
        *("--api-key", "s3cret,other", "--served-model-name", "ernie"),
        *("--max-concurrency", "1", "--max-body-mib", "1"),
    )
    yield running
    assert stop_server(running) == 0


def test_the_key_the_name_and_the_limits(strict: Server) -> None:
    def client(key: str) -> OpenAI:
        return OpenAI(base_url=strict.url, api_key=key, max_retries=0)

    for key in ("wrong", "s3cret2", "s3cre"):
        with pytest.raises(openai.AuthenticationError):
            client(key).chat.completions.create(model="ernie", messages=HELLO)
    allowed = client("other")
    assert allowed.chat.completions.create(model="ernie", messages=HELLO, max_tokens=2).choices
    with pytest.raises(openai.NotFoundError, match="'gpt'"):
        allowed.chat.completions.create(model="gpt", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="enable_logprob"):
        allowed.chat.completions.create(model="ernie", messages=HELLO, logprobs=True)
    with pytest.raises(openai.APIStatusError) as caught:
        allowed.completions.create(model="ernie", prompt="x" * 2**21)
    assert caught.value.status_code == 413


def test_one_request_too_many_is_told_to_come_back(strict: Server) -> None:
    client = OpenAI(base_url=strict.url, api_key="s3cret", max_retries=0)
    settings: dict[str, Any] = {"model": "ernie", "prompt": "Hello", "max_tokens": 240, "n": 64}
    with client.completions.create(**settings, stream=True) as stream:
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="ernie", prompt="Hello", max_tokens=1)
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 300
    load = {"url": strict.url.removesuffix("/v1") + "/load", "headers": {"x-api-key": "s3cret"}}
    wait_until(lambda: httpx.get(**load).json()["server_load"] == 0)
    assert client.completions.create(model="ernie", prompt="Hello", max_tokens=1).choices


def test_the_server_stops_in_the_middle_of_a_stream(folder: Path) -> None:
    running = start_server(folder)
    body = {"prompt": "Hello", "max_tokens": 240, "n": 64, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", running.url + "/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert stop_server(running) == 0
        assert "the server is stopping" in [line for line in lines if line][-2]
    port = int(running.url.split(":")[2].split("/")[0])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=2)


def test_a_stop_waits_for_what_is_in_work_unless_it_is_said_twice(folder: Path) -> None:
    running = start_server(folder, "--timeout-graceful-shutdown", "60")
    body = {"prompt": "Hello", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", running.url + "/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        running.process.send_signal(signal.SIGTERM)
        assert '"finish_reason":"length"' in [line for line in lines if line][-2]
    assert running.process.wait(20) == 0
    running.process.communicate()
    running = start_server(folder, "--timeout-graceful-shutdown", "60")
    body["n"] = 128
    with httpx.stream("POST", running.url + "/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        running.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not accepts(running))
        assert running.process.poll() is None
        assert stop_server(running) == 0
        whole = 0
        with contextlib.suppress(httpx.RemoteProtocolError):  # it may be cut in the middle
            for line in lines:
                whole += '"finish_reason":"length"' in line
    assert whole < 128, "the second signal was of no use"


def accepts(server: Server) -> bool:
    try:
        return httpx.get(server.url.removesuffix("/v1") + "/ready").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def app(folder: Path):
    config = EngineConfig(model=str(folder), max_model_len=64, dtype="float32")
    return create_app(config, ServerConfig(api_key=["k"]))


def test_drafts_reach_the_client_in_order_and_are_counted(folder: Path, llm: LLM) -> None:
    config = EngineConfig(
        model=str(folder),
        max_model_len=64,
        dtype="float32",
        speculative_config={"method": "ngram", "num_speculative_tokens": 3},
    )
    bias = {str(llm.tokenizer.encode("H")[0]): 100}  # the text is HHH...: every draft comes true
    body = {"prompt": "x", "max_tokens": 30, "temperature": 0, "logit_bias": bias}
    with app_client(config) as client:
        answer = client.post("/v1/completions", json=body).json()
        choice = answer["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("H" * 30, "length")
        body |= {"stream": True, "stop": ["HHHHHHH"], "include_stop_str_in_output": True}
        lines = client.post("/v1/completions", json=body).text.splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert "".join(event["choices"][0]["text"] for event in events) == "H" * 7
        text = client.get("/metrics").text
    families = text_string_to_metric_families(text)
    seen = {s.name: s.value for f in families for s in f.samples if "spec_decode" in s.name}
    seen = {name.removeprefix("fastdeploy:spec_decode_"): n for name, n in seen.items()}
    assert seen["num_accepted_tokens_total"] > 20 and seen["num_emitted_tokens_total"] >= 37
    assert 0.8 < seen["draft_acceptance_rate"] <= seen["efficiency"] <= 1, f"{seen}"


def test_every_route_but_health_wants_the_key(app) -> None:
    client = TestClient(app)  # without its lifespan: nothing behind the gate may be reached
    paths = {route.path for route in app.routes}
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/metrics"} <= paths
    guarded = paths - OPEN_PATHS - PAGE_PATHS
    for path in [*guarded, "/web", "/docs", "/openapi.json", "/HEALTH", "/health/"]:
        for method in ("GET", "POST"):
            answer = client.request(method, path)
            assert answer.status_code == 401, f"{method} {path}: {answer.status_code}"
            assert answer.headers["www-authenticate"] == "Bearer"


def test_an_engine_that_fails_says_so_and_is_started_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = EngineConfig(model=str(folder), max_model_len=64, dtype="float32")
    step, fails = Engine.step, [True]

    def broken(engine: Engine) -> Any:
        if fails:
            raise ArithmeticError("secret detail")
        return step(engine)

    monkeypatch.setattr(Engine, "step", broken)
    with app_client(config) as client:
        answer = client.post("/v1/completions", json={"prompt": "x"})
        assert answer.status_code == 503 and "secret" not in answer.text
        assert answer.headers["retry-after"] == "1"
        fails.clear()
        wait_until(lambda: client.get("/ready").status_code == 200)
        body = {"prompt": "x", "max_tokens": 3}
        assert client.post("/v1/completions", json=body).status_code == 200
    assert "secret detail" in caplog.text


def test_an_engine_that_only_fails_is_given_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(engine: Engine) -> Any:
        raise ArithmeticError

    monkeypatch.setattr(Engine, "step", broken)
    monkeypatch.setattr("fastdeploy.server.supervisor.MAX_PAUSE_S", 0.01)
    config = EngineConfig(model=str(folder), max_model_len=64, dtype="float32")
    with app_client(config) as client:
        for _ in range(MAX_BAD_STARTS):
            wait_until(lambda: client.get("/ready").status_code == 200)
            assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 503
        wait_until(lambda: "giving up" in client.get("/ready").text)
        assert client.get("/live").status_code == 200
