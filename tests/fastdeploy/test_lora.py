"""Adapters come and go while others are served; what does not fit is refused by name."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import helpers_lora
import pytest
import torch
from helpers_server import app_client, spawn_thread, wait_until
from safetensors.torch import load_file
from starlette.testclient import TestClient
from torch import Tensor

import ernie
from ernie.generate import generate
from ernie.model import ErnieModel
from ernie.settings import ConfigError
from erniekit.lora import LoRA
from fastdeploy import LLM, SamplingParams
from fastdeploy.config import EngineConfig, ServerConfig
from fastdeploy.engine.blocks import root_of
from fastdeploy.engine.core import Engine
from fastdeploy.engine.language import Language
from fastdeploy.errors import RequestError
from fastdeploy.server import pooling
from fastdeploy.server.app import create_app
from fastdeploy.server.engine import Answer, ServerEngine
from fastdeploy.server.supervisor import State

PAIR = LoRA(4, 8.0)
PROMPT = [(7 * i + 3) % 97 for i in range(30)]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SETTINGS: dict[str, Any] = {"dtype": "float32", "max_model_len": 96, "block_size": 8}
SETTINGS |= {"enable_lora": True, "max_loras": 2}

Edit = Callable[[dict[str, Tensor], dict[str, Any]], None]


@pytest.fixture(scope="module")
def wrapped(folder: Path) -> list[ErnieModel]:
    """Two adapters beside the model of `folder`."""
    model = ernie.load(folder, dtype=torch.float32)
    return [helpers_lora.trained(model, PAIR, seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def adapters(wrapped: list[ErnieModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the adapters `one` and `two`, as the trainer saves them."""
    root = tmp_path_factory.mktemp("adapters")
    for name, model in zip(("one", "two"), wrapped):
        helpers_lora.save(model, PAIR, root / name)
    return root


@pytest.fixture
def llm(folder: Path) -> LLM:
    return LLM(str(folder), **SETTINGS)


def tokens_of(llm: LLM, lora: str | None, prompt: list[int] = PROMPT) -> tuple[list[int], int]:
    """The answer, and how many tokens of the prompt were found in the cache."""
    (out,) = llm.generate(prompt, GREEDY, lora=lora)
    return list(out.outputs[0].token_ids), out.num_cached_tokens


def expected(model: ErnieModel) -> list[int]:
    return list(generate(helpers_lora.merged(model), PROMPT, max_tokens=12))


# --- life cycle ---


def test_prefix_hits_never_cross_adapters(
    llm: LLM, adapters: Path, wrapped: list[ErnieModel]
) -> None:
    llm.load_lora("a", str(adapters / "one"))
    llm.load_lora("b", str(adapters / "two"))
    answers = [expected(model) for model in wrapped]
    assert tokens_of(llm, None)[1] == 0
    assert tokens_of(llm, "a") == (answers[0], 0)
    assert tokens_of(llm, "b") == (answers[1], 0)
    assert tokens_of(llm, "a") == (answers[0], 24)
    llm.unload_lora("a")
    llm.load_lora("a", str(adapters / "two"))
    assert tokens_of(llm, "a") == (answers[1], 0), "blocks of the name's former owner were used"
    assert tokens_of(llm, None)[1] == 24


def test_salts_divide_the_texts_of_an_adapter() -> None:
    roots = {root_of(salt, adapter) for salt in (None, "x", "y") for adapter in (0, 1, 2)}
    assert len(roots) == 9


def test_adapters_come_and_go_while_a_text_is_written(
    llm: LLM, adapters: Path, wrapped: list[ErnieModel]
) -> None:
    llm.load_lora("a", str(adapters / "one"))
    stream = llm.generate([PROMPT, PROMPT], GREEDY, stream=True, lora=["a", None])
    tokens: list[list[int]] = [[], []]
    for step, pieces in enumerate(stream):
        for collected, piece in zip(tokens, pieces):
            collected += piece.outputs[0].token_ids if piece is not None else []
        if step == 2:
            llm.unload_lora("a")
            with pytest.raises(RequestError, match="no adapter 'a' here"):
                llm.generate(PROMPT, GREEDY, lora="a")
            llm.load_lora("a", str(adapters / "two"))
        if step == 3:  # the first `a` is still in use: two are in memory
            with pytest.raises(RequestError, match="as many as max_loras allows"):
                llm.load_lora("b", str(adapters / "two"))
    base = ernie.load(llm.config.model, dtype=torch.float32)
    assert tokens == [expected(wrapped[0]), list(generate(base, PROMPT, max_tokens=12))]
    llm.load_lora("b", str(adapters / "one"))
    assert tokens_of(llm, "a")[0] == expected(wrapped[1])
    assert tokens_of(llm, "b")[0] == expected(wrapped[0])


def test_a_stream_that_is_not_begun_does_not_keep_its_adapter(
    llm: LLM, adapters: Path, wrapped: list[ErnieModel]
) -> None:
    llm.load_lora("a", str(adapters / "one"))
    begun = llm.generate(PROMPT, GREEDY, stream=True, lora="a")
    tokens = next(begun)[0].outputs[0].token_ids
    waiting = [llm.generate(PROMPT, GREEDY, stream=True, lora="a") for _ in range(2)]
    llm.unload_lora("a")
    assert len(next(waiting[0])[0].outputs[0].token_ids) == 1, "another stream still has it"
    waiting[0].close()
    for (piece,) in begun:
        tokens += piece.outputs[0].token_ids if piece is not None else []
    with pytest.raises(RequestError, match="was unloaded after this call"):
        next(waiting[1])
    llm.load_lora("a", str(adapters / "two"))
    assert tokens == expected(wrapped[0]) and tokens_of(llm, "a")[0] == expected(wrapped[1])


def test_one_name_or_one_for_each_prompt(llm: LLM, adapters: Path) -> None:
    llm.load_lora("a", str(adapters / "one"))
    both = llm.generate([PROMPT, PROMPT], GREEDY, lora=[None, "a"])
    assert [list(out.outputs[0].token_ids) for out in both] == [
        tokens_of(llm, None)[0],
        tokens_of(llm, "a")[0],
    ]
    for wrong, message in ((["a"], "1 names of adapters for 2"), (7, "lora=7 is not the name")):
        with pytest.raises(RequestError, match=message):
            llm.generate([PROMPT, PROMPT], GREEDY, lora=wrong)
    with pytest.raises(RequestError, match="there is an adapter 'a' already"):
        llm.load_lora("a", str(adapters / "two"))
    with pytest.raises(RequestError, match="no name for an adapter"):
        llm.load_lora("", str(adapters / "two"))


def test_without_enable_lora_nothing_is_loaded(folder: Path, adapters: Path) -> None:
    plain = LLM(str(folder), **SETTINGS | {"enable_lora": False})
    for call in (
        lambda: plain.load_lora("a", str(adapters / "one")),
        lambda: plain.generate(PROMPT, GREEDY, lora="a"),
    ):
        with pytest.raises(RequestError, match="start with enable_lora"):
            call()


# --- HTTP ---


def client(folder: Path, **settings: Any) -> AbstractContextManager[TestClient]:
    return app_client(EngineConfig(model=str(folder), **SETTINGS), ServerConfig(**settings))


def completion(session: TestClient, model: str) -> Any:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True}
    return session.post("/v1/completions", json=body)


def test_the_field_model_selects_an_adapter(
    folder: Path, adapters: Path, wrapped: list[ErnieModel]
) -> None:
    name = folder.name
    with client(folder, lora_modules=[f"a={adapters / 'one'}"], lora_root=str(adapters)) as session:
        loaded = session.post("/v1/load_lora_adapter", json={"lora_name": "b", "lora_path": "two"})
        assert (loaded.status_code, loaded.json()["parent"]) == (200, name), loaded.text
        cards = session.get("/v1/models").json()["data"]
        assert [(card["id"], card["parent"]) for card in cards] == [
            (name, None), ("a", name), ("b", name),
        ]  # fmt: skip
        for adapter, model in zip("ab", wrapped):
            answer = completion(session, adapter).json()
            assert answer["model"] == adapter
            assert answer["choices"][0]["completion_token_ids"] == expected(model)
        assert completion(session, "default").json()["model"] == name
        unknown = completion(session, "c")
        assert unknown.status_code == 404 and f"use '{name}', 'a', 'b'" in unknown.text
        gone = session.post("/v1/unload_lora_adapter", json={"lora_name": "a"})
        assert gone.json() == {"id": "a", "object": "model", "deleted": True}
        assert completion(session, "a").status_code == 404
        again = session.post("/v1/unload_lora_adapter", json={"lora_name": "a"})
        assert again.status_code == 404


@pytest.mark.parametrize(
    ("path", "status"),
    [("../one", 403), ("/etc", 403), ("link", 403), ("none", 404), ("x" * 5000, 404), ("\0", 400)],
)
def test_paths_outside_the_root_are_refused(
    path: str, status: int, folder: Path, adapters: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(adapters / "one")
    with client(folder, lora_root=str(root)) as session:
        body = {"lora_name": "a", "lora_path": path}
        answer = session.post("/v1/load_lora_adapter", json=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == "lora_path"


def test_an_adapter_has_none_of_the_names_of_the_model(folder: Path, adapters: Path) -> None:
    with client(folder, lora_root=str(adapters), served_model_name=["a", "b"]) as session:
        for name in ("a", "b", "default"):
            body = {"lora_name": name, "lora_path": "one"}
            answer = session.post("/v1/load_lora_adapter", json=body)
            assert answer.status_code == 400 and "is the model itself" in answer.text


def test_without_a_root_or_a_key_nothing_is_loaded(folder: Path, adapters: Path) -> None:
    body = {"lora_name": "a", "lora_path": str(adapters / "one")}
    with client(folder, api_key=["secret"]) as session:
        assert session.post("/v1/load_lora_adapter", json=body).status_code == 401
        headers = {"authorization": "Bearer secret"}
        answer = session.post("/v1/load_lora_adapter", json=body, headers=headers)
        assert answer.status_code == 403 and "--lora-root" in answer.text


def test_the_engine_goes_on_while_adapters_are_loaded_and_unloaded(
    folder: Path, adapters: Path, wrapped: list[ErnieModel]
) -> None:
    engine = ServerEngine(
        Language.read(EngineConfig(model=str(folder), **SETTINGS)),
        max_concurrency=8,
        on_end=lambda _: None,
        spawn=spawn_thread,
    )

    async def tokens_of(answer: Answer, then: Callable[[], Awaitable[None]] | None) -> list[int]:
        tokens: list[int] = []
        async for piece in answer.pieces():
            tokens += piece.completion.token_ids
            if then is not None:
                await then()
                then = None
        answer.close()
        return tokens

    async def story() -> None:
        engine.start()
        while not engine.is_alive:
            await asyncio.sleep(0.01)
        await engine.load_adapter("a", adapters / "one")
        first = engine.submit([PROMPT], GREEDY, adapter="a")

        async def exchange() -> None:
            await engine.unload_adapter("a")
            await engine.load_adapter("a", adapters / "two")

        assert await tokens_of(first, exchange) == expected(wrapped[0])
        second = engine.submit([PROMPT], GREEDY, adapter="a")
        assert await tokens_of(second, None) == expected(wrapped[1])
        for name, problem in (("a", "already"), ("b", "no adapter_config")):
            with pytest.raises(ValueError, match=problem):
                await engine.load_adapter(name, folder)
        assert engine.is_alive
        await engine.stop()

    asyncio.run(story())


def test_a_wrong_adapter_leaves_the_server_as_it_was(
    folder: Path, adapters: Path, tmp_path: Path
) -> None:
    tensors = load_file(adapters / "one" / "adapter_model.safetensors")
    config = json.loads((adapters / "one" / "adapter_config.json").read_text())
    helpers_lora.write(tmp_path / "wrong", tensors, config | {"r": 3})
    with client(folder, lora_root=str(tmp_path)) as session:
        for fields in ({"lora_name": "a"}, {"lora_name": folder.name}, {"lora_name": ""}):
            body = {"lora_path": "wrong", **fields}
            answer = session.post("/v1/load_lora_adapter", json=body)
            assert answer.status_code == 400, answer.text
        answer = session.post("/v1/load_lora_adapter", json={"lora_name": "a", "path": "wrong"})
        assert answer.status_code == 400
        assert completion(session, folder.name).status_code == 200
        assert len(session.get("/v1/models").json()["data"]) == 1


def test_a_pooled_request_is_finished_with_an_adapter_that_is_unloaded_meanwhile(
    folder: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected = pooling.collected

    with client(folder, lora_modules=[f"a={adapters / 'one'}"]) as session:
        body = {"model": "a", "input": "Hello"}
        before = session.post("/v1/embeddings", json=body).json()
        engine: ServerEngine = session.app.state.service.engine  # type: ignore[attr-defined]

        async def unloading(answer: Answer) -> list[list[float]]:
            await engine.unload_adapter("a")
            return await collected(answer)

        monkeypatch.setattr(pooling, "collected", unloading)
        answer = session.post("/v1/embeddings", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == "a" and answer.json()["data"] == before["data"]
        assert session.post("/v1/embeddings", json=body).status_code == 404


def test_an_engine_that_is_started_again_leaves_out_an_adapter_that_is_gone(
    folder: Path, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    for name in "ab":
        shutil.copytree(adapters / "one", tmp_path / name)
    step, fails = Engine.step, [True]

    def broken(engine: Engine) -> Any:
        if fails:
            fails.clear()
            raise ArithmeticError
        return step(engine)

    modules = [f"{name}={tmp_path / name}" for name in "ab"]
    with client(folder, lora_modules=modules) as session:
        before = completion(session, "b").json()["choices"]
        shutil.rmtree(tmp_path / "a")
        with monkeypatch.context() as patched:
            patched.setattr(Engine, "step", broken)
            assert completion(session, "b").status_code == 503
        wait_until(lambda: session.get("/ready").status_code == 200, patience_s=20)
        assert completion(session, "a").status_code == 404
        assert completion(session, "b").json()["choices"] == before
        names = [card["id"] for card in session.get("/v1/models").json()["data"]]
        assert names == [folder.name, "b"]
    assert "the adapter 'a' is left out" in caplog.text
    app = create_app(
        EngineConfig(model=str(folder), **SETTINGS),
        ServerConfig(lora_modules=modules),
        spawn_thread,
    )
    with TestClient(app) as session:  # the first start of all has what was asked for, or fails
        wait_until(lambda: app.state.service.engine.supervisor.state is State.FAILED)


def test_without_the_flag_there_is_no_such_route(folder: Path, adapters: Path) -> None:
    config = EngineConfig(model=str(folder), **SETTINGS | {"enable_lora": False})
    with pytest.raises(ConfigError, match="start with --enable-lora"):
        create_app(config, ServerConfig(lora_modules=[f"a={adapters / 'one'}"]))
    with app_client(config) as session:
        body = {"lora_name": "a", "lora_path": "one"}
        assert session.post("/v1/load_lora_adapter", json=body).status_code == 404
