"""Requests that nobody means well. The large form of this is benchmarks/faults/fuzz.py."""

from __future__ import annotations

import importlib.util
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi.routing import APIRoute
from helpers_hostile import cases, complaint, picture_cases, run_schemathesis
from helpers_server import Server, app_client, start_server, stop_server
from starlette.testclient import TestClient

from fastdeploy.config import EngineConfig, ServerConfig
from fastdeploy.server.app import OPEN_PATHS, create_app
from fastdeploy.server.openapi import ROWS, document
from tests.helpers_vision import vl_model_folder

NUM_CASES = 300
MOST_SECONDS = 10.0


@pytest.fixture(scope="module")
def small(folder: Path) -> Iterator[Server]:
    """A server whose longest answer is short."""
    running = start_server(folder, "--enable-logprob", "--api-key", "k", max_len=48)
    yield running
    assert stop_server(running) == 0, "it has not survived"


def test_every_route_is_in_the_document(folder: Path) -> None:
    engine = EngineConfig(
        model=str(folder), max_model_len=64, dtype="float32", enable_lora=True, max_loras=1
    )
    app = create_app(engine, ServerConfig(enable_control_api=True, api_key=["k"]))
    written = document(app, OPEN_PATHS, needs_key=True)["paths"]
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    assert all(("GET" in route.methods) == ("HEAD" in route.methods) for route in routes)
    shown = [(m, r) for r in routes for m in r.methods - {"HEAD"} if r.include_in_schema]
    operations = {f"{method} {route.path_format}" for method, route in shown}
    assert operations == {f"{m.upper()} {path}" for path in written for m in written[path]}
    assert operations >= ROWS.keys() - {"GET /live", "GET /ready"}, "rows of routes that are gone"
    for path, described in written.items():
        for operation in described.values():
            assert ("security" in operation) == (path not in OPEN_PATHS), path
    with TestClient(app, headers={"authorization": "Bearer k"}) as client:
        assert client.get("/openapi.json").json()["paths"] == written


def test_hostile_requests_are_answered_and_the_server_goes_on(small: Server) -> None:
    root = small.url.removesuffix("/v1")
    headers = {"authorization": "Bearer k"}
    with httpx.Client(base_url=root, headers=headers, timeout=MOST_SECONDS) as client:
        every = list(cases(client.get("/openapi.json").json()))
        step = len(every) // NUM_CASES
        for path, body in every[::step]:
            began = time.monotonic()
            answer = client.post(path, content=body)
            seconds = time.monotonic() - began
            wrong = complaint(answer.status_code, answer.text, seconds, MOST_SECONDS)
            assert wrong is None, f"{path} {body[:200]!r}: {wrong}"
        good = client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 3})
        assert good.status_code == 200, good.text
        load_now = client.get("/load").json()
        assert (load_now["server_load"], load_now["cache_usage"]) == (0, 0), load_now


def test_hostile_pictures_are_answered_and_the_server_goes_on(tmp_path: Path) -> None:
    engine = EngineConfig(
        model=str(vl_model_folder(tmp_path / "vl")), max_model_len=96, dtype="float32", block_size=8
    )
    with app_client(engine, raise_server_exceptions=False) as client:
        every = list(picture_cases())
        statuses: Counter[int] = Counter()
        for path, body in every[:: len(every) // NUM_CASES]:
            began = time.monotonic()
            answer = client.post(path, content=body)
            seconds = time.monotonic() - began
            statuses[answer.status_code] += 1
            wrong = complaint(answer.status_code, answer.text, seconds, MOST_SECONDS)
            assert wrong is None, f"{path} {body[:200]!r}: {wrong}"
        assert statuses.keys() == {200, 400}, statuses
        good = client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 3})
        assert good.status_code == 200, good.text


@pytest.mark.skipif(not importlib.util.find_spec("schemathesis"), reason="needs schemathesis")
def test_schemathesis_finds_nothing(small: Server, tmp_path: Path) -> None:
    url = small.url.removesuffix("/v1") + "/openapi.json"
    options = ("--phases", "fuzzing", "--max-examples", "8", "--seed", "1")
    found = run_schemathesis(url, tmp_path / "report.json", "k", *options)
    assert found["returncode"] == 0, found["output"][-5000:]
    assert found["report"], "it has written no report"
