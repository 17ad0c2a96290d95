"""`stage: KTO` and `stage: RM` through the commands: learning, resuming, what they leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ernie
from ernie.checkpoint.errors import CheckpointError
from ernie.tokenizer import Tokenizer
from erniekit import checkpoint, reward_model
from erniekit.cli import main
from erniekit.config import run_from
from erniekit.data.stream import stream
from erniekit.recipes import sft
from erniekit.reference import REFERENCE_FILE
from tests.erniekit.conftest import judgements, preferences, write_lines
from tests.erniekit.test_run import records
from tests.helpers_faults import killed

TIMED = {"seconds", "tokens_per_second", "peak_memory_gib", "eval_seconds"}


@pytest.fixture
def words(tiny, tmp_path: Path):
    """A function from stage and settings to the words of a short run of a tiny dense model."""
    for name, count, salt in (("train", 40, ""), ("eval", 10, "about ")):
        write_lines(tmp_path / f"KTO-{name}.jsonl", judgements(count, salt=salt))
        for stage in ("RM", "DPO"):
            write_lines(tmp_path / f"{stage}-{name}.jsonl", preferences(count, salt=salt))

    def make(stage: str, **more: object) -> list[str]:
        values = {
            "stage": stage,
            "model_name_or_path": tiny("tiny-dense"),
            "train_dataset_path": tmp_path / f"{stage}-train.jsonl",
            "eval_dataset_path": tmp_path / f"{stage}-eval.jsonl",
            "output_dir": tmp_path / "out",
            "max_seq_len": 256,
            "max_steps": 12,
            "learning_rate": 5e-3,
            "evaluation_strategy": "steps",
            "eval_steps": 6,
            "save_strategy": "no",
            "num_answers": 1,
        } | more
        return [f"{key}={value}" for key, value in values.items()]

    return make


def curve(output: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in TIMED} for r in records(output)]


@pytest.mark.parametrize(("fine_tuning", "name"), [("Full", "tiny-moe"), ("LoRA", "tiny-dense")])
def test_kto_raises_the_held_out_accuracy(
    fine_tuning, name, words, tiny, tmp_path: Path, capsys
) -> None:
    more = {"fine_tuning": fine_tuning, "model_name_or_path": tiny(name)}
    assert main(["train", *words("KTO", **more)]) == 0
    found = records(tmp_path / "out")
    held_out = {r["step"]: r for r in found if "eval_loss" in r}
    first, last = held_out[0], held_out[12]
    # Before training the policy is the reference: gains and z are 0.
    assert first["eval_rewards_accuracy"] == 0.5 and first["eval_answers"] == 10
    assert first["eval_loss"] == pytest.approx(0.5, abs=1e-6) and first["eval_kl"] == 0
    assert last["eval_rewards_accuracy"] > 0.85, last
    assert last["eval_loss"] < 0.45 and last["eval_rewards_margin"] > 0.3, last
    assert all(record["num_answers"] > 0 for record in found[1:])
    told = capsys.readouterr().out
    assert "| margin 0.0000 | right 50 % |" in told and "10 answers" in told
    assert len((tmp_path / "out" / REFERENCE_FILE).read_text().splitlines()) == 1 + 40 + 10
    assert main(["eval", *words("KTO", **more)]) == 0
    results = json.loads((tmp_path / "out/eval_results.json").read_text())
    assert abs(results["eval_loss"] - last["eval_loss"]) < 0.05


@pytest.mark.parametrize(("fine_tuning", "name"), [("Full", "tiny-moe"), ("LoRA", "tiny-dense")])
def test_a_reward_model_ranks_held_out_answers_and_loads(
    fine_tuning, name, words, tiny, tmp_path: Path
) -> None:
    more = {"fine_tuning": fine_tuning, "model_name_or_path": tiny(name), "save_strategy": "steps"}
    output = tmp_path / "out"
    assert main(["train", *words("RM", **more)]) == 0
    held_out = {r["step"]: r for r in records(output) if "eval_loss" in r}
    last = held_out[12]
    assert last["eval_rewards_accuracy"] > 0.9 and last["eval_loss"] < held_out[0]["eval_loss"]
    assert not (output / "eval_samples.jsonl").exists(), "it is not there to answer"

    # The loaded model scores whole dialogues as the evaluation did, within bfloat16.
    run = run_from(dict(word.split("=") for word in words("RM", **more)))
    encoder = stream(run, "eval").encoder
    whole = [
        encoder.encode(dialogue.messages).token_ids
        for record in preferences(10, salt="about ")
        for dialogue in encoder.dialogues(record, "erniekit")
    ]
    score = reward_model.load(output)
    found = torch.tensor(score(whole)).view(-1, 2)
    margin = float((found[:, 0] - found[:, 1]).mean())
    assert margin == pytest.approx(last["eval_rewards_margin"], rel=0.05)
    assert isinstance(score.model.tokenizer, Tokenizer)
    assert main(["eval", *words("RM", **more)]) == 0
    results = json.loads((output / "eval_results.json").read_text())
    assert results["eval_rewards_margin"] == pytest.approx(last["eval_rewards_margin"], rel=0.05)
    assert results["answers"] == {"num_answers": 0}

    if fine_tuning == "Full":
        entry = json.loads((output / "config.json").read_text())["reward_head"]
        assert (output / entry).is_file()
        assert "score.weight" not in ernie.load(output).state_dict()
    else:  # merged, it is the same reward model
        assert main(["export", *words("RM", **more)]) == 0
        again = torch.tensor(reward_model.load(output / "export")(whole)).view(-1, 2)
        assert float((again - found).abs().max()) < 0.02 * float(found.abs().max())


def test_a_reward_head_is_neither_made_up_nor_named_where_it_is_not(
    words, tiny, tmp_path: Path, capsys
) -> None:
    assert main(["eval", *words("RM")]) == 2
    assert "tiny-dense holds no reward_head/model.safetensors" in capsys.readouterr().err

    model, scored = ernie.load(tiny("tiny-dense"), dtype=None), tmp_path / "scored"
    reward_model.mark(model)
    ernie.save(model, scored)
    for verb in ("eval", "train"):
        assert main([verb, *words("RM", model_name_or_path=scored, fine_tuning="Full")]) == 2
        assert "config.json names a reward head, but" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="names a reward head"):
        reward_model.load(scored)

    # A stage without one leaves it out and says so.
    reward_model.write_head(scored, torch.ones(1, model.config.hidden_size))
    assert main(["eval", *words("RM", model_name_or_path=scored)]) == 0
    more = {"model_name_or_path": scored, "fine_tuning": "Full", "max_steps": 1}
    assert main(["train", *words("KTO", **more)]) == 0
    assert "is left out: stage=KTO does not train it" in capsys.readouterr().out
    assert "reward_head" not in (tmp_path / "out/config.json").read_text()
    assert not reward_model.has_head(tmp_path / "out")


@pytest.mark.parametrize("stage", ["KTO", "RM"])
@pytest.mark.parametrize("fine_tuning", [pytest.param("LoRA", marks=pytest.mark.slow), "Full"])
def test_killed_after_a_save_equals_unbroken(
    stage: str, fine_tuning: str, words, tiny, tmp_path: Path
) -> None:
    name = "tiny-moe" if fine_tuning == "Full" else "tiny-dense"
    more = {
        "fine_tuning": fine_tuning, "model_name_or_path": tiny(name), "save_strategy": "steps",
        "save_steps": 4, "max_steps": 8, "eval_steps": 5, "gradient_accumulation_steps": 2,
        "buffer_size": 7, "dataloader_num_workers": 1, "max_seq_len": 128, "num_answers": 0,
    }  # fmt: skip
    if stage == "KTO":  # with a reference that moves, off the beat of the saves
        more["ref_model_update_steps"] = 3
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert main(["train", *words(stage, output_dir=unbroken, **more)]) == 0
    again = ["train", *words(stage, output_dir=broken, **more)]
    killed("erniekit.optim", "AdamW.step", 7, again)
    assert [step for step, _ in checkpoint.checkpoints(broken)] == [4]
    assert main(again) == 0
    assert curve(broken) == curve(unbroken)
    file = "adapter_model.safetensors" if fine_tuning == "LoRA" else "model.safetensors"
    parts = [file, f"checkpoint-8/{file}", f"checkpoint-8/{checkpoint.OPTIMIZER_FILE}"]
    parts += [reward_model.HEAD_FILE] * (stage == "RM")
    for part in parts:
        ours, theirs = load_file(broken / part), load_file(unbroken / part)
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert (ours[key] == tensor).all(), f"{part}: {key} differs"
    assert main(["resume", "--verify", str(broken), f"checkpoint={broken / 'checkpoint-4'}"]) == 0


def test_a_reference_that_moves_is_the_model_at_its_last_move(words, tmp_path: Path) -> None:
    """Right after a move the policy is the reference: rewards are 0 again, and only there."""
    more = {"ref_model_update_steps": 4, "fine_tuning": "Full", "packing": "false"}
    assert main(["train", *words("KTO", **more)]) == 0
    found = {r["step"]: r for r in records(tmp_path / "out") if r["step"]}
    for step, record in found.items():
        gained = max(abs(record.get(f"rewards_{n}", 0.0)) for n in ("chosen", "rejected"))
        assert (gained < 1e-5) == (step % 4 == 1), f"step {step}: {gained}"


@pytest.fixture
def moving(words):
    """A function from settings to the words of a run whose reference moves every 4 steps."""

    def make(stage: str, **more: object) -> list[str]:
        values = {
            "ref_model_update_steps": 4, "fine_tuning": "Full", "packing": "false",
            "save_strategy": "steps", "save_steps": 20, "num_answers": 0, "max_seq_len": 128,
            "lr_scheduler_type": "constant", "eval_steps": 1,
        }  # fmt: skip
        return ["train", *words(stage, **values | more)]

    return make


@pytest.mark.parametrize("stage", ["KTO", "DPO"])
def test_a_run_that_is_made_longer_equals_one_that_was_so_from_the_start(
    stage: str, moving, tmp_path: Path
) -> None:
    """Made longer within an interval of a reference that has moved, twice in the same one."""
    unbroken, longer = tmp_path / "unbroken", tmp_path / "longer"
    assert main(moving(stage, output_dir=unbroken, max_steps=9)) == 0
    for last in (5, 6, 9):
        assert main(moving(stage, output_dir=longer, max_steps=last)) == 0
    assert curve(longer) == curve(unbroken)
    ours, theirs = (load_file(output / "model.safetensors") for output in (longer, unbroken))
    assert all((ours[key] == tensor).all() for key, tensor in theirs.items())
    states = [
        json.loads((output / "checkpoint-9" / checkpoint.STATE_FILE).read_text())
        for output in (longer, unbroken)
    ]
    assert states[0]["reference"] == states[1]["reference"] != {}


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ({}, {"gradient_accumulation_steps": 2}, "gradient_accumulation_steps 1 -> 2"),
        (
            {"evaluation_strategy": "no"},
            {"evaluation_strategy": "steps"},
            "evaluation_strategy no -> steps",
        ),
    ],
)
def test_what_a_moved_reference_does_not_know_is_refused_until_it_moves(
    before: dict, now: dict, told: str, moving, capsys
) -> None:
    assert main(moving("KTO", stop_after_step=5, **before)) == 0
    capsys.readouterr()
    assert main(moving("KTO", **before | now)) == 2
    error = capsys.readouterr().err
    assert f"({told})" in error and "stop_after_step=8" in error and error.count("\n") == 1
    assert main(moving("KTO", stop_after_step=8, **before)) == 0
    assert main(moving("KTO", **before | now)) == 0


def test_what_changed_of_the_steps_is_named_with_the_next_move(moving) -> None:
    run = run_from(dict(word.split("=") for word in moving("KTO", batch_size=2)[1:]))
    settings = run.flat() | {"batch_size": 1, "ref_model_update_steps": 6}
    state = {"settings": settings, "ranks": 1, "progress": {"step": 13}}
    told = sft._told_of_reference(run, state, 2)
    assert "(batch_size 1 -> 2, ref_model_update_steps 6 -> 4, 1 -> 2 processes)" in told
    assert "step 24 (stop_after_step=24)" in told and "a multiple of 12 steps" in told


def test_a_reference_that_has_moved_goes_on_moving(moving, tmp_path: Path, capsys) -> None:
    assert main(moving("KTO", stop_after_step=5)) == 0
    capsys.readouterr()
    for steps in (-1, 10):
        assert main(moving("KTO", ref_model_update_steps=steps)) == 2
        error = capsys.readouterr().err
        assert f"(ref_model_update_steps 4 -> {steps})" in error and error.count("\n") == 1
        assert ("give ref_model_update_steps=4" in error) == (steps == -1)
        assert ("stop_after_step=20" in error) == (steps == 10)
    # What is known of it lasts to the end of these.
    assert main(moving("KTO", ref_model_update_steps=-1, max_steps=7)) == 0
    assert main(moving("KTO", ref_model_update_steps=7, max_steps=9)) == 0


def test_a_reference_begins_to_move_at_the_next_multiple(moving, tmp_path: Path) -> None:
    """One that has not moved is asked about all steps up to there."""
    more = {"evaluation_strategy": "no", "ref_model_update_steps": -1}
    assert main(moving("KTO", max_steps=5, **more)) == 0
    assert main(moving("KTO", max_steps=9, **more | {"ref_model_update_steps": 4})) == 0
    found = {r["step"]: r for r in records(tmp_path / "out")}
    for step, record in found.items():
        gained = max(abs(record.get(f"rewards_{n}", 0.0)) for n in ("chosen", "rejected"))
        assert (gained < 1e-5) == (step in (1, 9)), f"step {step}: {gained}"


@pytest.mark.parametrize("stage", ["KTO", "RM"])
def test_data_and_plan_know_the_stage(stage: str, words, tmp_path: Path, capsys) -> None:
    assert main(["data", *words(stage)]) == 0
    assert main(["data", *words(stage), "show=1"]) == 0
    told = capsys.readouterr().out
    assert (", desirable: " if stage == "KTO" else ", chosen: ") in told
    ledger = json.loads((tmp_path / "out/data/ledger.json").read_text())
    assert ledger["train"]["all"]["num_unusable"] == 0
    assert main(["plan", *words(stage)]) == 0
    told = capsys.readouterr().out
    assert ("the reference model reads every answer" in told) == (stage == "KTO")


def test_keys_of_another_stage_are_told_to_be_without_effect(words, capsys) -> None:
    run = run_from(dict(word.split("=") for word in words("RM", beta=0.3, max_prompt_len=64)))
    assert run.without_effect == ("beta",)
    run = run_from(dict(word.split("=") for word in words("KTO", simpo_gamma=1, loss_type="ipo")))
    assert set(run.without_effect) == {"simpo_gamma", "loss_type"}
