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

import pytest
import torch
from helpers_server import start_server, stop_server

import ernie
from ernie import kernels
from ernie.checkpoint.quantized import write_quantized
from ernie.model import ErnieModel
from ernie.models import TINY
from ernie.settings import ConfigError
from fastdeploy import LLM, SamplingParams
from fastdeploy.config import EngineConfig
from fastdeploy.engine import frames, loading, ranks
from fastdeploy.engine.batch import TENSORS, Batch
from fastdeploy.errors import RankError, RequestError

pytestmark = pytest.mark.ranks
CPU = torch.device("cpu")
PROMPT = [(7 * i + 3) % 97 for i in range(33)]
GREEDY = SamplingParams(temperature=0, max_tokens=4)
CONFIG = dataclasses.replace(
    TINY["tiny-moe"], num_attention_heads=6, num_key_value_heads=2, vocab_size=212
)


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
    integers = [torch.randint(-9, 99, (n,)) for n in (5, 5, 5, 3, 2, 0)]
    tables = torch.randint(0, 99, (2, 4), dtype=torch.int32)
    ids, positions, slots, bounds, lens, rows = integers
    batch = Batch(ids, positions, slots, bounds.int(), lens.int(), tables, rows, None)
    copy = frames.unpacked(frames.packed(batch), {})
    for name in TENSORS:
        ours, theirs = getattr(batch, name), getattr(copy, name)
        assert theirs.dtype == ours.dtype and torch.equal(theirs, ours), name


def tokens(llm: LLM) -> list[list[int]]:
    prompts = [PROMPT, PROMPT[5:20]]
    return [list(out.outputs[0].token_ids) for out in llm.generate(prompts, GREEDY)]


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
def test_a_killed_server_leaves_no_rank(folder: Path) -> None:
    server = start_server(folder, "-tp", "2")
    (child,) = children_of(server.process.pid)
    server.process.kill()
    server.process.communicate(timeout=20)
    wait_until(lambda: not is_running(child), "the rank ends after its server")


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
