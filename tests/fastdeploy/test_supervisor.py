"""The engine's process lost in every way there is: noticed, replaced, and what it had put back."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import helpers_lora
import pytest
import torch
import uvicorn
from helpers_server import spawn_thread, wait_until
from starlette.testclient import TestClient

import ernie
from ernie.settings import ConfigError
from erniekit.lora import LoRA
from fastdeploy.config import EngineConfig, ServerConfig
from fastdeploy.engine.core import Engine
from fastdeploy.server import connection, supervisor
from fastdeploy.server.app import create_app
from fastdeploy.server.connection import Connection

BODY = {"prompt": [9, 8, 7], "max_tokens": 8, "temperature": 0, "ignore_eos": True}


def config(folder: Path, **settings: Any) -> EngineConfig:
    sizes = {"max_model_len": 512, "block_size": 8, "dtype": "float32"}
    return EngineConfig(model=str(folder), **sizes | settings)


@pytest.fixture(scope="module")
def session(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A server whose engine is a real process, with an adapter that may be loaded."""
    root = tmp_path_factory.mktemp("adapters")
    model = ernie.load(folder, dtype=torch.float32)
    helpers_lora.save(helpers_lora.trained(model, LoRA(4, 8.0), 1), LoRA(4, 8.0), root / "one")
    settings = ServerConfig(enable_control_api=True, lora_root=str(root))
    app = create_app(config(folder, enable_lora=True), settings)
    with pytest.MonkeyPatch.context() as patched, TestClient(app) as client:
        assert client.get("/live").status_code == 200, "it is loading, and lives"
        early = client.get("/ready")
        assert (early.status_code, early.json()["reason"]) == (
            503,
            "the engine is loading the model",
        )
        assert client.post("/v1/completions", json=BODY).status_code == 503
        assert client.get("/load").json()["cache_usage"] == 0
        assert client.post("/v1/pause").status_code == 503, "there is nothing to pause"
        assert client.get("/v1/is_paused").json()["is_paused"] is False
        wait_until(lambda: client.get("/ready").status_code == 200)
        yield client
        process = child_of(client)
        patched.setattr(supervisor, "GRACE_S", 60.0)
    # 1: its own patience was shorter than a busy machine's way to the end of Python.
    assert process.poll() in (0, 1), "it did not end by itself"


def child_of(client: TestClient) -> Any:
    return client.app.state.service.engine.supervisor.child.process  # type: ignore[attr-defined]


def answer(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/completions", json=BODY | fields)


def lose(client: TestClient, how: int, silence_s: float = supervisor.SILENCE_S) -> Any:
    """Send a signal to the engine while it works; the answer that it worked on. Meanwhile it may be
    silent for `silence_s`: at other times it is not to be lost because others keep it waiting.
    """
    process, answers = child_of(client), []
    thread = threading.Thread(target=lambda: answers.append(answer(client, max_tokens=450, n=32)))
    thread.start()
    wait_until(lambda: "fastdeploy:num_requests_running 8.0" in client.get("/metrics").text)
    os.kill(process.pid, how)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(supervisor, "SILENCE_S", silence_s)
        thread.join()
    wait_until(lambda: client.get("/ready").status_code == 200)
    assert child_of(client) is not process and process.poll() == -signal.SIGKILL
    return answers[0]


def test_a_killed_engine_comes_back_with_its_adapters_and_its_pause(session: TestClient) -> None:
    body = {"lora_name": "a", "lora_path": "one"}
    assert session.post("/v1/load_lora_adapter", json=body).status_code == 200
    plain, adapted = answer(session).json(), answer(session, model="a").json()
    lost = lose(session, signal.SIGKILL)
    assert lost.status_code == 503 and lost.headers["retry-after"] == "1"
    assert answer(session).json()["choices"] == plain["choices"]
    assert answer(session, model="a").json()["choices"] == adapted["choices"]
    assert session.post("/v1/pause").status_code == 200
    process = child_of(session)
    process.kill()
    wait_until(lambda: child_of(session) is not process)
    wait_until(lambda: session.get("/health").status_code == 200)
    assert session.get("/ready").json()["reason"] == "paused"
    assert "paused" in answer(session).text
    assert session.post("/v1/resume").json() == {"is_paused": False, "is_sleeping": False}
    assert answer(session).json()["choices"] == plain["choices"]


def test_a_frozen_engine_is_replaced(session: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "DUMP_S", 0.1)
    assert lose(session, signal.SIGSTOP, silence_s=1.5).status_code == 503
    assert answer(session).status_code == 200


def test_ctrl_c_and_sigterm_are_for_the_server(session: TestClient) -> None:
    for sig in (signal.SIGINT, signal.SIGTERM):
        os.kill(child_of(session).pid, sig)
    assert answer(session).status_code == 200


def test_the_api_process_does_not_import_torch() -> None:
    code = "import sys, fastdeploy.server.listener; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_step_that_hangs_is_noticed_though_the_heart_beats(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step, goes_on = Engine.step, threading.Event()

    def stuck(engine: Engine) -> Any:
        goes_on.wait()
        return step(engine)

    monkeypatch.setattr(Engine, "step", stuck)
    monkeypatch.setattr(supervisor, "DUMP_S", 0.1)
    settings = ServerConfig(engine_step_timeout=1)
    with TestClient(create_app(config(folder), settings, spawn_thread)) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        answers: list[Any] = []
        thread = threading.Thread(target=lambda: answers.append(answer(client)))
        thread.start()
        wait_until(lambda: "a step of the engine took more than 1 s" in caplog.text)
        thread.join()
        client.app.state.service.engine.supervisor.step_timeout_s = 120  # type: ignore[attr-defined]
        goes_on.set()  # a thread cannot be killed
        assert answers[0].status_code == 503
        wait_until(lambda: client.get("/ready").status_code == 200)
        assert answer(client).status_code == 200


def test_a_model_that_cannot_be_loaded_is_said_once(folder: Path) -> None:
    settings = config(folder, max_num_batched_tokens=1)
    with TestClient(create_app(settings, ServerConfig(), spawn_thread)) as client:
        wait_until(lambda: "raise the first or lower the second" in client.get("/ready").text)
        service = client.app.state.service  # type: ignore[attr-defined]
        assert service.engine.supervisor.refusal.startswith("max_num_batched_tokens=1 is less")


def test_texts_are_as_long_as_the_model_allows(folder: Path) -> None:
    positions = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    with pytest.raises(ConfigError, match=f"than the {positions} positions"):
        create_app(config(folder, max_model_len=positions + 1), ServerConfig(), spawn_thread)
    with TestClient(
        create_app(EngineConfig(model=str(folder)), ServerConfig(), spawn_thread)
    ) as client:
        assert client.get("/v1/models").json()["data"][0]["max_model_len"] == min(positions, 2048)


# --- connections ---


@pytest.fixture
def address(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    """A server on a real socket whose patience is short."""
    monkeypatch.setattr(connection, "HEADERS_S", 0.4)
    monkeypatch.setattr(connection, "BODY_S", 0.4)
    listener = socket.create_server(("127.0.0.1", 0))
    app = create_app(config(folder), ServerConfig(), spawn_thread)
    settings = uvicorn.Config(
        app,
        http=Connection,
        h11_max_incomplete_event_size=connection.MAX_HEADER_BYTES,
        log_level="critical",
    )
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
    thread.start()
    yield listener.getsockname()
    server.should_exit = True
    wait_until(lambda: not thread.is_alive())


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "begins"),
    [
        (b"", b""),
        (b"GET /live HT", b""),
        (HEAD + b"{", b"HTTP/1.1 408"),
        (b"GET /live HTTP/1.1\r\nX: " + b"x" * 2**18, b"HTTP/1.1 431"),
        (b"rubbish\r\n\r\n", b"HTTP/1.1 400"),
        (HEAD.replace(b"50", b"99999999"), b"HTTP/1.1 413"),
    ],
)
def test_a_request_that_does_not_become_whole_is_ended(
    address: tuple[str, int], sent: bytes, begins: bytes
) -> None:
    with socket.create_connection(address, timeout=10) as client:
        answer = b""
        try:
            client.sendall(sent)
            while data := client.recv(65536):
                answer += data
        except (ConnectionResetError, BrokenPipeError):
            pass
    assert answer.startswith(begins) and bool(answer) == bool(begins), answer


def test_the_rest_of_a_body_that_has_its_answer_is_not_waited_for(
    address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first byte after an answer ends the time in which the next request is waited for."""
    monkeypatch.setattr(connection, "LINGER_S", 0.2)
    with socket.create_connection(address, timeout=20) as client:
        client.sendall(b"GET /live HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        answer = client.recv(65536)
        while b"live" not in answer.partition(b"\r\n\r\n")[2]:
            answer += client.recv(65536)
        client.sendall(b"x")
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(65536) == b""


def announced(num_bytes: int) -> bytes:
    return HEAD.replace(b"50", str(num_bytes).encode())


def chunked(num_bytes: int) -> bytes:
    return HEAD.replace(b"Content-Length: 50", b"Transfer-Encoding: chunked")


@pytest.mark.parametrize("head_of", [announced, chunked])
def test_who_is_still_sending_too_much_reads_the_413(
    address: tuple[str, int], head_of: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that closed its side at once would reset the connection under the sender."""
    monkeypatch.setattr(connection, "LINGER_S", 60.0)
    monkeypatch.setattr(connection, "BODY_S", 60.0)
    piece, count = b"x" * 2**14, 2**12
    frame = b"4000\r\n%b\r\n" % piece if head_of is chunked else piece
    with socket.create_connection(address, timeout=60) as client:
        client.sendall(head_of(len(piece) * count))
        for _ in range(count):
            client.sendall(frame)
        client.sendall(b"0\r\n\r\n" if head_of is chunked else b"")
        answer = b""
        while data := client.recv(65536):
            answer += data
    assert answer.startswith(b"HTTP/1.1 413") and b"the body is longer than" in answer


def test_who_never_stops_sending_too_much_is_cut_off(
    address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "LINGER_S", 0.2)
    with (
        socket.create_connection(address, timeout=10) as client,
        pytest.raises((ConnectionResetError, BrokenPipeError)),
    ):
        client.sendall(announced(2**40))
        while True:
            client.sendall(b"x" * 2**14)
