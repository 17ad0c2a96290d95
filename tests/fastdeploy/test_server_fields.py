"""Fields that the server translates: who may share cached texts, the best of several samples."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from helpers_server import app_client
from starlette.testclient import TestClient

from fastdeploy import LLM, SamplingParams
from fastdeploy.config import EngineConfig, ServerConfig

SETTINGS = {"max_model_len": 64, "block_size": 8, "dtype": "float32"}


def client(folder: Path, keys: list[str] | None) -> AbstractContextManager[TestClient]:
    return app_client(EngineConfig(model=str(folder), **SETTINGS), ServerConfig(api_key=keys))


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


def test_the_best_of_several_samples_are_returned(folder: Path) -> None:
    llm = LLM(str(folder), **SETTINGS)
    texts = ["Hello", "The dog"]
    settings = {"seed": 6, "max_tokens": 12, "n": 2, "best_of": 5}
    outputs = llm.generate(texts, SamplingParams(**settings))
    with client(folder, None) as session:
        body = {"prompt": texts, "echo": True, "return_token_ids": True, **settings}
        answer = session.post("/v1/completions", json=body).json()
        refused = session.post("/v1/completions", json=body | {"stream": True})
    expected = [text + one.text for text, out in zip(texts, outputs) for one in out.outputs]
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    prompts = [choice["prompt_token_ids"] for choice in answer["choices"]]
    assert prompts == [out.prompt_token_ids for out in outputs for _ in range(2)]
    made = answer["usage"]["completion_tokens"]
    shown = sum(len(choice["completion_token_ids"]) for choice in answer["choices"])
    assert made > 2 * shown, f"{made} tokens were made, {shown} shown"
    assert refused.status_code == 400 and "cannot be streamed" in refused.text
