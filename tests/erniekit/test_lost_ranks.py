"""A rank that dies, stalls or fails ends the run within its patience, by name, without a hang."""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from erniekit import checkpoint, launch
from erniekit.config import read_run, run_from
from erniekit.parallel import process as rank_process
from erniekit.parallel import watch
from erniekit.parallel.watch import Watch
from tests.erniekit.test_parallel import records, words

ROOT = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
# Within, `deed` happens in one rank's third step.
UNLUCKY = """
import os, signal, sys, time
from erniekit import losses
real, calls = losses.next_token, 0
def unlucky(*arguments, **options):
    global calls
    calls += 1
    if calls == 3 and os.environ.get("RANK") == "1":
        {deed}
    return real(*arguments, **options)
losses.next_token = unlucky
from erniekit.cli import main
sys.exit(main(sys.argv[1:]))
"""


def started(command: list[str], **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def at_step(process: subprocess.Popen, step: int, deed: Callable[[], object]) -> str:
    """The whole output of a run, of which `deed` is done when it has told of `step`."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(f"step {step:05d}/") or line.startswith(f"step {step:06d}/"):
            deed()
    return "".join(lines)


def rank_of(agent: subprocess.Popen, rank: int) -> int:
    """The process of a rank, among the children of the one that was started."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    return next(
        int(child)
        for child in children
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0")
    )


@pytest.fixture
def long_run(tiny, data: Path, tmp_path: Path) -> list[str]:
    more = {"max_steps": 100_000, "save_steps": 4, "save_total_limit": 1, "eval_steps": 100_000}
    given = words(tiny("tiny-dense"), data, tmp_path, **more, nproc_per_node=2, ddp_timeout=8)
    return ["-m", "erniekit.cli", "train", *given]


@pytest.mark.ranks
def test_dead_rank_is_named_and_the_next_start_goes_on(long_run: list[str], tmp_path: Path) -> None:
    process = started(long_run)
    output = at_step(process, 6, lambda: os.kill(rank_of(process, 1), signal.SIGKILL))
    assert process.wait(60) == 1, output
    assert "rank 1 was ended by SIGKILL" in output
    assert "Traceback" not in output

    newest = checkpoint.newest_good(tmp_path)
    assert newest is not None
    step = int(newest.name.removeprefix("checkpoint-"))
    process = started([*long_run, f"max_steps={step + 3}", "sharding=stage3"])
    output = at_step(process, step, lambda: None)
    assert process.wait(60) == 0, output
    assert [r["step"] for r in records(tmp_path)] == list(range(step + 4))


@pytest.mark.ranks
@pytest.mark.slow
def test_stalled_rank_is_named(long_run: list[str]) -> None:
    process = started(long_run)
    output = at_step(process, 6, lambda: os.kill(rank_of(process, 1), signal.SIGSTOP))
    assert process.wait(90) == 1, output
    assert "rank 1 has been silent for" in output


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize(
    ("deed", "told"),
    [
        ("time.sleep(1000)", "rank 1 is still at step 3, in unlucky (unlucky.py:9)"),
        ("raise ValueError('no luck')", "rank 1 stopped by ValueError: no luck"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 'unlucky.py", line 9 in unlucky'),
    ],
)
def test_rank_that_fails_or_sleeps_is_named(
    deed: str, told: str, long_run: list[str], tmp_path: Path
) -> None:
    script = tmp_path / "unlucky.py"
    script.write_text(UNLUCKY.format(deed=deed))
    # The other goes on to the sum of the gradients, unless this one is quicker to end it.
    process = started([*TORCHRUN, str(script), *long_run[2:]], PYTHONPATH=str(ROOT))
    output = at_step(process, 0, lambda: None)
    assert process.wait(90) != 0, output
    assert told in output, output


@pytest.mark.ranks
@pytest.mark.slow
def test_sigterm_and_a_mistake_end_all_ranks(long_run: list[str], tmp_path: Path) -> None:
    process = started([*long_run, "save_steps=100000"])
    output = at_step(process, 6, lambda: process.send_signal(signal.SIGTERM))
    assert process.wait(60) == 0, output
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [records(tmp_path)[-1]["step"]]

    process = started([*long_run, "train_dataset_path=/none.jsonl"])
    output = at_step(process, 0, lambda: None)
    assert process.wait(60) == 2, output
    assert output.count("/none.jsonl") == 1 and "Traceback" not in output, output


@pytest.mark.ranks
def test_sigterm_before_the_first_step_has_nothing_to_save(
    long_run: list[str], tmp_path: Path
) -> None:
    process = started(long_run)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("settings that are not defaults"):
            process.send_signal(signal.SIGTERM)
            break
    output = process.stdout.read()
    assert process.wait(60) == 143, output
    assert not checkpoint.checkpoints(tmp_path)


@pytest.mark.parametrize(
    ("left", "number", "status"),
    [
        ([0, 0], signal.SIGTERM, 0),
        ([130, 130], signal.SIGINT, 130),
        ([0], signal.SIGTERM, 143),
        ([1], signal.SIGINT, 130),
        ([1, 3], signal.SIGTERM, 3),
        ([2], signal.SIGTERM, 2),
        ([0, 1], signal.SIGTERM, 1),
    ],
)
def test_a_signal_returns_what_the_ranks_did(
    left: list[int], number: signal.Signals, status: int, tmp_path: Path
) -> None:
    for rank, own in enumerate(left):
        (tmp_path / str(rank)).write_text(str(own))
    assert rank_process.status_of_all(tmp_path, number, 2) == status


def test_ranks_are_started_with_the_settings_of_the_run(tmp_path: Path) -> None:
    """Also where they are not those of its words, as when `erniekit resume` starts it."""
    file = tmp_path / "run.yaml"
    file.write_text("overwrite_output_dir: true\nstop_after_step: 3\nseed: 5\n")
    for own in ((), (str(file), "seed=7")):
        files = {"path": ["x", "y"], "type": ["alpaca"] * 2, "prob": [0.5, 1]}
        values = {f"train_dataset_{key}": value for key, value in files.items()}
        run = run_from({"seed": 7, "output_dir": "a b", **values})
        run = dataclasses.replace(run, words=own)
        assert read_run(launch.words_of(run)).flat() == run.flat()


def test_the_cause_of_an_end_is_told(capsys) -> None:
    run = run_from({"output_dir": "out"})

    def told(*ends: tuple[int, int]) -> tuple[int, str]:
        """Of (exit code, second of its end) by rank."""
        failures = {
            rank: SimpleNamespace(exitcode=code, timestamp=at, signal_name=lambda: "SIGKILL")
            for rank, (code, at) in enumerate(ends)
        }
        code = launch._told(run, SimpleNamespace(failures=failures))  # type: ignore[arg-type]
        return code, capsys.readouterr().err.partition(";")[0]

    assert told((1, 11), (-9, 10)) == (1, "erniekit train: rank 1 was ended by SIGKILL")
    assert told((1, 10), (-9, 11)) == (1, "erniekit train: rank 1 was ended by SIGKILL")
    assert told((7, 10), (-9, 40)) == (7, "erniekit train: rank 0 exited with 7")
    assert told((-15, 10), (1, 10)) == (1, "erniekit train: rank 1 exited with 1")
    assert told((2, 10), (-15, 10)) == (2, "")


def test_missing_rank_is_found_by_its_signs(monkeypatch) -> None:
    monkeypatch.setattr(watch, "PULSE_S", 0.05)
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    watches = [Watch(store, rank, 4, patience_s=60) for rank in range(4)]
    for one in watches:
        one.__enter__()
    try:
        watches[2].close()  # as if killed
        assert watches[0].missing().startswith("rank 2 has been silent")
        watches[3].leave("stopped by MemoryError: too large")
        watches[1].leave("stopped because rank 3 stopped by MemoryError: too large")
        assert watches[0].missing() == "rank 3 stopped by MemoryError: too large"
    finally:
        for one in watches:
            one.close()


def test_slow_rank_is_found_by_its_step(monkeypatch) -> None:
    monkeypatch.setattr(watch, "PULSE_S", 0.05)
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    watches = [Watch(store, rank, 3, patience_s=60) for rank in range(3)]
    monkeypatch.setattr(watch, "_place", lambda: watch.WAITS)
    for one, step in zip(watches, (7, 6, 7)):
        one.step = step
        one.__enter__()
    try:
        assert watches[0].missing() == "rank 1 is still at step 6"
        monkeypatch.setattr(watch, "_place", lambda: "read (loader.py:1)")
        for one in watches[:2]:
            one.close()  # only rank 2 tells where it is from here on
        time.sleep(0.2)
        watches[0]._look()
        assert watches[0]._behind() == {2: "is still at step 7, in read (loader.py:1)"}
    finally:
        for one in watches:
            one.close()


@pytest.mark.parametrize("collects", [True, False])
def test_nothing_is_collected_while_frames_are_read(monkeypatch, collects: bool) -> None:
    within = []
    monkeypatch.setattr(watch, "_innermost", lambda: within.append(gc.isenabled()) or "here")
    was = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        assert watch._place() == "here"
        assert within == [False]
        assert gc.isenabled() is collects
    finally:
        (gc.enable if was else gc.disable)()
