"""Fields that the server translates: who may share cached texts, the best of several samples."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers_server import app_client, wait_until
from starlette.testclient import TestClient

from ernie.tokenizer import Detokenizer
from fastdeploy import LLM, SamplingParams
from fastdeploy.config import EngineConfig, ServerConfig
from fastdeploy.engine.core import Engine
from fastdeploy.engine.language import Language
from fastdeploy.errors import RequestError
from fastdeploy.outputs import CompletionOutput, Logprob
from fastdeploy.server import engine as server_engine
from fastdeploy.server import reply
from fastdeploy.server.completions import Described, Length
from fastdeploy.server.engine import Answer, Piece

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


def events_of(answer: Any) -> list[dict[str, Any]]:
    lines = answer.text.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def test_events_of_several_tokens_say_the_same(folder: Path) -> None:
    body = {"prompt": "Hello", "max_tokens": 11, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "return_token_ids": True, "n": 2}
    with client(folder, None) as session:
        single = events_of(session.post("/v1/completions", json=body))
        grouped = events_of(
            session.post("/v1/completions", json=body | {"max_streaming_response_tokens": 4})
        )
    texts = [
        ["".join(e["choices"][0]["text"] for e in events if e["choices"][0]["index"] == i)]
        for events in (single, grouped)
        for i in (0, 1)
    ]
    assert texts[:2] == texts[2:]
    counts = [len(e["choices"][0]["completion_token_ids"]) for e in grouped]
    assert sorted(counts) == [3, 3, 4, 4, 4, 4]
    times = [event["choices"][0]["arrival_time"] for event in grouped]
    assert times == sorted(times) and times[0] > 0


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_has_the_ids_of_a_prompt_once(folder: Path, echo: bool) -> None:
    settings = {"max_tokens": 5, "temperature": 0, "ignore_eos": True, "n": 2}
    settings |= {"return_token_ids": True}
    asked = {"prompt": [[9, 8, 7], [5, 6]], "echo": echo, **settings}
    chat = {"prompt_token_ids": [9, 8, 7], **settings}
    names = ("prompt_token_ids", "completion_token_ids")
    with client(folder, None) as session:
        for path, body, part in (("completions", asked, None), ("chat/completions", chat, "delta")):
            whole = session.post(f"/v1/{path}", json=body).json()["choices"]
            events = events_of(session.post(f"/v1/{path}", json=body | {"stream": True}))
            new = [event["choices"][0] for event in events]
            for choice in whole:
                mine = [one for one in new if one["index"] == choice["index"]]
                said = [one[part] if part else one for one in mine]
                prompts, ids = ([one[name] for one in said if name in one] for name in names)
                expected = choice["message"] if part else choice
                assert prompts == [expected["prompt_token_ids"]] and "prompt_tokens" in said[0]
                assert [i for one in ids for i in one] == expected["completion_token_ids"]
                assert len(ids) == 5


def test_events_of_several_tokens_keep_the_scores_of_an_echo(folder: Path) -> None:
    body = {"prompt": [9, 8, 7], "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "echo": True, "logprobs": 1}
    config = EngineConfig(model=str(folder), enable_logprob=True, **SETTINGS)
    with app_client(config) as session:
        answers = [
            session.post("/v1/completions", json=body | {"max_streaming_response_tokens": size})
            for size in (1, 4)
        ]
    columns = [[event["choices"][0]["logprobs"] for event in events_of(one)] for one in answers]
    single, grouped = (
        [value for column in some for value in column["token_logprobs"]] for some in columns
    )
    assert (len(columns[1]), len(single)) == (2, 3 + 6)
    assert grouped[0] is None and grouped[1:] == pytest.approx(single[1:], abs=1e-4)


@pytest.mark.parametrize("stream", [False, True])
def test_a_step_may_bring_more_than_a_client_may_leave_unread(
    folder: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(server_engine, "MAX_UNREAD_BYTES", 600)
    body = {"prompt": [9, 8, 7], "max_tokens": 3, "ignore_eos": True, "n": 8, "stream": stream}
    config = EngineConfig(model=str(folder), **SETTINGS)
    with app_client(config, ServerConfig(timeout=15)) as session:
        answer = session.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.text.count('"finish_reason":"length"') == 8


def test_only_a_stream_that_is_left_unread_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_engine, "MAX_UNREAD_BYTES", 600)

    async def left_after(num_steps: int, *, is_streamed: bool) -> list[str]:
        """What is read of an answer whose first piece was read before these steps."""
        engine: Any = SimpleNamespace(forget=lambda answer: None)
        answer = Answer(engine, [[1]], 1)
        answer.is_streamed = is_streamed
        pieces = answer.pieces()
        for number in range(num_steps + 1):
            answer.begin_step()
            answer.put(Piece(0, CompletionOutput(0, str(number)), 0, None))
            if number == 0:
                await anext(pieces)
        if not answer.given_up.is_set():
            answer.put(Piece(0, CompletionOutput(0, "end", finish_reason="stop"), 0, None))
        return [piece.completion.text async for piece in pieces]

    read = asyncio.run(left_after(9, is_streamed=False))
    assert read == [*map(str, range(1, 10)), "end"]
    assert asyncio.run(left_after(3, is_streamed=True)) == ["1", "2", "3", "end"]
    with pytest.raises(RequestError, match="left more than 600 bytes of the answer unread"):
        asyncio.run(left_after(5, is_streamed=True))


def test_a_burst_waits_up_to_the_limit_before_the_engine_has_said_a_word(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, may_go_on = Engine.step, threading.Event()

    def held(engine: Engine) -> Any:
        may_go_on.wait()
        return step(engine)

    monkeypatch.setattr(Engine, "step", held)
    config = EngineConfig(model=str(folder), max_num_seqs=1, **SETTINGS)
    statuses: list[int] = []
    with app_client(config, ServerConfig(max_num_waiting=4)) as session:
        body = {"prompt": [9, 8, 7], "max_tokens": 2}
        ask = lambda: statuses.append(session.post("/v1/completions", json=body).status_code)  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        try:
            wait_until(lambda: len(statuses) >= 7, patience_s=20)
        finally:
            may_go_on.set()
            for thread in threads:
                thread.join()
    assert sorted(statuses) == [200] * 5 + [429] * 7, "one has the place, four wait"


def test_a_begun_answer_is_continued(folder: Path) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True, "max_tokens": 8}
    with client(folder, None) as session:
        whole = session.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
        begun = whole["completion_token_ids"][:3]
        body |= {"completion_token_ids": begun, "max_tokens": 5}
        rest = session.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    assert rest["completion_token_ids"] == whole["completion_token_ids"][3:]
    assert rest["prompt_token_ids"] == whole["prompt_token_ids"] + begun
    assert whole["completion_tokens"].startswith(whole["content"][:3])


def test_a_bound_of_the_response_is_one_of_the_answer_where_nothing_is_thought(
    folder: Path,
) -> None:
    body = {"prompt": "Hello", "max_tokens": 9, "response_max_tokens": 4, "ignore_eos": True}
    with client(folder, None) as session:
        answer = session.post("/v1/completions", json=body).json()
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["choices"][0]["finish_reason"] == "length"


def test_an_id_is_the_clients_and_not_twice_at_work(folder: Path) -> None:
    body = {"prompt": "Hello", "max_tokens": 2, "request_id": "mine.1"}
    with client(folder, ["one", "two"]) as session:
        headers = [{"authorization": f"Bearer {key}"} for key in ("one", "two")]
        for _ in range(2):  # one after the other is fine
            answer = session.post("/v1/completions", json=body, headers=headers[0])
            assert answer.json()["id"] == "cmpl-mine.1"
        service = session.app.state.service
        tokens = [5] * 20
        at_work = service.engine.submit([tokens], SamplingParams(max_tokens=40, ignore_eos=True))
        at_work.owner = hashlib.sha256(b"one").hexdigest()
        at_work.id = "cmpl-mine.1"
        refused = session.post("/v1/completions", json=body, headers=headers[0])
        assert refused.status_code == 409 and refused.json()["error"]["param"] == "request_id"
        assert session.post("/v1/completions", json=body, headers=headers[1]).status_code == 200
        bad = session.post("/v1/completions", json=body | {"request_id": "a\n"}, headers=headers[1])
        assert bad.status_code == 400
        at_work.close()


def test_logprobs_by_id(folder: Path) -> None:
    settings = SETTINGS | {"enable_logprob": True}
    config = EngineConfig(model=str(folder), **settings)
    body = {"prompt": [9, 10], "max_tokens": 2, "logprobs": 1, "temperature": 0}
    body |= {"include_logprobs_decode_token": False, "return_token_ids": True}
    with app_client(config) as session:
        choice = session.post("/v1/completions", json=body).json()["choices"][0]
        assert choice["logprobs"]["tokens"] == [
            f"token_id:{i}" for i in choice["completion_token_ids"]
        ]
        chat = {"prompt_token_ids": [9, 10], "max_tokens": 2, "logprobs": True, "temperature": 0}
        chat |= {"include_logprobs_decode_token": False}
        answer = session.post("/v1/chat/completions", json=chat).json()["choices"][0]
        assert [t["token"] for t in answer["logprobs"]["content"]] == choice["logprobs"]["tokens"]


def test_all_log_probabilities_are_all_and_each_view_has_its_own_number(folder: Path) -> None:
    config = EngineConfig(model=str(folder), enable_logprob=True, max_logprobs=-1, **SETTINGS)
    body = {"prompt": [9, 10, 11], "max_tokens": 2, "temperature": 0}
    body |= {"include_logprobs_decode_token": False}

    with app_client(config) as session:

        def choice(**fields: object) -> Any:
            answer = session.post("/v1/completions", json=body | fields)
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]

        size = session.app.state.service.engine.ready.vocab_size  # type: ignore[attr-defined]
        assert {len(top) for top in choice(logprobs=-1)["logprobs"]["top_logprobs"]} == {size}
        for shown, scored in ((1, 5), (5, 1), (-1, 2), (2, -1), (1, 0)):
            both = choice(echo=True, logprobs=shown, prompt_logprobs=scored)
            assert both["logprobs"] == choice(echo=True, logprobs=shown)["logprobs"]
            assert both["prompt_logprobs"] == choice(prompt_logprobs=scored)["prompt_logprobs"]


@pytest.mark.parametrize("stream", [False, True])
def test_offsets_count_a_character_once_whatever_spells_it(folder: Path, stream: bool) -> None:
    config = EngineConfig(model=str(folder), enable_logprob=True, **SETTINGS)
    text = "a\u00e9\U0001f600b\u9f98c"
    tokenizer = Language.read(config).tokenizer
    assert tokenizer is not None
    bias = {str(token): -100.0 for token in tokenizer.special_ids}
    body = {"prompt": text, "echo": True, "logprobs": 0, "logit_bias": bias, "stream": stream}
    with app_client(config) as session:
        answer = session.post("/v1/completions", json=body | {"max_tokens": 30, "seed": 3})
        events = events_of(answer) if stream else [answer.json()]
    choices = [event["choices"][0] for event in events if event["choices"]]
    offsets = [i for choice in choices for i in choice["logprobs"]["text_offset"]]
    ids = tokenizer.encode(text)
    assert len(ids) > len(text), "some characters are spelled by several tokens"
    complete = Detokenizer(tokenizer, skip_special=False)
    lengths = [len(complete.push([token])) for token in ids]
    assert offsets[: len(ids)] == [sum(lengths[:i]) for i in range(len(ids))]
    assert offsets[len(ids)] == len(text)
    whole = "".join(choice["text"] for choice in choices)
    assert len(text) + 20 < offsets[-1] <= len(whole)


def test_the_prompt_is_described_once_however_many_choices_it_has(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described: list[int] = []

    def counting(entry: Any, count: int) -> Any:
        described.append(count)
        return entry

    monkeypatch.setattr(reply, "narrowed", counting)
    config = EngineConfig(model=str(folder), enable_logprob=True, **SETTINGS)
    body = {"prompt": [[9, 10, 11], [9, 12]], "max_tokens": 1, "n": 3, "prompt_logprobs": 2}
    with app_client(config) as session:
        choices = session.post("/v1/completions", json=body).json()["choices"]
    assert len(described) == 2 + 1, "each token but the first of each prompt"
    scores = [choice["prompt_logprobs"] for choice in choices]
    assert scores[:3] == [scores[0]] * 3 and scores[3:] == [scores[3]] * 3
    assert [len(one) for one in scores] == [3, 3, 3, 2, 2, 2]


def test_the_older_form_of_logprobs_always_lists_the_token_itself(folder: Path) -> None:
    config = EngineConfig(model=str(folder), enable_logprob=True, **SETTINGS)
    body = {"prompt": [9, 10, 11], "max_tokens": 8, "seed": 1, "echo": True}
    with app_client(config) as session:
        for count in (0, 2):
            answer = session.post("/v1/completions", json=body | {"logprobs": count}).json()
            columns = answer["choices"][0]["logprobs"]
            rows = zip(columns["tokens"], columns["token_logprobs"], columns["top_logprobs"])
            assert next(rows)[1:] == (None, None)
            for token, own, top in rows:
                assert top[token] >= own and 1 <= len(top) <= count + 1


def test_of_tokens_with_equal_texts_the_likeliest_is_listed(folder: Path) -> None:
    tokenizer = Language.read(EngineConfig(model=str(folder), **SETTINGS)).tokenizer
    assert tokenizer is not None
    entry = {9: Logprob(-3.0, 3, "x"), 10: Logprob(-1.0, 1, "x"), 11: Logprob(-2.0, 2, "y")}
    for names, expected in (
        (lambda _, text: text, {"x": -1.0, "y": -2.0}),
        (lambda token, _: f"token_id:{token}", {f"token_id:{i}": entry[i].logprob for i in entry}),
    ):
        described = Described(Length(tokenizer), names)
        described.add(9, "x", entry, 2)
        assert described.columns["top_logprobs"] == [expected]
        assert described.columns["token_logprobs"] == [-3.0]
