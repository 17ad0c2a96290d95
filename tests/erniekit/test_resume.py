"""A run that is stopped and started again gives the same numbers, bit for bit; damage is found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ernie.settings import ConfigError
from erniekit import checkpoint
from erniekit.cli import main
from tests.erniekit.conftest import dialogues, write_lines

ROOT = Path(__file__).parents[2]


def words(model: Path, data: Path, output: Path, **more: object) -> list[str]:
    values = {
        "model_name_or_path": model,
        "train_dataset_path": data / "train.jsonl",
        "eval_dataset_path": data / "eval.jsonl",
        "output_dir": output,
        "max_seq_len": 96,
        "buffer_size": 7,
        "max_steps": 12,
        "save_steps": 4,
        "evaluation_strategy": "steps",
        "eval_steps": 5,
        "gradient_accumulation_steps": 2,
        "dataloader_num_workers": 1,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
    } | more
    return ["train", *(f"{key}={value}" for key, value in values.items())]


def curve(output: Path) -> list[tuple]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    keys = ("step", "loss", "grad_norm", "learning_rate", "num_tokens", "total_tokens", "eval_loss")
    return [tuple(json.loads(line).get(key) for key in keys) for line in lines]


def test_sigterm_saves_and_the_next_start_goes_on(tiny, data: Path, tmp_path: Path) -> None:
    arguments = words(tiny("tiny-dense"), data, tmp_path, max_steps=100_000, save_steps=100_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "erniekit.cli", *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait(60) == 0, rest
    ((step, _),) = checkpoint.checkpoints(tmp_path)
    arguments = words(tiny("tiny-dense"), data, tmp_path, max_steps=step + 2)
    assert main(arguments) == 0
    assert [row[0] for row in curve(tmp_path)] == list(range(step + 3))


def test_every_flipped_byte_is_found_and_the_one_before_is_taken(
    tiny, data: Path, tmp_path: Path, caplog
) -> None:
    assert main(words(tiny("tiny-dense"), data, tmp_path, max_steps=8, ema_decay=0.9)) == 0
    newest = tmp_path / "checkpoint-8"
    assert checkpoint.newest_good(tmp_path) == newest
    for path in sorted(p for p in newest.rglob("*") if p.is_file()):
        whole = path.read_bytes()
        path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        assert checkpoint.newest_good(tmp_path) == tmp_path / "checkpoint-4", path.name
        path.write_bytes(whole)
    assert checkpoint.newest_good(tmp_path) == newest


def test_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "weights").write_bytes(b"123")

    def run_full(folder: Path) -> None:
        write(folder)
        raise OSError(28, "No space left on device")

    checkpoint.save(tmp_path, 1, write, {}, 3)
    with pytest.raises(ConfigError, match="ran full"):
        checkpoint.save(tmp_path, 2, run_full, {}, 3)
    with pytest.raises(ConfigError, match=f"needs {10**18:,} bytes"):
        checkpoint.save(tmp_path, 2, write, {}, 10**18)
    assert checkpoint.newest_good(tmp_path) == tmp_path / "checkpoint-1"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_resuming_with_other_settings_is_told_and_another_kind_refused(
    tiny, data: Path, tmp_path: Path, capsys
) -> None:
    assert main(words(tiny("tiny-dense"), data, tmp_path, max_steps=2)) == 0
    assert main(words(tiny("tiny-dense"), data, tmp_path, max_steps=3, learning_rate=1e-3)) == 0
    assert "learning_rate 0.01 -> 0.001" in capsys.readouterr().out
    assert main(words(tiny("tiny-dense"), data, tmp_path, fine_tuning="Full")) == 2
    assert "fine_tuning=LoRA, this one has Full" in capsys.readouterr().err


def test_second_trainer_in_a_folder_is_refused(tiny, data: Path, tmp_path: Path, capsys) -> None:
    with checkpoint.locked(tmp_path):
        assert main(words(tiny("tiny-dense"), data, tmp_path)) == 2
    assert f"another run (process {os.getpid()})" in capsys.readouterr().err


@pytest.mark.parametrize("use_async_save", [False, True])
def test_resumed_at_7_and_13_equals_unbroken(
    use_async_save: bool, tiny, data: Path, tmp_path: Path
) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    more = {"max_steps": 20, "fine_tuning": "Full", "ema_decay": 0.9, "num_answers": 0}
    assert main(words(tiny("tiny-moe"), data, unbroken, **more)) == 0
    more["use_async_save"] = use_async_save
    for last in (7, 13, 20):
        assert main(words(tiny("tiny-moe"), data, broken, stop_after_step=last, **more)) == 0
        assert checkpoint.checkpoints(broken)[-1][0] == last
    assert curve(broken) == curve(unbroken)
    for part in ("model.safetensors", "ema/model.safetensors", checkpoint.OPTIMIZER_FILE):
        ours, theirs = (load_file(f / "checkpoint-20" / part) for f in (broken, unbroken))
        assert all((ours[key] == tensor).all() for key, tensor in theirs.items()), part
    ours, theirs = (
        json.loads((f / "checkpoint-20" / checkpoint.STATE_FILE).read_text())
        for f in (broken, unbroken)
    )
    for key in ("rng", "progress", "num_updates"):
        assert ours[key] == theirs[key], key


@pytest.mark.parametrize("use_async_save", [False, True])
def test_bad_data_midway_saves_the_last_whole_step(
    use_async_save: bool, tiny, tmp_path: Path, capsys
) -> None:
    output, file = tmp_path / "run", tmp_path / "train.jsonl"
    good = dialogues(300)
    write_lines(file, [*good, *[{"src": []}] * 100])
    more = {"train_dataset_path": file, "evaluation_strategy": "no", "num_answers": 0}
    more |= {"packing": "false", "batch_size": 16, "gradient_accumulation_steps": 1}
    more |= {"random_shuffle": "false", "mix_strategy": "concat", "max_steps": 20}
    more |= {"save_steps": 10, "use_async_save": use_async_save}
    start = words(tiny("tiny-dense"), tmp_path, output, **more)
    start.remove(f"eval_dataset_path={tmp_path / 'eval.jsonl'}")
    assert main(start) == 2
    told = capsys.readouterr().err
    assert "9 of 400 records cannot be used so far" in told and told.count("\n") == 1
    assert "max_bad_data_share=0.02" in told and "ignore_changed_inputs=true" in told
    assert [step for step, _ in checkpoint.checkpoints(output)] == [10, 18]
    assert [row[0] for row in curve(output)] == list(range(1, 19))

    write_lines(file, [*good, *dialogues(100)])
    assert main(start) == 2
    assert main([*start, "ignore_changed_inputs=true"]) == 0
    assert [row[0] for row in curve(output)] == list(range(1, 21))


def test_going_back_sets_later_checkpoints_aside(tiny, data: Path, tmp_path: Path, capsys) -> None:
    more = {"max_steps": 8, "save_steps": 2, "eval_steps": 2, "num_answers": 0}
    assert main(words(tiny("tiny-dense"), data, tmp_path, **more)) == 0
    capsys.readouterr()
    back = more | {"save_steps": 1, "save_total_limit": 2, "learning_rate": 1e-3}
    back["resume_from_checkpoint"] = tmp_path / "checkpoint-2"
    assert main(words(tiny("tiny-dense"), data, tmp_path, **back, stop_after_step=5)) == 0
    told = capsys.readouterr().out
    assert told.count("are set aside") == 1
    assert "(checkpoint-4, checkpoint-6, checkpoint-8)" in told
    steps = [step for step, _ in checkpoint.checkpoints(tmp_path)]
    assert steps[-1] == 5 and max(steps[:-1]) < 5, steps
    assert json.loads((tmp_path / "best.json").read_text())["checkpoint"] in (
        f"checkpoint-{step}" for step in steps
    )
    for step in (4, 6, 8):
        assert not checkpoint.what_is_wrong(tmp_path / f"abandoned-checkpoint-{step}")
    assert [row[0] for row in curve(tmp_path)] == list(range(6))

    del back["resume_from_checkpoint"]
    assert main(words(tiny("tiny-dense"), data, tmp_path, **back)) == 0
    assert f"resuming from {tmp_path}/checkpoint-5" in capsys.readouterr().out
    assert [row[0] for row in curve(tmp_path)] == list(range(9))

    # Once more: what was set aside before stays beside it.
    back["resume_from_checkpoint"] = checkpoint.checkpoints(tmp_path)[0][1]
    assert main(words(tiny("tiny-dense"), data, tmp_path, **back)) == 0
    assert (tmp_path / "abandoned-checkpoint-8.2").is_dir()
