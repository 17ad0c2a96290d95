"""Keys of the server keep their texts apart in the prefix cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from fastdeploy.config import EngineConfig, ServerConfig
from fastdeploy.engine.loading import load
from fastdeploy.server.app import create_app

SETTINGS = {"max_model_len": 64, "block_size": 8, "dtype": "float32"}


def client(folder: Path, keys: list[str] | None) -> TestClient:
    return TestClient(
        create_app(load(EngineConfig(model=str(folder), **SETTINGS)), ServerConfig(api_key=keys))
    )


def num_cached(session: TestClient, key: str, **fields: object) -> int:
    body = {"prompt": [9] * 30, "max_tokens": 1, **fields}
    headers = {"authorization": f"Bearer {key}"}
    answer = session.post("/v1/completions", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_two_keys_never_hit_each_others_blocks(folder: Path) -> None:
    with client(folder, ["one", "two"]) as session:
        assert num_cached(session, "one") == 0
        assert num_cached(session, "two") == 0, "the other key's blocks were used"
        assert num_cached(session, "one") == num_cached(session, "two") == 24


def test_a_salt_of_the_body_divides_the_texts_of_a_key(folder: Path) -> None:
    with client(folder, ["one", "two"]) as session:
        assert num_cached(session, "one", cache_salt="x") == 0
        assert num_cached(session, "one") == 0
        assert num_cached(session, "two", cache_salt="x") == 0
        assert num_cached(session, "one", cache_salt="x") == 24


def test_without_keys_the_header_means_nothing(folder: Path) -> None:
    with client(folder, None) as session:
        assert num_cached(session, "one") == 0
        assert num_cached(session, "two") == 24
        assert num_cached(session, "two", cache_salt="x") == 0


@pytest.mark.parametrize("salt", ["", "x" * 1025, 5])
def test_a_salt_that_is_none_is_refused_by_name(folder: Path, salt: object) -> None:
    with client(folder, None) as session:
        answer = session.post("/v1/completions", json={"prompt": "a", "cache_salt": salt})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "cache_salt"
