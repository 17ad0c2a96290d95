"""`erniekit resume`, and its --verify: what is right is certified, what is wrong is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from erniekit import checkpoint, session
from erniekit.cli import main
from tests.erniekit.conftest import preferences, write_lines
from tests.erniekit.test_resume import curve, words


@pytest.fixture(scope="module")
def trained(tiny, data: Path, tmp_path_factory) -> Path:
    """A run of eight steps with checkpoints at 3, 6 and 8."""
    output = tmp_path_factory.mktemp("trained")
    more = {"max_steps": 8, "save_steps": 3, "ema_decay": 0.9, "max_grad_spike": 50}
    more |= {"fine_tuning": "Full", "num_answers": 0}
    assert main(words(tiny("tiny-moe"), data, output, **more)) == 0
    return output


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def certificate(output: Path, step: int) -> dict:
    return json.loads((output / f"checkpoint-{step}.certificate.json").read_text())


def sealed_again(folder: Path) -> None:
    """As if the change had happened before the checkpoint was written."""
    (folder / "complete.json").unlink()
    checkpoint._seal(folder)


def changed(path: Path, name: str) -> None:
    """Flip the lowest bit of the first number of a tensor."""
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    content[8 + length + header[name]["data_offsets"][0]] ^= 1
    path.write_bytes(content)


def test_a_run_that_repeats_is_certified(copied: Path, capsys) -> None:
    before = curve(copied)
    assert main(["resume", "--verify", str(copied)]) == 0
    out = capsys.readouterr().out
    assert "reproduced: steps 7 to 8" in out
    assert "finished: " not in out and "erniekit export" not in out  # of a folder that goes
    told = certificate(copied, 6)
    assert told["verdict"] == "reproduced" and told["first_difference"] is None
    assert told["compared"]["records"] == [7, 8]
    assert told["compared"]["checkpoints"] == ["checkpoint-8"]
    assert {"loss", "grad_norm"} <= set(told["compared"]["numbers"])
    assert "checkpoint-6/model.safetensors" in told["sha256"]
    assert told["recorded_by"]["versions"] == told["verified_by"]["versions"]

    first = copied / "checkpoint-3"
    assert main(["resume", str(copied), "--verify", "steps=4", f"checkpoint={first}"]) == 0
    told = certificate(copied, 3)
    assert told["compared"]["records"] == [4, 5, 6, 7]
    assert told["compared"]["checkpoints"] == ["checkpoint-6"]
    assert curve(copied) == before
    assert not list(copied.glob(".replay-*")), "the repetition was left behind"


@pytest.mark.parametrize(
    ("folder", "file", "name"),
    [
        ("checkpoint-6", "model.safetensors", "model.layers.1.self_attn.q_proj.weight"),
        ("checkpoint-8", "model.safetensors", "model.layers.1.self_attn.q_proj.weight"),
        ("checkpoint-8", "ema/model.safetensors", "model.layers.1.self_attn.q_proj.weight"),
        (
            "checkpoint-8",
            "optimizer/adamw.safetensors",
            "model.layers.1.self_attn.q_proj.weight.square",
        ),
    ],
)
def test_one_flipped_bit_fails_and_is_named(folder, file, name, copied: Path, capsys) -> None:
    changed(copied / folder / file, name)
    # Once as damage on the disk, once as if it had been written so.
    assert main(["resume", "--verify", str(copied)]) == 1
    told = certificate(copied, 6)
    assert told["verdict"] == "not reproduced"
    assert told["first_difference"] == f"{folder}: {file} has changed since it was written"
    sealed_again(copied / folder)
    assert main(["resume", "--verify", str(copied)]) == 1
    found = certificate(copied, 6)["first_difference"]
    assert found in capsys.readouterr().out
    if folder == "checkpoint-8":
        assert found.startswith(f"checkpoint-8: {file}: {name}[0, 0] was ")
    else:  # of the start: already the next numbers or weights differ
        assert found.startswith(("step 7: ", "checkpoint-8: "))


@pytest.mark.parametrize("folder", ["checkpoint-6", "checkpoint-8"])
def test_a_flipped_byte_of_the_random_state_fails(folder: str, copied: Path) -> None:
    path = copied / folder / checkpoint.STATE_FILE
    state = json.loads(path.read_text())
    state["rng"][104] ^= 1  # the low byte of a word of the generator
    path.write_text(json.dumps(state))
    sealed_again(copied / folder)
    assert main(["resume", "--verify", str(copied)]) == 1
    found = certificate(copied, 6)["first_difference"]
    assert found.startswith("checkpoint-8: trainer_state.json: rng differs at number 104"), found


def test_a_repetition_that_is_stopped_gives_no_verdict(copied: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(session, "_is_stopped", lambda s: s.progress.step == 7)
    assert main(["resume", "--verify", str(copied)]) == 2
    assert "the repetition was stopped at step 7" in capsys.readouterr().err
    assert not list(copied.glob("*.certificate.json")) + list(copied.glob(".replay-*"))


@pytest.mark.parametrize("fine_tuning", ["Full", "LoRA"])
def test_a_run_on_preferences_is_certified(fine_tuning, tiny, tmp_path: Path, capsys) -> None:
    """Its numbers of the reference lie in the folder, and are not asked for again."""
    pairs = write_lines(tmp_path / "pairs.jsonl", preferences(30))
    more = {"stage": "DPO", "fine_tuning": fine_tuning, "max_seq_len": 256, "num_answers": 0}
    more |= {"train_dataset_path": pairs, "eval_dataset_path": pairs, "max_steps": 4}
    output = tmp_path / "run"
    assert main(words(tiny("tiny-dense"), tmp_path, output, save_steps=2, **more)) == 0
    assert main(["resume", "--verify", str(output)]) == 0
    assert "reproduced: steps 3 to 4" in capsys.readouterr().out
    told = certificate(output, 2)
    assert told["compared"]["records"] == [3, 4]
    assert {"rewards_margin", "loss"} <= set(told["compared"]["numbers"])


def test_a_changed_record_fails(copied: Path) -> None:
    path = copied / "metrics.jsonl"
    lines = path.read_text().splitlines()
    record = json.loads(lines[-1])
    loss = record["loss"]
    lines[-1] = json.dumps(record | {"loss": loss * (1 + 2**-50)})
    path.write_text("\n".join(lines) + "\n")
    assert main(["resume", "--verify", str(copied)]) == 1
    found = certificate(copied, 6)["first_difference"]
    assert found.startswith("step 8: loss was") and repr(loss) in found


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ([], "no output folder was given"),
        (["{run}/nothing"], "has no run.yaml"),
        (["{run}", "--verify", "step=2"], "--verify has no 'step'"),
        (["{run}", "--verify", "steps=no"], "is not a number of steps"),
        (["{run}", "--verify", "checkpoint={run}/checkpoint-9"], "is not a checkpoint of"),
        (["{run}", "max_step=3"], "unknown key 'max_step' in the command line"),
        (["{run}", "--verify", "checkpoint={run}/checkpoint-8"], "nothing to compare with"),
    ],
)
def test_mistakes_are_one_sentence(more, told, trained: Path, capsys) -> None:
    assert main(["resume", *(word.format(run=trained) for word in more)]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_resume_goes_on_by_run_yaml_wherever_the_folder_is(copied: Path, capsys) -> None:
    assert main(["resume", str(copied), "max_steps=10"]) == 0
    assert [row[0] for row in curve(copied)] == list(range(11))
    assert f"resuming from {copied}/checkpoint-8" in capsys.readouterr().out


def test_a_run_that_was_made_longer_is_certified(tiny, data: Path, tmp_path: Path, capsys) -> None:
    more = {"save_steps": 2, "evaluation_strategy": "no", "num_answers": 0}
    output = tmp_path / "after-its-end"
    assert main(words(tiny("tiny-dense"), data, output, max_steps=4, **more)) == 0
    assert main(["resume", str(output), "max_steps=6"]) == 0
    assert main(["resume", "--verify", str(output)]) == 0
    assert "reproduced: steps 5 to 6" in capsys.readouterr().out
    # A start from before the change is compared as far as the settings go.
    first = f"checkpoint={output}/checkpoint-2"
    assert main(["resume", "--verify", str(output), "steps=4", first]) == 0
    assert certificate(output, 2)["compared"]["records"] == [3, 4]

    output = tmp_path / "on-its-way"
    start = words(tiny("tiny-dense"), data, output, max_steps=6, stop_after_step=2, **more)
    assert main(start) == 0
    assert main(["resume", str(output), "max_steps=8"]) == 0
    assert main(["resume", "--verify", str(output), "checkpoint=checkpoint-2"]) == 0


def test_a_damaged_record_is_a_sentence(copied: Path, capsys) -> None:
    path = copied / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], lines[-1].replace(":", "", 1)]) + "\n")
    assert main(["resume", "--verify", str(copied)]) == 2
    told = capsys.readouterr().err
    assert f"line {len(lines)} of {path} is damaged" in told and told.count("\n") == 1
