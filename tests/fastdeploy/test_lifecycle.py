"""Pause, sleep and new weights: what is held goes on, memory falls, and the answers are right."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ernie
from ernie.checkpoint.folder import CheckpointError
from ernie.checkpoint.quantized import write_quantized
from ernie.fused import fuse, shallow_copy
from ernie.model import ErnieModel
from ernie.models import TINY
from fastdeploy import LLM, SamplingParams
from fastdeploy.engine.weights import HostCopy, storages
from fastdeploy.errors import RequestError

SETTINGS = {"dtype": "float32", "max_model_len": 64, "block_size": 8}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [[7 * i % 97 for i in range(20)], [5, 6, 7]]


def new(folder: Path, **options: object) -> LLM:
    return LLM(str(folder), **(SETTINGS | options))


def tokens(llm: LLM) -> list[list[int]]:
    return [out.outputs[0].token_ids for out in llm.generate(PROMPTS, GREEDY)]


@pytest.fixture(scope="module")
def other(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same shape."""
    model = ernie.load(folder, dtype=torch.float32)
    model.init_weights(seed=99, std=0.3)
    path = tmp_path_factory.mktemp("models") / "other"
    ernie.save(model, path)
    return path


def published(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def start(llm: LLM, num_steps: int) -> None:
    for i, prompt in enumerate(PROMPTS):
        llm.engine.add(f"{i}", prompt, GREEDY)
    for _ in range(num_steps):
        llm.engine.step()


def rest_of(llm: LLM) -> list[list[int]]:
    """Whole answers of what is in the engine."""
    requests = list(llm.engine.requests.values())
    while llm.engine.has_work:
        llm.engine.step()
        llm.engine.scheduler.check()
    return [one.token_ids[one.num_prompt :] for one in requests]


def test_a_pause_ends_what_runs_and_says_so(folder: Path) -> None:
    llm = new(folder)
    stream = llm.generate(PROMPTS, GREEDY, stream=True)
    next(stream)
    llm.pause()
    assert not llm.engine.requests and llm.engine.stats().num_running == 0
    with pytest.raises(RequestError, match="the engine is paused; resume it first"):
        llm.generate("x")
    ends = [piece.outputs[0].finish_reason for piece in next(stream)]
    assert ends == ["abort", "abort"] and list(stream) == []
    llm.resume()
    assert len(tokens(llm)) == 2
    with pytest.raises(RequestError, match="use abort or keep"):
        llm.pause("later")


def test_an_abort_that_nobody_waits_for_does_not_reach_the_next_call(folder: Path) -> None:
    llm = new(folder)
    stream = llm.generate(PROMPTS, GREEDY, stream=True)
    next(stream)
    llm.pause()
    stream.close()
    llm.resume()
    assert len(tokens(llm)) == 2 and not llm.engine.news


def test_what_a_pause_keeps_goes_on_where_it_was(folder: Path) -> None:
    llm = new(folder)
    expected = tokens(llm)
    start(llm, 5)
    llm.pause("keep")
    assert not llm.engine.has_work
    with pytest.raises(RequestError, match="is paused"):
        llm.engine.step()
    llm.resume()
    assert rest_of(llm) == expected


def test_a_forgotten_prefix_is_computed_again(folder: Path) -> None:
    llm = new(folder)
    cached = []
    for _ in range(2):
        cached.append([llm.generate(PROMPTS[0], GREEDY)[0].num_cached_tokens for _ in range(2)])
        llm.reset_prefix_cache()
    assert cached == [[0, 16], [0, 16]]
    assert llm.engine.stats().num_cached_blocks == 0


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_frees_memory_and_what_was_held_goes_on(folder: Path, level: int) -> None:
    llm = new(folder)
    expected = tokens(llm)
    start(llm, 5)
    cache, model = llm.engine.runner.cache, llm.engine.runner.model
    num_bytes = cache.keys_LBPGr.nbytes
    freed = [weakref.ref(cache.keys_LBPGr), weakref.ref(cache.values_LBPGr)]
    weight = weakref.ref(model.model.embed_tokens.weight)
    with pytest.raises(RequestError, match="sleep with 2 requests in work; pause first"):
        llm.sleep(level)
    llm.pause("keep")
    gc.collect()
    gc.disable()  # a server that sleeps makes nothing that would have garbage collected
    try:
        llm.sleep(level)
        del cache, model
        found = [ref() for ref in freed]
    finally:
        gc.enable()
    assert found == [None, None], "the cache is still in memory"
    assert llm.engine.runner.cache.keys_LBPGr.nbytes == 0 < num_bytes
    assert (weight() is None) == (level == 2) == (not llm.engine.has_weights)
    llm.resume()
    for use in (llm.engine.step, lambda: llm.generate("x")):
        with pytest.raises(RequestError, match="the engine sleeps; wake it up first"):
            use()
    llm.wake_up()
    llm.wake_up()
    assert llm.engine.runner.cache.keys_LBPGr.nbytes == num_bytes
    assert rest_of(llm) == expected
    assert tokens(llm) == expected
    with pytest.raises(RequestError, match="level=3 is not known; use 1 or 2"):
        llm.sleep(3)


def test_a_model_from_memory_that_was_freed_needs_new_weights(folder: Path) -> None:
    model = ernie.load(folder, dtype=torch.float32)
    llm = LLM(model, max_model_len=64)
    expected = tokens(llm)
    llm.sleep(2)
    with pytest.raises(RequestError, match="give them back by update_weights first"):
        llm.wake_up()
    llm.update_weights(published(folder))
    llm.wake_up()
    assert tokens(llm) == expected
    assert model.model.embed_tokens.weight.device.type == "cpu", "the caller's own is gone"


@pytest.mark.parametrize("quantization", [None, "wint8"])
def test_new_weights_give_the_new_model(
    folder: Path, other: Path, quantization: str | None
) -> None:
    llm = new(folder, quantization=quantization)
    old, wanted = tokens(llm), tokens(new(other, quantization=quantization))
    assert old != wanted
    llm.update_weights(other)
    assert tokens(llm) == wanted, "a block of the old weights was found"
    llm.update_weights(published(folder))
    assert tokens(llm) == old


def test_held_requests_go_on_with_the_new_weights(folder: Path, other: Path) -> None:
    llm = new(folder)
    start(llm, 5)
    with pytest.raises(RequestError, match="update_weights with 2 requests in work; pause first"):
        llm.update_weights(other)
    llm.pause("keep")
    llm.update_weights(other)
    llm.resume()
    begun = [one.token_ids[one.num_prompt :] for one in llm.engine.requests.values()]
    fresh = new(other)
    for prompt, begin, answer in zip(PROMPTS, begun, rest_of(llm)):
        rest = dataclasses.replace(GREEDY, max_tokens=12 - len(begin))
        out = fresh.generate([*prompt, *begin], rest)[0].outputs[0]
        assert answer == [*begin, *out.token_ids]


def test_weights_that_do_not_fit_change_nothing(folder: Path, other: Path, tmp_path: Path) -> None:
    llm = new(folder)
    expected, model = tokens(llm), llm.engine.runner.model
    good = published(other)
    name = "model.layers.0.mlp.down_proj.weight"
    turned = ErnieModel(dataclasses.replace(model.config, rope_theta=7.0), dtype=torch.float32)
    turned.init_weights(seed=1)
    turned.tokenizer = llm.tokenizer
    ernie.save(turned, tmp_path / "turned")
    for source, message in (
        ({key: value for key, value in good.items() if key != name}, name),
        ({}, r"^the given mapping holds no ernie\.embed_tokens\.weight and \d+ more"),
        (good | {"model.extra": torch.ones(2)}, r"model\.extra"),
        (good | {name: good[name][:, :-1].clone()}, "down_proj.weight in the given mapping is"),
        (good | {name: good[name].bfloat16()}, r"is torch\.bfloat16 and the running model's"),
        (good | {name: good[name] * torch.inf}, "holds NaN, Inf"),
        (good | {name: [1.0]}, "is a list; give tensors"),
        (tmp_path / "turned", r"has rope_theta=7\.0 and the running model"),
        (tmp_path / "none", "there is no folder"),
    ):
        with pytest.raises(ValueError, match=message):
            llm.update_weights(source)
        assert llm.engine.runner.model is model
    assert llm.generate(PROMPTS[0], GREEDY)[0].num_cached_tokens == 16
    assert tokens(llm) == expected


@pytest.mark.parametrize("starts_short", [False, True])
def test_new_weights_in_another_form_are_refused(
    folder: Path, tmp_path: Path, starts_short: bool
) -> None:
    write_quantized(folder, tmp_path / "short", "wint8")
    folders = (tmp_path / "short", folder) if starts_short else (folder, tmp_path / "short")
    llm = new(folders[0])
    expected = tokens(llm)
    for source in (folders[1], published(folder)) if starts_short else folders[1:]:
        with pytest.raises(
            CheckpointError, match=r"has (plain|wint8) weights and the running model"
        ):
            llm.update_weights(source)
    llm.update_weights(folders[0])
    assert tokens(llm) == expected


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
@pytest.mark.parametrize("form", ["plain", "fused"])
def test_weights_leave_the_device_and_come_back(name: str, form: str) -> None:
    """On a CPU the copy is of no use, but every tensor has to be found all the same."""
    model = ErnieModel(TINY[name], dtype=torch.float32)
    model.init_weights(seed=1, std=0.3)
    size = sum(parameter.nbytes for parameter in model.parameters())
    model = model if form == "plain" else fuse(shallow_copy(model))
    expected = model.logits(range(9))
    assert sum(storage.nbytes() for storage in storages(model)) >= size
    copy = HostCopy(model)
    assert sum(storage.nbytes() for storage in storages(model)) == 0
    assert all(p.untyped_storage().nbytes() == 0 for p in model.parameters())
    copy.restore()
    assert sum(storage.nbytes() for storage in storages(model)) >= size
    if form == "plain":  # packed weights of a CPU are known to their kernels by address
        assert torch.equal(model.logits(range(9)), expected)
