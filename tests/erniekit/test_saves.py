"""Saves beside the training, kills and full disks at every file operation, saves on request."""

from __future__ import annotations

import json
import random
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ernie.settings import ConfigError
from erniekit import checkpoint, inputs, serve, session
from erniekit.cli import main
from erniekit.config import run_from
from erniekit.saver import Saver
from tests.erniekit.test_resume import curve, words
from tests.helpers_faults import Ended, forked_runs


@pytest.fixture(scope="module")
def runs():
    with forked_runs() as forked:
        yield forked


def quick(model: Path, data: Path, output: Path, **more: object) -> list[str]:
    """Words of a run of six steps, a checkpoint every two and the best one kept."""
    values = {"max_steps": 6, "save_steps": 2, "eval_steps": 2, "save_total_limit": 2}
    return words(model, data, output, **(values | {"num_answers": 0} | more))


def weights(output: Path) -> dict[str, torch.Tensor]:
    """Of the final model, the averages and the last optimizer state."""
    files = [*output.glob("*.safetensors"), *output.glob("ema/*.safetensors")]
    files += output.glob("checkpoint-6/**/*.safetensors")
    assert len(files) == 5, files
    return {f"{f.relative_to(output)}: {k}": t for f in files for k, t in load_file(f).items()}


@pytest.mark.parametrize(
    ("use_async_save", "rounds", "name", "fine_tuning"),
    [(False, 2, "tiny-dense", "LoRA"), (True, 3, "tiny-moe", "Full")],
)
def test_killed_twice_at_any_file_operation_equals_unbroken(
    use_async_save, rounds, name, fine_tuning, runs, tiny, data: Path, tmp_path: Path
) -> None:
    more = {"use_async_save": use_async_save, "fine_tuning": fine_tuning, "ema_decay": 0.9}
    unbroken = tmp_path / "unbroken"
    ended = runs.run(quick(tiny(name), data, unbroken, **more), unbroken)
    assert ended.status == 0, ended.told
    numbers = random.Random(rounds)
    for round_ in range(rounds):
        broken = tmp_path / f"broken-{round_}"
        again = quick(tiny(name), data, broken, **more)
        first, second = (numbers.randrange(1, n) for n in (ended.operations, 60))
        assert runs.run(again, broken, at=first).status == -signal.SIGKILL
        runs.run(again, broken, at=second)  # may end before, if little is left
        where = f"killed at operation {first}, then {second}"
        for _, folder in checkpoint.checkpoints(broken):
            assert not checkpoint.what_is_wrong(folder), where
        finished = runs.run(again, broken)
        assert finished.status == 0, finished.told
        assert curve(broken) == curve(unbroken), where
        ours, theirs = weights(broken), weights(unbroken)
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert torch.equal(ours[key], tensor), f"{where}: {key} differs"


def test_full_disk_at_any_write_is_one_sentence_and_the_last_checkpoint_is_whole(
    runs, tiny, data: Path, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    start = quick(tiny("tiny-dense"), data, first, max_steps=4, stop_after_step=2)
    assert runs.run(start, first).status == 0

    def full(at: int) -> Ended:
        output = tmp_path / f"full-{at}"
        shutil.copytree(first, output)
        arguments = quick(tiny("tiny-dense"), data, output, max_steps=4)
        ended = runs.run(arguments, output, at=at, fault="full")
        if ended.status:
            assert ended.status == 3, ended.told
            assert "Traceback" not in ended.told, ended.told
            last = ended.told.strip().splitlines()[-1]
            assert "the disk of" in last and str(output) in last, ended.told
            assert not list(output.glob("*.partial"))
        newest = checkpoint.newest_good(output)
        assert newest in (output / "checkpoint-2", output / "checkpoint-4")
        return ended

    num_operations = full(0).operations
    for at in random.Random(5).sample(range(1, num_operations), 6):
        assert full(at).status, f"operation {at} of {num_operations} failed, and nobody noticed"


@pytest.mark.parametrize("seconds", [0.15, 0.4])
def test_sigterm_at_any_time_loses_nothing(
    seconds: float, runs, tiny, data: Path, tmp_path: Path
) -> None:
    """With seconds that fall into the steps on most machines; all that is said holds on any."""
    output, more = tmp_path / "run", {"max_steps": 400, "save_steps": 400, "use_async_save": True}
    arguments = quick(tiny("tiny-dense"), data, output, **more)
    ended = runs.run(arguments, output, at=seconds, fault="term")
    steps = [row[0] for row in curve(output)] if ended.told.count("\nstep") else [0]
    if "stopping after this step" in ended.told:
        assert ended.status == 0, ended.told
        assert checkpoint.newest_good(output) == output / f"checkpoint-{steps[-1]}"
    else:  # it had not begun
        assert ended.status == -signal.SIGTERM and steps == [0], ended.told
    last = steps[-1] + 2
    again = runs.run([*arguments, f"stop_after_step={last}"], output)
    assert again.status == 0, again.told
    assert [row[0] for row in curve(output)] == list(range(last + 1))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_copy_is_written_while_the_tensors_change_and_one_at_a_time(
    device: str, tmp_path: Path
) -> None:
    weight, done = torch.zeros(3, device=device), threading.Event()
    saved: list[Path] = []
    seen: list[torch.Tensor] = []

    def write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        assert done.wait(10)
        assert tensors["weight"].is_pinned() == (device == "cuda")
        seen.append(tensors["weight"].clone())
        (folder / "file").write_text("whole")

    saver = Saver(tmp_path, write, saved.append, is_async=True)
    saver.save(1, {"weight": weight}, {})
    weight += 1
    saver.settle()
    assert not saved, "the save was not in flight"
    done.set()
    saver.save(2, {"weight": weight}, {})  # waits for the first
    assert saved == [tmp_path / "checkpoint-1"]
    weight += 1
    saver.settle(wait=True)
    assert saved[1:] == [tmp_path / "checkpoint-2"]
    assert [t.tolist() for t in seen] == [[0, 0, 0], [1, 1, 1]]


def test_tensors_of_other_names_and_sizes_are_copied_too(tmp_path: Path) -> None:
    """As the batches of a round that is not over: the memory of the others is used again."""
    seen: list[dict[str, list]] = []
    places: list[int] = []

    def write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        seen.append({name: tensor.tolist() for name, tensor in tensors.items()})
        places.append(tensors["weight"].data_ptr())
        (folder / "file").write_text("whole")

    saver = Saver(tmp_path, write, lambda folder: None, is_async=True)
    given = [
        {"weight": torch.tensor([1.0]), "batch": torch.arange(3)},
        {"weight": torch.tensor([2.0]), "batch": torch.arange(5)},
        {"batch": torch.arange(2), "weight": torch.tensor([3.0]), "more": torch.ones(1)},
        {"weight": torch.tensor([4.0])},
    ]
    for step, tensors in enumerate(given, 1):
        saver.save(step, tensors, {})
    saver.settle(wait=True)
    assert seen == [{name: t.tolist() for name, t in tensors.items()} for tensors in given]
    assert len({*places}) == 1


def test_the_writers_error_comes_up_where_the_training_next_asks(tmp_path: Path) -> None:
    def full(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        raise OSError(28, "No space left on device")

    saver = Saver(tmp_path, full, lambda folder: None, is_async=True)
    saver.save(1, {"weight": torch.zeros(3)}, {})
    with pytest.raises(ConfigError, match="ran full while a checkpoint of 12 bytes"):
        saver.settle(wait=True)
    saver.settle(wait=True)
    assert not list(tmp_path.iterdir())


def test_async_save_is_also_a_word_of_erniekits_key() -> None:
    run = run_from({"unified_checkpoint_config": "async_save remove_master_weight"})
    assert run.training.use_async_save and run.without_effect == ("unified_checkpoint_config",)
    run = run_from({"unified_checkpoint_config": "async_save"})
    assert run.training.use_async_save and not run.without_effect
    off = {"unified_checkpoint_config": "async_save", "use_async_save": False}
    assert not run_from(off).training.use_async_save
    assert run_from({"zcc_save_ema_coef": 0.9}).optimisation.ema_decay == 0.9
    with pytest.raises(ConfigError, match="are one setting; give ema_decay"):
        run_from({"zcc_save_ema_coef": 0.9, "ema_decay": 0.8})
    for tensorwise, whole in ((True, "true"), (False, True), (1, False), ("", True)):
        both = {"tensorwise_offload_optimizer": tensorwise, "offload_optim": whole}
        assert run_from(both).optimisation.offload_optim
    assert not run_from({"tensorwise_offload_optimizer": None}).optimisation.offload_optim
    with pytest.raises(
        ConfigError, match="tensorwise_offload_optimizer='maybe' is not true or false"
    ):
        run_from({"tensorwise_offload_optimizer": "maybe"})


def test_a_file_named_save_asks_for_a_checkpoint(
    tiny, data: Path, tmp_path: Path, monkeypatch
) -> None:
    request = tmp_path / session.REQUEST_FILE
    real = session._evaluated

    def asking(running: session.Session, step: int) -> dict[str, float]:
        if step == 5:
            request.touch()
        return real(running, step)

    monkeypatch.setattr(session, "_evaluated", asking)
    for use_async_save in (False, True):
        more = {"save_steps": 100, "max_steps": 7, "use_async_save": use_async_save}
        more["overwrite_output_dir"] = True
        assert main(words(tiny("tiny-dense"), data, tmp_path, **more)) == 0
        assert not request.exists()
        assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [5, 7]


def test_what_cannot_be_removed_is_told_and_training_goes_on(
    tiny, data: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    real = checkpoint.shutil.rmtree

    def refused(path: Path, **options: object) -> None:
        if Path(path).name == "checkpoint-1.partial" and Path(path).exists():
            raise PermissionError(13, "Permission denied", str(path))
        real(path, **options)

    (tmp_path / session.REQUEST_FILE).mkdir()
    more = {"max_steps": 4, "save_steps": 4, "save_total_limit": 1, "evaluation_strategy": "no"}
    monkeypatch.setattr(checkpoint.shutil, "rmtree", refused)
    assert main(quick(tiny("tiny-dense"), data, tmp_path, **more)) == 0
    told = capsys.readouterr().out
    assert told.count("SAVE has asked for a checkpoint and cannot be removed") == 1
    assert "checkpoint-1 is one more than save_total_limit, and cannot be removed" in told
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [4]

    more["max_steps"] = 5  # what is left does not stop the next start
    assert main(quick(tiny("tiny-dense"), data, tmp_path, **more)) == 0
    assert "checkpoint-1.partial is left of a writer that was killed" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_one_sentence(
    tiny, data: Path, tmp_path: Path, capsys
) -> None:
    (tmp_path / ".lock").mkdir()  # nobody can open it for writing, not even root
    assert main(quick(tiny("tiny-dense"), data, tmp_path)) == 2
    told = capsys.readouterr().err
    assert f"output_dir {tmp_path} cannot be written to" in told and told.count("\n") == 1


def test_the_best_checkpoint_stays_and_can_be_the_final_model(
    tiny, data: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    losses = {0: 9.0, 2: 5.0, 4: 3.0, 6: 4.0, 8: 3.0, 10: 7.0}
    real = session._evaluated
    monkeypatch.setattr(session, "_evaluated", lambda s, n: real(s, n) | {"eval_loss": losses[n]})
    more = {"max_steps": 10, "save_steps": 2, "eval_steps": 2, "save_total_limit": 2}
    more |= {"load_best_model_at_end": True, "ema_decay": 0.5}
    assert main(words(tiny("tiny-dense"), data, tmp_path, **more)) == 0
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [4, 10]
    assert json.loads((tmp_path / "best.json").read_text()) == {
        "checkpoint": "checkpoint-4", "eval_loss": 3.0,
    }  # fmt: skip
    best = tmp_path / "checkpoint-4"
    for part in ("adapter_model.safetensors", "ema/adapter_model.safetensors"):
        ours, theirs = load_file(tmp_path / part), load_file(best / part)
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs), part

    assert checkpoint.chosen(tmp_path, "best") == best
    assert checkpoint.chosen(tmp_path, "checkpoint-4") == best
    assert checkpoint.chosen(tmp_path, "ema") == tmp_path / "ema"
    assert checkpoint.chosen(tmp_path, None) == tmp_path
    assert checkpoint.chosen(tmp_path, "newest") == tmp_path / "checkpoint-10"
    capsys.readouterr()
    base = f"model_name_or_path={tiny('tiny-dense')}"
    assert main(["export", base, f"output_dir={tmp_path}", "use_checkpoint=best"]) == 0
    assert f"exported {best} as" in capsys.readouterr().out
    run = run_from({"output_dir": str(tmp_path), "use_checkpoint": "best"})
    with pytest.raises(ConfigError, match=f"{best} holds a LoRA adapter.*use_checkpoint=best"):
        serve.served_model(run)
    (best / "trainer_state.json").write_text("{}")
    assert main(["export", base, f"output_dir={tmp_path}", "use_checkpoint=best"]) == 2
    assert "trainer_state.json has 2 bytes instead of" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["max_evaluate_steps", "records", "place"])
def test_the_best_is_one_of_those_evaluated_on_the_same(
    what: str, tiny, data: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    losses = {0: 9.0, 2: 1.0, 4: 2.0, 6: 4.0, 8: 3.0}
    real, output = session._evaluated, tmp_path / "out"
    monkeypatch.setattr(session, "_evaluated", lambda s, n: real(s, n) | {"eval_loss": losses[n]})
    file = Path(shutil.copy(data / "eval.jsonl", tmp_path / "eval.jsonl"))
    more = {"save_steps": 2, "eval_steps": 2, "load_best_model_at_end": True}
    more |= {"eval_dataset_path": file}
    assert main(words(tiny("tiny-dense"), data, output, **more, max_steps=4)) == 0
    assert json.loads((output / "best.json").read_text())["checkpoint"] == "checkpoint-2"
    if what == "max_evaluate_steps":
        more["max_evaluate_steps"] = 1
    elif what == "records":
        file.write_text(file.read_text().replace("It is", "It iz", 1))
    else:
        more["eval_dataset_path"] = file.rename(tmp_path / "moved.jsonl")
    capsys.readouterr()
    assert main(words(tiny("tiny-dense"), data, output, **more, max_steps=8)) == 0
    told = capsys.readouterr().out
    is_same = what == "place"
    best = "checkpoint-2" if is_same else "checkpoint-8"
    assert json.loads((output / "best.json").read_text())["checkpoint"] == best
    assert told.count("checkpoint-2 and checkpoint-4 were evaluated on other") == (not is_same)
    ours, theirs = (
        load_file(folder / "adapter_model.safetensors") for folder in (output, output / best)
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_what_an_older_version_did_not_tell_of_an_evaluation_its_settings_do(
    tmp_path: Path,
) -> None:
    def add(step: int, loss: float, on: dict, **settings: object) -> None:
        state = {"evaluation": {"eval_loss": loss}, "inputs": {"evaluation": on}}
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / checkpoint.STATE_FILE).write_text(json.dumps(state | {"settings": settings}))

    add(1, 1.0, {"most": 0, "max_prompt_len": 2048}, beta=0.1)
    add(2, 0.5, {"most": 0}, beta=0.5)
    add(3, 0.4, {"most": 9}, beta=0.1)
    add(4, 2.0, {"most": 0, "beta": 0.1}, beta=0.1)
    found, others = checkpoint.evaluated(tmp_path, "eval_loss", greater_is_better=False)
    assert [folder.name for _, folder in found] == ["checkpoint-1", "checkpoint-4"]
    assert [folder.name for folder in others] == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize(
    ("stage", "changes", "stays"),
    [
        ("UPO", {"reward": "number", "reward_weights": "2", "answer_pattern": "x",
                 "max_completion_length": 9},
         {"upo_mu": 0.1, "beta": 0.5, "learning_rate": 1e-3}),
        ("DPO", {"beta": 0.5, "loss_type": "ipo", "mask_out_eos_token": False},
         {"ref_model_update_steps": 3, "desirable_weight": 2.0, "reward": "exact"}),
        ("SFT", {"max_seq_len": 64}, {"beta": 0.5, "learning_rate": 1e-3}),
    ],
)  # fmt: skip
def test_evaluations_by_other_settings_are_not_of_the_same(
    stage: str, changes: dict, stays: dict, data: Path
) -> None:
    values = {"stage": stage, "eval_dataset_path": str(data / "eval.jsonl")}
    values |= {"evaluation_strategy": "steps", "eval_steps": 2, "train_dataset_path": "x.jsonl"}
    of = [inputs._evaluation(run_from(values | more)) for more in ({}, stays)]
    assert of[0] == of[1]
    for key, value in changes.items():
        assert inputs._evaluation(run_from(values | {key: value})) != of[0], key


def test_checkpoints_that_do_not_say_what_they_were_evaluated_on_are_compared_alone(
    tmp_path: Path,
) -> None:
    def write(step: int, loss: float, inputs: dict) -> Path:
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        state = {"evaluation": {"eval_loss": loss}, "inputs": inputs}
        (folder / checkpoint.STATE_FILE).write_text(json.dumps(state))
        return folder

    def found() -> tuple[list, list]:
        return checkpoint.evaluated(tmp_path, "eval_loss", greater_is_better=False)

    old = [write(1, 2.0, {}), write(2, 1.0, {})]
    assert found() == ([(1.0, old[1]), (2.0, old[0])], [])
    new = [write(3, 5.0, {"evaluation": {"batches": -1}})]
    assert found() == ([(5.0, new[0])], old)
    new.append(write(4, 4.0, {"evaluation": {"batches": -1}}))
    assert found() == ([(4.0, new[1]), (5.0, new[0])], old)


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_best_checkpoint_is_told_and_the_next_best_is_taken(
    damage: str, tiny, data: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    losses = {0: 9.0, 2: 3.0, 4: 2.0, 6: 4.0}
    real = session._evaluated
    name = "adapter_model.safetensors"

    def spoiling(running: session.Session, step: int) -> dict[str, float]:
        path = tmp_path / "checkpoint-4" / name
        if step == 6 and damage == "gone":
            path.unlink()
        elif step == 6:
            whole = path.read_bytes()
            path.write_bytes(whole[:-9] + (b"" if damage == "cut" else b"123456789"))
        return real(running, step) | {"eval_loss": losses[step]}

    monkeypatch.setattr(session, "_evaluated", spoiling)
    more = {"save_total_limit": 3, "load_best_model_at_end": True}
    assert main(quick(tiny("tiny-dense"), data, tmp_path, **more)) == 0
    told = capsys.readouterr().out
    assert f"SKIPPED the damaged checkpoint {tmp_path}/checkpoint-4" in told
    assert f"the final model is that of {tmp_path}/checkpoint-2, eval_loss 3.0000" in told
    ours, theirs = load_file(tmp_path / name), load_file(tmp_path / "checkpoint-2" / name)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)

    (tmp_path / "checkpoint-2" / name).unlink()  # only the last one is whole
    assert main(quick(tiny("tiny-dense"), data, tmp_path, **more)) == 0
    ours, theirs = load_file(tmp_path / name), load_file(tmp_path / "checkpoint-6" / name)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_a_metric_that_no_evaluation_has_is_refused(tiny, data, tmp_path: Path, capsys) -> None:
    arguments = words(tiny("tiny-dense"), data, tmp_path, metric_for_best_model="bleu")
    assert main(arguments) == 2
    assert "metric_for_best_model=eval_bleu is not a number of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({}, "needs evaluations to choose by"),
        ({"evaluation_strategy": "epoch"}, "give one strategy"),
        ({"evaluation_strategy": "steps", "eval_steps": 300}, "a multiple of eval_steps"),
    ],
)
def test_the_best_of_checkpoints_that_are_not_evaluated_is_refused(more, told) -> None:
    path = {"eval_dataset_path": "there.jsonl"} if more else {}
    with pytest.raises(ConfigError, match=told):
        run_from({"load_best_model_at_end": True, **path, **more})
