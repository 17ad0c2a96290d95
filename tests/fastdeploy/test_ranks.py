"""Processes that share a model: what they compute together, and what happens when one is lost."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import helpers_lora
import pytest
import torch
from helpers_ranks import EVEN
from helpers_server import start_server, stop_server

import ernie
from ernie import kernels
from ernie.adapters import ActiveAdapters, Adapter
from ernie.checkpoint.quantized import write_quantized
from ernie.model import ErnieModel
from ernie.settings import ConfigError
from erniekit.lora import LoRA
from fastdeploy import LLM, SamplingParams
from fastdeploy.config import EngineConfig
from fastdeploy.engine import adapters, frames, loading, ranks
from fastdeploy.engine.batch import TENSORS, Batch
from fastdeploy.errors import RankError, RequestError

pytestmark = pytest.mark.ranks
CPU = torch.device("cpu")
PROMPT = [(7 * i + 3) % 97 for i in range(33)]
GREEDY = SamplingParams(temperature=0, max_tokens=4)
CONFIG = EVEN["even-moe"]
PAIR = LoRA(3, 9.0)
MTP = {"method": "mtp", "num_speculative_tokens": 3}


@pytest.fixture(scope="module")
def even_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("even")
    model = ErnieModel(CONFIG, dtype=torch.float32)
    model.init_weights(seed=1, std=0.3)
    ernie.save(model, path)
    return path


@pytest.fixture
def two(even_folder: Path) -> Iterator[LLM]:
    llm = LLM(str(even_folder), dtype="float32", max_model_len=64, tensor_parallel_size=2)
    yield llm
    llm.engine.ranks.stop()


def first_logits(folder: Path, num_ranks: int, quantization: str) -> torch.Tensor:
    config = EngineConfig(
        model=str(folder),
        dtype="float32",
        quantization=quantization,
        max_model_len=64,
        tensor_parallel_size=num_ranks,
    )
    engine = loading.load(config).engine
    engine.add("x", PROMPT, GREEDY)
    logits = engine.runner.run(engine.scheduler.schedule())
    if engine.ranks:
        engine.ranks.stop()
    return logits


@pytest.mark.parametrize("quantization", ["none", "wint8"])
def test_logits_of_two_ranks_equal_those_of_one(even_folder: Path, quantization: str) -> None:
    one, two = (first_logits(even_folder, n, quantization) for n in (1, 2))
    difference = float((two - one).norm() / one.norm())
    # Each rank has its own scales for the columns it holds: as good, but not the same integers.
    assert difference < (1e-5 if quantization == "none" else 0.05), difference
    assert quantization == "none" or difference > 1e-5, "nothing was quantised"


def test_a_batch_survives_its_bytes() -> None:
    integers = [torch.randint(-9, 99, (n,)) for n in (5, 5, 5, 3, 2, 0, 5)]
    tables = torch.randint(0, 99, (2, 4), dtype=torch.int32)
    ids, positions, slots, bounds, lens, rows, after = integers
    one, two = Adapter((), 1), Adapter((), 1)
    active = ActiveAdapters(((two, torch.tensor([1, 4])), (one, torch.tensor([0, 2]))))
    batch = Batch(ids, positions, slots, bounds.int(), lens.int(), tables, rows, active)
    batch = dataclasses.replace(batch, after_T=after)
    there = {adapter.serial: adapter for adapter in (one, two)}
    copy = frames.unpacked(frames.packed(batch), there)
    for name in (*TENSORS, "after_T"):
        ours, theirs = getattr(batch, name), getattr(copy, name)
        assert theirs.dtype == ours.dtype and torch.equal(theirs, ours), name
    rows_by_adapter = {adapter: rows_N.tolist() for adapter, rows_N in copy.adapters.groups}
    assert rows_by_adapter == {one: [0, 2], two: [1, 4]} and copy.modality_T is None


def tokens(llm: LLM, lora: str | None = None) -> list[list[int]]:
    prompts = [PROMPT, PROMPT[5:20]]
    return [list(out.outputs[0].token_ids) for out in llm.generate(prompts, GREEDY, lora=lora)]


def test_ranks_sleep_and_go_on_with_the_same_weights(two: LLM) -> None:
    expected = tokens(two)
    for level in (1, 2, 1):
        two.sleep(level)
        with pytest.raises(RequestError, match="the engine sleeps"):
            tokens(two)
        two.wake_up()
        assert tokens(two) == expected, f"after level {level}"


def test_ranks_take_new_weights_or_keep_the_old_ones(
    two: LLM, even_folder: Path, tmp_path: Path
) -> None:
    for name, config in (("other", CONFIG), ("turned", dataclasses.replace(CONFIG, rope_theta=7))):
        model = ErnieModel(config, dtype=torch.float32)
        model.init_weights(seed=2, std=0.3)
        ernie.save(model, tmp_path / name)
    old = tokens(two)
    alone = LLM(str(tmp_path / "other"), dtype="float32", max_model_len=64)
    wanted = tokens(alone)
    assert wanted != old
    with pytest.raises(ValueError, match="has rope_theta=7 and the running model"):
        two.update_weights(tmp_path / "turned")
    with pytest.raises(RequestError, match="update_weights with tensors and tensor_parallel_size"):
        two.update_weights({"model.norm.weight": torch.ones(1)})
    assert tokens(two) == old
    two.update_weights(tmp_path / "other")
    assert tokens(two) == wanted
    two.sleep(2)
    two.update_weights(even_folder)
    two.wake_up()
    assert tokens(two) == old


# --- adapters and drafts ---


@pytest.fixture(scope="module")
def pairs(even_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with adapters, by name."""
    model, root = ernie.load(even_folder, torch.float32), tmp_path_factory.mktemp("pairs")
    return {
        name: helpers_lora.save(helpers_lora.trained(model, PAIR, seed), PAIR, root / name)
        for seed, name in enumerate(("one", "two"))
    }


@pytest.fixture(scope="module")
def wanted(even_folder: Path, pairs: dict[str, Path]) -> dict[str | None, list[list[int]]]:
    """The answers of one process that drafts nothing, by adapter."""
    llm = LLM(str(even_folder), dtype="float32", max_model_len=64, enable_lora=True)
    for name, folder in pairs.items():
        llm.load_lora(name, str(folder))
    found = {name: tokens(llm, name) for name in (None, *pairs)}
    assert len({str(answers) for answers in found.values()}) == 3
    return found


@pytest.fixture
def full(even_folder: Path) -> Iterator[LLM]:
    """Two ranks with everything."""
    settings = {"enable_lora": True, "max_loras": 2, "speculative_config": MTP}
    ranked = {"tensor_parallel_size": 2, "max_model_len": 64}
    llm = LLM(str(even_folder), dtype="float32", **ranked, **settings)
    yield llm
    llm.engine.ranks.stop()


def calls_of(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls to the other ranks from now on."""
    names, call = [], llm.engine.ranks.call

    def spy(name: str, **arguments: Any) -> list[Any]:
        names.append(f"{name} {arguments['serials']}" if "serials" in arguments else name)
        return call(name, **arguments)

    monkeypatch.setattr(llm.engine.ranks, "call", spy)
    return names


def test_adapters_of_ranks_come_and_go_while_texts_are_written(
    full: LLM,
    even_folder: Path,
    pairs: dict[str, Path],
    wanted: dict[str | None, list[list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = calls_of(full, monkeypatch)
    full.load_lora("one", str(pairs["one"]))
    serial = full.engine.adapters.get("one").serial
    stream = full.generate([PROMPT, PROMPT[5:20]], GREEDY, stream=True, lora="one", use_tqdm=False)
    got: list[list[int]] = [[], []]
    for number, outputs in enumerate(stream):
        if number == 0:
            full.load_lora("two", str(pairs["two"]))
            full.unload_lora("one")
            assert names == ["load_adapter", "load_adapter"], "the other rank still needs it"
        for answer, output in zip(got, outputs):
            answer += output.outputs[0].token_ids if output else []
    assert got == wanted["one"]
    assert names[2:] == [f"unload_adapters [{serial}]"]
    assert tokens(full, "two") == wanted["two"]
    full.load_lora("one", str(pairs["one"]))
    mixed = full.generate([PROMPT] * 3, GREEDY, lora=["two", None, "one"], use_tqdm=False)
    found = [list(out.outputs[0].token_ids) for out in mixed]
    assert found == [wanted[name][0] for name in ("two", None, "one")]
    full.sleep(1)
    full.wake_up()
    full.update_weights(even_folder)
    assert tokens(full, "one") == wanted["one"] and tokens(full) == wanted[None]
    assert full.engine.stats().num_draft_tokens > 0


def test_an_adapter_that_a_rank_cannot_take_is_on_none(
    full: LLM,
    pairs: dict[str, Path],
    wanted: dict[str | None, list[list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, names = adapters.packed_adapter, calls_of(full, monkeypatch)
    monkeypatch.setattr(adapters, "packed_adapter", lambda adapter: whole(adapter)[:-1])
    with pytest.raises(RequestError, match=r"'one' is not loaded, as not all ranks .*\(rank 1: "):
        full.load_lora("one", str(pairs["one"]))
    assert names[0] == "load_adapter" and names[1].startswith("unload_adapters [")
    with pytest.raises(RequestError, match="there is no adapter 'one' here; loaded: none"):
        tokens(full, "one")
    monkeypatch.undo()
    full.load_lora("one", str(pairs["one"]))
    assert tokens(full, "one") == wanted["one"]


def test_a_rank_killed_while_drafts_are_made_is_named(full: LLM) -> None:
    (child,) = full.engine.ranks.processes
    send = full.engine.ranks.send

    def send_or_kill(batch: Batch) -> None:
        if batch.after_T is not None:
            os.kill(child.pid, signal.SIGSTOP)
            child.kill()
        send(batch)

    full.engine.ranks.send = send_or_kill
    with pytest.raises(RankError, match="rank 1 was ended by SIGKILL"):
        full.generate([PROMPT], GREEDY)


def test_ranks_heed_batch_invariance(even_folder: Path) -> None:
    """Logits of a prompt that is read at once, and in pieces, with others beside it."""
    found = []
    for others, most_tokens in (([], 64), ([PROMPT[::-1], PROMPT[3:9]], 7)):
        settings = {"max_model_len": 64, "max_num_batched_tokens": most_tokens, "max_num_seqs": 4}
        ranked = {"tensor_parallel_size": 2, "batch_invariant": True}
        llm = LLM(str(even_folder), dtype="float32", **settings, **ranked)
        seen, sample = [], llm.engine.sampler.__call__

        def spy(logits_RV, parts, masks, seen=seen, sample=sample):
            rows = (i for part in parts for i in [part.request.id] * part.num_logits)
            seen += [logits_RV[row].clone() for row, i in enumerate(rows) if i.endswith("-0-0")]
            return sample(logits_RV, parts, masks)

        llm.engine.sampler = spy
        llm.generate([PROMPT, *others], GREEDY, use_tqdm=False)
        llm.engine.ranks.stop()
        found.append(torch.stack(seen))
    kernels.batch_invariant(False)
    assert torch.equal(*found), float((found[1] - found[0]).abs().max())


def test_batch_invariance_of_more_than_two_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_invariant with tensor_parallel_size=3 is not"):
        EngineConfig(model="x", tensor_parallel_size=3, batch_invariant=True)


def test_a_killed_rank_is_named_and_leaves_no_process(two: LLM) -> None:
    (child,) = two.engine.ranks.processes
    two.generate([PROMPT], GREEDY)
    child.kill()
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 1 was ended by SIGKILL"):
        two.generate([PROMPT], GREEDY)
    assert time.monotonic() - start < 10
    assert child.returncode == -signal.SIGKILL and not two.engine.is_alive
    with pytest.raises(RankError, match="rank 1 was ended by SIGKILL"):
        two.generate([PROMPT], GREEDY)


def test_a_rank_killed_within_a_step_is_named(two: LLM) -> None:
    (child,) = two.engine.ranks.processes
    send = two.engine.ranks.send
    os.kill(child.pid, signal.SIGSTOP)  # so that it cannot be done before it is killed

    def send_and_kill(batch: Batch) -> None:
        send(batch)
        child.kill()

    two.engine.ranks.send = send_and_kill
    with pytest.raises(RankError, match="rank 1 was ended by SIGKILL"):
        two.generate([PROMPT], GREEDY)


def test_after_an_interrupted_step_nothing_is_computed(two: LLM) -> None:
    def interrupted(batch: Batch) -> None:
        raise KeyboardInterrupt

    two.engine.runner.compute, compute = interrupted, two.engine.runner.compute
    with pytest.raises(KeyboardInterrupt):
        two.generate([PROMPT], GREEDY)
    two.engine.runner.compute = compute
    with pytest.raises(RankError, match="stopped by KeyboardInterrupt within a step"):
        two.generate([PROMPT], GREEDY)


def test_a_silent_rank_is_not_waited_for(
    even_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "PATIENCE_S", 3)
    llm = LLM(str(even_folder), dtype="float32", max_model_len=64, tensor_parallel_size=2)
    (child,) = llm.engine.ranks.processes
    os.kill(child.pid, signal.SIGSTOP)
    with pytest.raises(RankError, match="was silent for 3 s"):
        llm.generate([PROMPT], GREEDY)
    assert child.returncode == -signal.SIGKILL


def test_a_rank_that_cannot_read_its_slice_says_why(
    even_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ernie.load(even_folder)
    (tmp_path / "config.json").write_bytes((even_folder / "config.json").read_bytes())
    whole = (even_folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    monkeypatch.setattr(loading, "read_model", lambda *_: model)  # only the child reads
    config = EngineConfig(model=str(tmp_path), tensor_parallel_size=2)
    with pytest.raises(RankError, match=r"rank 1 of .*model\.safetensors .* truncated"):
        loading.start_ranks(config, CPU)


def test_what_cannot_be_shared_out_is_refused(
    even_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="needs a folder that every process can read"):
        LLM(ErnieModel(CONFIG), tensor_parallel_size=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="takes GPUs up to number 2, but there are 2"):
        loading.pick_device("cuda:1", 2)
    assert loading.pick_device("cuda", 2) == torch.device("cuda")


def test_a_model_is_read_block_by_block(even_folder: Path) -> None:
    """What is read and not yet swapped is never more than one block."""
    swapped: list[torch.nn.Module] = []

    def swap(block: torch.nn.Module) -> torch.nn.Module:
        assert all(not p.is_meta for p in block.parameters())
        swapped.append(block)
        return torch.nn.Identity()

    model = ernie.load(even_folder, swap_block=swap)
    assert len(swapped) == CONFIG.num_hidden_layers + CONFIG.num_nextn_predict_layers
    assert [name for name, _ in model.named_parameters() if ".layers." in name] == []


def test_blocks_fused_while_reading_equal_those_fused_after(
    even_folder: Path, tmp_path: Path
) -> None:
    write_quantized(even_folder, tmp_path, "wint4")
    for folder, scheme in ((even_folder, "wint8"), (tmp_path, None)):
        config = EngineConfig(model=str(folder), dtype="float32", quantization=scheme)
        plain = ernie.load(folder, torch.float32, keep_integers=True)
        after = loading.served(plain, config).logits(PROMPT)
        assert torch.equal(loading.read_model(config, CPU).logits(PROMPT), after), scheme


def children_of(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(claim: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + 10
    while not claim():
        assert time.monotonic() < until, f"not within 10 s: {what}"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")


@needs_proc
def test_a_killed_server_leaves_no_rank_and_no_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    server = start_server(folder, "-tp", "2")
    (child,) = children_of(server.process.pid)
    assert list(tmp_path.glob("fastdeploy-*"))
    server.process.kill()
    server.process.communicate(timeout=20)
    wait_until(lambda: not is_running(child), "the rank ends after its server")
    wait_until(lambda: not list(tmp_path.glob("fastdeploy-*")), "the ranks' folder goes with them")


@needs_proc
def test_a_server_that_lost_a_rank_says_so(folder: Path) -> None:
    server = start_server(folder, "--tensor-parallel-size", "2")
    address = server.url.removesuffix("/v1") + "/health"

    def health() -> int:
        try:
            with urllib.request.urlopen(address) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    try:
        assert health() == 200
        (child,) = children_of(server.process.pid)
        os.kill(child, signal.SIGKILL)
        wait_until(lambda: health() == 503, "/health answers 503")
    finally:
        status = stop_server(server)
    assert status == 0
