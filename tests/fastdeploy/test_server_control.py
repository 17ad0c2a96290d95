"""The server put to rest and woken by HTTP, with clients in the middle of something."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_server import app_client, wait_until
from starlette.testclient import TestClient

import ernie
from fastdeploy.config import EngineConfig, ServerConfig
from fastdeploy.engine.core import Engine
from fastdeploy.server.app import OPEN_PATHS, create_app

BODY = {"prompt": [9, 8, 7], "max_tokens": 12, "temperature": 0, "ignore_eos": True}
PATHS = ("pause", "resume", "sleep", "wakeup", "update_weights", "reset_prefix_cache")


def engine_config(folder: Path) -> EngineConfig:
    return EngineConfig(
        model=str(folder), max_model_len=512, max_num_seqs=2, block_size=8, dtype="float32"
    )


def make(folder: Path) -> AbstractContextManager[TestClient]:
    return app_client(engine_config(folder), ServerConfig(enable_control_api=True))


@pytest.fixture(scope="module")
def session(folder: Path):
    with make(folder) as client:
        yield client


def text(session: TestClient) -> str:
    answer = session.post("/v1/completions", json=BODY)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def send(session: TestClient, path: str, /, **body: object) -> dict:
    answer = session.post(f"/v1/{path}", json=body or None)
    assert answer.status_code == 200, answer.text
    return answer.json()


def metric(session: TestClient, name: str) -> float:
    lines = session.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"fastdeploy:{name}"))


def test_the_routes_are_there_only_if_asked_for_and_want_the_key(folder: Path) -> None:
    off = TestClient(create_app(engine_config(folder), ServerConfig()))
    assert {off.post(f"/v1/{path}").status_code for path in PATHS} == {404}
    settings = ServerConfig(enable_control_api=True, api_key=["k"])
    locked = TestClient(create_app(engine_config(folder), settings))
    assert {locked.post(f"/v1/{path}").status_code for path in PATHS} == {401}
    assert not OPEN_PATHS & {f"/v1/{path}" for path in (*PATHS, "is_paused")}


def test_pause_sleep_wakeup_resume(session: TestClient) -> None:
    before = text(session)
    tags = "tags=kv_cache,weight"
    for level in (1, 2):
        assert send(session, "pause") == {"is_paused": True, "is_sleeping": False}
        refused = session.post("/v1/completions", json=BODY)
        assert refused.status_code == 503 and "paused" in refused.text
        unready = session.get("/ready")
        assert (unready.status_code, unready.json()["reason"]) == (503, "paused")
        assert session.get("/health").status_code == session.post("/ping").status_code == 200
        assert send(session, f"sleep?{tags}&level={level}")["is_sleeping"]
        assert session.post("/v1/resume").status_code == 409
        assert send(session, f"wakeup?{tags}") == {"is_paused": True, "is_sleeping": False}
        assert send(session, "resume") == {"is_paused": False, "is_sleeping": False}
        assert session.get("/v1/is_paused").json()["is_paused"] is False
        assert session.get("/ready").status_code == 200
        assert text(session) == before


def test_new_weights_from_a_folder(session: TestClient, folder: Path, tmp_path: Path) -> None:
    before = text(session)
    model = ernie.load(folder, dtype=torch.float32)
    model.init_weights(seed=99, std=0.3)
    ernie.save(model, tmp_path / "other")
    (tmp_path / "empty").mkdir()
    refused = session.post("/v1/update_weights")
    assert refused.status_code == 409 and "send pause first" in refused.text
    send(session, "pause")
    send(session, "update_weights", path=str(tmp_path / "other"))
    send(session, "resume")
    assert text(session) != before
    send(session, "pause")
    for body in ({"path": str(tmp_path / "none")}, {"path": 5}, {"version": 1}):
        assert session.post("/v1/update_weights", json=body).status_code == 400, body
    answer = session.post("/v1/update_weights", json={"path": str(tmp_path / "empty")})
    assert answer.status_code == 400 and "config.json" in answer.text
    send(session, "update_weights")  # those it began with
    send(session, "resume")
    assert text(session) == before


@pytest.mark.parametrize(("mode", "last"), [("abort", "abort"), ("keep", "length")])
def test_a_stream_is_told_of_its_end_or_held(
    session: TestClient, mode: str, last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, reasons = Engine.step, []

    def slow_step(engine: Engine) -> Any:
        time.sleep(0.003)  # or the text would be over before the pause
        return step(engine)

    monkeypatch.setattr(Engine, "step", slow_step)

    def listen() -> None:
        body = BODY | {"stream": True, "max_tokens": 500}
        with session.stream("POST", "/v1/completions", json=body) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    reasons.append(json.loads(line[6:])["choices"][0]["finish_reason"])

    begun = metric(session, "generation_tokens_total")
    listener = threading.Thread(target=listen)
    listener.start()
    wait_until(lambda: metric(session, "generation_tokens_total") > begun + 3)
    send(session, f"pause?mode={mode}")
    made = metric(session, "generation_tokens_total")
    if mode == "keep":
        send(session, "sleep")
        send(session, "wakeup")
    assert metric(session, "generation_tokens_total") == made < begun + 500
    send(session, "resume")
    listener.join(timeout=30)
    assert reasons[-1] == last
    assert (metric(session, "generation_tokens_total") == begun + 500) == (mode == "keep")


def test_what_waits_without_a_first_token_is_aborted_too(session: TestClient) -> None:
    done: list[dict] = []
    body = BODY | {"n": 64, "max_tokens": 400}
    listener = threading.Thread(
        target=lambda: done.append(session.post("/v1/completions", json=body).json())
    )
    listener.start()
    wait_until(lambda: metric(session, "num_requests_waiting") > 0)
    send(session, "pause")
    send(session, "resume")
    listener.join(timeout=30)
    assert "abort" in {choice["finish_reason"] for choice in done[0]["choices"]}
    assert metric(session, 'request_success_total{reason="abort"}') > 1
    assert text(session)


def test_prompts_that_were_aborted_before_they_were_scored_have_no_scores(folder: Path) -> None:
    config = dataclasses.replace(engine_config(folder), enable_logprob=True)
    with app_client(config, ServerConfig(enable_control_api=True)) as session:
        done: list[Any] = []
        body = BODY | {"prompt": [[9, 8, 7]] * 64, "max_tokens": 400, "prompt_logprobs": 0}
        listener = threading.Thread(
            target=lambda: done.append(session.post("/v1/completions", json=body))
        )
        listener.start()
        wait_until(lambda: metric(session, "num_requests_waiting") > 0)
        wait_until(lambda: metric(session, "generation_tokens_total") > 0)  # of the first
        send(session, "pause")
        listener.join(timeout=30)
        assert done[0].status_code == 200, done[0].text
        scores = [choice["prompt_logprobs"] for choice in done[0].json()["choices"]]
        assert len(scores) == 64 and scores[0] and scores[-1] is None


def test_a_path_that_no_system_has_is_refused(session: TestClient) -> None:
    answer = session.post("/v1/update_weights", json={"path": "a" * 5000})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "path"


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("pause?mode=later", "mode"),
        ("sleep?level=3", "level"),
        ("sleep?tags=weight", "tags"),
        ("wakeup?level=1", "level"),
        ("resume?now=1", "now"),
    ],
)
def test_a_parameter_that_means_nothing_is_refused(
    session: TestClient, path: str, param: str
) -> None:
    answer = session.post(f"/v1/{path}")
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param
    assert text(session)


def test_a_prefix_cache_that_was_reset_has_no_hits(session: TestClient) -> None:
    body = BODY | {"prompt": [3] * 40}
    for expected in (0, 32, 0):
        usage = session.post("/v1/completions", json=body).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == expected
        if expected:
            send(session, "reset_prefix_cache")
