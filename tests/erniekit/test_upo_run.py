"""`stage: UPO` through the commands: learning, files of pairs, curriculum, resuming, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from ernie.chat import LOCK_FILE
from ernie.rollout import Answer
from ernie.settings import read_yaml
from erniekit import checkpoint, rounds
from erniekit.cli import main
from erniekit.recipes import upo
from erniekit.rounds import phase_of
from erniekit.samplers import Own
from tests.erniekit.conftest import dialogues, preferences, write_lines
from tests.erniekit.test_run import records
from tests.helpers_faults import killed

FUNCTION = """
def vowels(record, answer):
    return sum(c in "aeiou" for c in answer) / max(len(answer), 1)
"""


@pytest.fixture
def words(tiny, tmp_path: Path):
    """A function from settings to the words of a short run, rewarded for vowels."""
    write_lines(tmp_path / "train.jsonl", dialogues(30))
    write_lines(tmp_path / "eval.jsonl", dialogues(6, salt="about "))
    write_lines(tmp_path / "pairs.jsonl", preferences(20))
    (tmp_path / "mine.py").write_text(FUNCTION)

    def make(**more: object) -> list[str]:
        values = {
            "stage": "UPO",
            "model_name_or_path": tiny("tiny-dense"),
            "train_dataset_path": tmp_path / "train.jsonl",
            "eval_dataset_path": tmp_path / "eval.jsonl",
            "output_dir": tmp_path / "out",
            "reward": f"{tmp_path}/mine.py:vowels",
            "max_seq_len": 128,
            "max_completion_length": 8,
            "prompts_per_round": 4,
            "num_generations": 6,
            "max_steps": 6,
            "learning_rate": 5e-3,
            "fine_tuning": "Full",
            "save_strategy": "no",
        } | more
        return [f"{key}={value}" for key, value in values.items()]

    return make


def test_a_reward_that_fails_costs_no_step_that_was_done(words, tmp_path: Path, capsys) -> None:
    text = "calls = []\ndef once(record, answer):\n    calls.append(1)\n"
    text += "    assert len(calls) < 40, 'out of order'\n    return len(calls) % 3\n"
    (tmp_path / "mine.py").write_text(text)
    more = {"reward": f"{tmp_path}/mine.py:once", "save_strategy": "steps", "save_steps": 500}
    assert main(["train", *words(**more)]) == 2
    assert "out of order" in capsys.readouterr().err
    steps = records(tmp_path / "out")[-1]["step"]
    assert [step for step, _ in checkpoint.checkpoints(tmp_path / "out")] == [steps] != [0]


def test_prompts_that_are_left_out_of_an_evaluation_are_counted(words, tmp_path: Path) -> None:
    long = {"src": ["What is it? " * 60], "tgt": ["It."]}
    write_lines(tmp_path / "eval.jsonl", [*dialogues(6, salt="about "), long])
    assert main(["eval", *words(max_bad_data_share=0.5)]) == 0
    told = json.loads((tmp_path / "out/eval_results.json").read_text())
    assert (told["num_left_out"], told["eval_prompts"]) == (1, 6)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("tiny-dense", {}),
        ("tiny-moe", {"policy_loss": "gspo"}),
        ("tiny-dense", {"policy_loss": "none", "upo_mu": 1.0}),
    ],
)
def test_training_raises_the_reward(name, more, words, tiny, tmp_path: Path, capsys) -> None:
    more = {"model_name_or_path": tiny(name), "max_steps": 24, "learning_rate": 1e-2} | more
    assert main(["train", *words(evaluation_strategy="steps", eval_steps=12, **more)]) == 0
    found = records(tmp_path / "out")
    rewards = [r["reward"] for r in found if "reward" in r]
    before, after = sum(rewards[:4]) / 4, sum(rewards[-4:]) / 4
    assert after > before + 0.1, f"{before} -> {after}: {rewards}"
    first, *rest = (r for r in found if "eval_reward" in r)
    assert [r["step"] for r in (first, *rest)] == [0, 12, 24] and first["eval_prompts"] == 6
    # The first step is by the model before training: nothing has diverged.
    assert abs(found[1]["kl"]) < 1e-6
    assert found[-1]["kl"] > 0.001
    assert all(("moe_entropy" in r) == (name == "tiny-moe") for r in found if "kl" in r)
    told = capsys.readouterr().out
    assert "| reward " in told and "eval at step 24 | reward" in told
    page = (tmp_path / "out/report.html").read_text()
    for shown in ("UPO", "Reward", "Entropy", "What is about"):
        assert shown in page
    rollouts = [json.loads(line) for line in (tmp_path / "out/rollouts.jsonl").open()]
    assert len(rollouts) == 24 * 4 and all(len(r["answers"]) == 6 for r in rollouts)
    assert abs(_held_out_reward(tmp_path / "out") - rest[-1]["eval_reward"]) < 1e-12
    assert main(["eval", *words(**more)]) == 0
    results = json.loads((tmp_path / "out/eval_results.json").read_text())
    assert abs(_held_out_reward(tmp_path / "out") - results["eval_reward"]) < 1e-12
    assert abs(results["eval_reward"] - rest[-1]["eval_reward"]) < 0.2  # rounded to bfloat16


def _held_out_reward(output: Path) -> float:
    """By the answers that the newest evaluation left; 6 prompts are asked."""
    found = [json.loads(line) for line in (output / "held_out.jsonl").open()]
    assert len({r["where"] for r in found}) == len(found) == 6
    return sum(r["rewards"][0] for r in found) / 6


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
def test_adapters_answer_as_they_stand(name, words, tiny, tmp_path: Path) -> None:
    """With one step a round answers are of the policy itself: no ratio leaves a narrow clip."""
    more = {
        "fine_tuning": "LoRA", "model_name_or_path": tiny(name), "clip_low": 1e-3,
        "clip_high": 1e-3, "learning_rate": 2e-2,
    }  # fmt: skip
    assert main(["train", *words(**more)]) == 0
    found = records(tmp_path / "out")
    assert [r["clip_share"] for r in found] == [0] * 6
    assert found[0]["kl"] < 1e-6 and found[-1]["kl"] > 0.01


@pytest.mark.parametrize("compute_type", ["bf16", "wint8", "wint4/8", "nf4"])
def test_the_reference_of_lora_is_its_base(compute_type, words, monkeypatch, capsys) -> None:
    """No second model is held, whatever the bits of the base; but answers may be drawn from one."""
    monkeypatch.setattr(rounds, "read_model", lambda *_: pytest.fail("a second model was read"))
    more = {"fine_tuning": "LoRA", "compute_type": compute_type, "learning_rate": 2e-2}
    assert main(["train", *words(**more)]) == 0
    assert main(["plan", *words(**more)]) == 0
    assert ("other models" in capsys.readouterr().out) == (compute_type == "bf16")


@pytest.mark.parametrize("fine_tuning", ["Full", "LoRA"])
def test_killed_within_a_round_equals_unbroken(fine_tuning: str, words, tmp_path: Path) -> None:
    more = {
        "fine_tuning": fine_tuning, "save_strategy": "steps", "save_steps": 3, "max_steps": 9,
        "num_iterations": 2, "num_mini_batches": 2, "gradient_accumulation_steps": 2,
        "pair_dataset_path": tmp_path / "pairs.jsonl",
    }  # fmt: skip
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert main(["train", *words(output_dir=unbroken, **more)]) == 0
    again = ["train", *words(output_dir=broken, **more)]
    killed("erniekit.optim", "AdamW.step", 5, again)
    assert [step for step, _ in checkpoint.checkpoints(broken)] == [3]
    killed("erniekit.optim", "AdamW.step", 5, again)  # steps 4 to 7, after a checkpoint of 6
    assert [step for step, _ in checkpoint.checkpoints(broken)] == [3, 6]
    assert main(again) == 0
    timed = {"seconds", "tokens_per_second", "peak_memory_gib"}
    curves = [
        [{k: v for k, v in r.items() if k not in timed} for r in records(output)]
        for output in (broken, unbroken)
    ]
    assert curves[0] == curves[1]
    texts = [(output / "rollouts.jsonl").read_text() for output in (broken, unbroken)]
    assert texts[0] == texts[1] and len(texts[0].splitlines()) == 3 * 4
    file = "adapter_model.safetensors" if fine_tuning == "LoRA" else "model.safetensors"
    ours, theirs = load_file(broken / file), load_file(unbroken / file)
    assert all((ours[key] == tensor).all() for key, tensor in theirs.items())
    assert (unbroken / "checkpoint-9" / checkpoint.BATCHES_FILE).is_file()


def test_what_a_round_was_not_made_for_waits_for_the_next(words, tmp_path: Path, capsys) -> None:
    more = {"num_iterations": 2, "num_mini_batches": 2, "save_strategy": "steps"}
    more |= {"kl_coef": 0, "upo_mu": 0}
    assert main(["train", *words(stop_after_step=2, **more)]) == 0
    capsys.readouterr()
    for key, was, value in (
        ("kl_coef", 0.0, 0.5), ("upo_mu", 0.0, 0.5), ("advantage_std", True, False),
        ("loss_aggregation", None, "sequence"), ("rollout_correction", "none", "truncated"),
    ):  # fmt: skip
        assert main(["train", *words(**more | {key: value})]) == 2
        error = capsys.readouterr().err
        assert f"for other settings ({key} {was} -> {value})" in error
        assert "stop_after_step=4" in error and error.count("\n") == 1
    assert main(["train", *words(stop_after_step=4, **more)]) == 0
    assert main(["train", *words(**more | {"kl_coef": 0.5, "upo_mu": 0.5})]) == 0
    last = records(tmp_path / "out")[-1]
    assert last["step"] == 6 and 0 < last["pair_loss"] < 2 and last["kl"] < 1


def test_settings_that_leave_the_batches_of_a_round_as_they_are_may_change(words) -> None:
    more = {"num_iterations": 2, "num_mini_batches": 2, "save_strategy": "steps"}
    assert main(["train", *words(stop_after_step=2, kl_coef=0.1, **more)]) == 0
    less = {"kl_coef": 0.2, "upo_mu": 0, "clip_low": 0.1, "correction_low": 0.9}
    assert main(["train", *words(**more | less)]) == 0


@pytest.mark.parametrize(("fine_tuning", "within"), [("Full", 1e-4), ("LoRA", 0.05)])
def test_a_reward_model_scores_answers_as_its_own_evaluation_does(
    fine_tuning: str, within: float, words, tmp_path: Path, monkeypatch, capsys
) -> None:
    """However an answer ended: at eos, at the end of its template, or at the length limit. An
    adapter is merged, and rounded to bfloat16.
    """
    texts = ["It is 3.", "Well, now. It is one and 3. I hope so."]
    judged = {"src": ["What is 3?"], "tgt": [], "response": texts, "sort": [1, 0]}
    write_lines(tmp_path / "judged.jsonl", [judged])
    write_lines(tmp_path / "asked.jsonl", [{"src": ["What is 3?"], "tgt": texts[:1]}])
    trained = {"stage": "RM", "fine_tuning": fine_tuning, "output_dir": tmp_path / "rm"}
    files = {f"{kind}_dataset_path": tmp_path / "pairs.jsonl" for kind in ("train", "eval")}
    assert main(["train", *words(**trained, **files)]) == 0
    files["eval_dataset_path"] = tmp_path / "judged.jsonl"
    assert main(["eval", *words(**trained, **files)]) == 0
    told = json.loads((tmp_path / "rm/eval_results.json").read_text())
    wanted = [told["eval_rewards_chosen"], told["eval_rewards_rejected"]]
    assert abs(wanted[0] - wanted[1]) > 0.1, "answers of one reward show nothing"

    class Scripted(Own):
        def __call__(self, model, prompts, seeds, sampling):
            tokenizer = model.tokenizer
            ends = [tokenizer.eos_id], [tokenizer.id_of("<|end_of_sentence|>")], []
            drawn = [(tokenizer.encode(text) + end, not end) for text in texts for end in ends]
            answers = [Answer(ids, [-1.0] * len(ids), is_cut) for ids, is_cut in drawn]
            return [answers[: len(own)] for own in seeds]

    monkeypatch.setattr(upo, "Own", Scripted)
    more = {"reward": "model", "reward_model": tmp_path / "rm", "prompts_per_round": 1}
    asked = {"train_dataset_path": tmp_path / "asked.jsonl", "max_steps": 1}
    assert main(["train", *words(**more, **asked)]) == 0
    [line] = (tmp_path / "out/rollouts.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert found["answers"] == [text for text in texts for _ in range(3)]
    expected = [reward for reward in wanted for _ in range(3)]
    assert found["rewards"] == pytest.approx(expected, abs=within)

    other = "as the policy writes them, and its chat template was 0123 when it was trained"
    told = capsys.readouterr()
    assert "as the policy writes them" not in told.out + told.err
    lock = tmp_path / "rm" / LOCK_FILE
    lock.write_text(json.dumps(json.loads(lock.read_text()) | {"template": "0123"}))
    assert main(["train", *words(**more, **asked, overwrite_output_dir=True)]) == 0
    told = capsys.readouterr()
    assert other in told.out + told.err


def test_prompts_without_a_difference_are_left_out_and_counted(words, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def vowels(record, answer):\n    return 1.0\n")
    assert main(["train", *words(max_steps=2, max_refills=1, kl_coef=0, upo_mu=0)]) == 0
    for record in records(tmp_path / "out"):
        assert record["dropped_share"] == 1 and record["right"] == 1
        assert record["loss"] == 0 and record["grad_norm"] == 0 and "kl" not in record
    rollouts = [json.loads(line) for line in (tmp_path / "out/rollouts.jsonl").open()]
    assert len(rollouts) == 2 * 2 * 4 and not any(r["is_kept"] for r in rollouts)


@pytest.mark.parametrize("mu", [0, 1])
def test_prompts_with_too_small_a_difference_teach_nothing(mu: int, words, tmp_path: Path) -> None:
    """Nor do their pairs, where a round has no others and a step must hold something."""
    more = {"max_steps": 1, "min_reward_std": 10, "kl_coef": 0, "upo_mu": mu}
    assert main(["train", *words(**more)]) == 0
    [record] = records(tmp_path / "out")
    assert record["dropped_share"] == 1
    assert record["grad_norm"] == 0 and record["policy_loss"] == 0
    rollouts = [json.loads(line) for line in (tmp_path / "out/rollouts.jsonl").open()]
    assert any(len(set(r["rewards"])) > 1 for r in rollouts)


def test_records_that_no_rule_can_judge_are_left_out_and_told_of(
    words, tmp_path: Path, capsys
) -> None:
    good = [{"src": [f"{i} + 1?"], "tgt": [str(i + 1)]} for i in range(9)]
    bad = {"src": ["One and one?"], "tgt": ["Two."]}
    write_lines(tmp_path / "train.jsonl", [*good, bad])
    more = {"reward": "number", "max_bad_data_share": 0.2}
    told = "train.jsonl:10: reward=number, and its answer has no number; that is 'Two.'"
    assert main(["train", *words(max_steps=3, **more)]) == 0
    seen = capsys.readouterr()
    assert told in seen.out + seen.err
    rollouts = [json.loads(line) for line in (tmp_path / "out/rollouts.jsonl").open()]
    assert len(rollouts) == 12 and all(r["question"] != bad["src"][0] for r in rollouts)
    assert main(["data", *words(**more)]) == 0
    seen = capsys.readouterr()
    assert told in seen.out + seen.err
    assert main(["data", *words(reward="number", max_bad_data_share=0)]) == 2


def test_normalised_rewards_divide_by_the_deviation_of_all_answers(words, tmp_path: Path) -> None:
    """Of those to prompts that are left out too: here prompts of an even number, all worth 5."""
    text = FUNCTION.replace(
        "    return ", "    if record['answer'][-2] in '02468':\n        return 5.0\n    return "
    )
    (tmp_path / "mine.py").write_text(text)
    found = {}
    for is_scaled in (False, True):
        more = {"normalize_rewards": is_scaled, "output_dir": tmp_path / str(is_scaled)}
        more |= {"advantage_std": False, "kl_coef": 0, "upo_mu": 0, "max_steps": 1}
        assert main(["train", *words(prompts_per_round=8, amp_master_grad=True, **more)]) == 0
        [found[is_scaled]] = records(tmp_path / str(is_scaled))
    lines = (tmp_path / "True/rollouts.jsonl").read_text().splitlines()
    rewards = np.array([json.loads(line)["rewards"] for line in lines])
    assert 0 < found[True]["dropped_share"] < 1 and rewards.std() > 2
    wanted = found[False]["grad_norm"] / rewards.std()
    assert found[True]["grad_norm"] == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(("loss", "usual"), [("gspo", "sequence"), ("ppo", "token")])
def test_answers_of_gspo_count_alike_and_tokens_of_ppo(
    loss: str, usual: str, words, tmp_path: Path, monkeypatch
) -> None:
    class Shorter(Own):
        def __call__(self, *arguments):
            for answers in (found := super().__call__(*arguments)):
                for length, answer in enumerate(answers, 1):
                    del answer.token_ids[length:], answer.log_probs[length:]
            return found

    monkeypatch.setattr(upo, "Own", Shorter)
    norms = {}
    for name in ("none", "sequence", "token"):
        more = {"policy_loss": loss, "upo_mu": 0, "kl_coef": 0, "loss_aggregation": name}
        assert main(["train", *words(**more, max_steps=1, output_dir=tmp_path / name)]) == 0
        [record] = records(tmp_path / name)
        norms[name] = record["grad_norm"]
    other = "token" if usual == "sequence" else "sequence"
    assert norms["none"] == norms[usual] != pytest.approx(norms[other], rel=1e-2), norms


def test_a_correction_of_our_own_generator_changes_next_to_nothing(words, tmp_path: Path) -> None:
    curves = []
    for correction in ("none", "icepop"):
        more = {"rollout_correction": correction, "output_dir": tmp_path / correction}
        assert main(["train", *words(max_steps=3, **more)]) == 0
        curves.append([r["grad_norm"] for r in records(tmp_path / correction)])
    assert curves[0] == pytest.approx(curves[1], rel=1e-2)


def test_a_curriculum_takes_one_file_after_another(words, tmp_path: Path) -> None:
    assert [phase_of(step, 10, (0.2, 0.5, 0.3)) for step in range(10)] == [0] * 2 + [1] * 5 + [
        2
    ] * 3
    write_lines(tmp_path / "hard.jsonl", dialogues(30, salt="hard "))
    files = f"{tmp_path}/train.jsonl,{tmp_path}/hard.jsonl"
    more = {
        "train_dataset_path": files, "train_dataset_type": "erniekit,erniekit",
        "train_dataset_prob": "1,1", "curriculum_shares": "1,2",
    }  # fmt: skip
    assert main(["train", *words(max_steps=3, **more)]) == 0
    rollouts = [json.loads(line) for line in (tmp_path / "out/rollouts.jsonl").open()]
    assert ["hard" in r["question"] for r in rollouts] == [False] * 4 + [True] * 8


def test_a_phase_of_a_curriculum_may_mix_files(words, tmp_path: Path) -> None:
    """By their weights; a file of one phase is not met in another."""
    names = ("logic", "maths", "code", "rest")
    for name in names:
        write_lines(tmp_path / f"{name}.jsonl", dialogues(30, salt=f"{name} "))
    more = {
        "train_dataset_path": ",".join(str(tmp_path / f"{name}.jsonl") for name in names),
        "train_dataset_type": ",".join(["erniekit"] * 4), "train_dataset_prob": "0,3,1,0",
        "curriculum_files": "1,2,1", "curriculum_shares": "1,2,1",
    }  # fmt: skip
    assert (
        main(["train", *words(max_steps=4, prompts_per_round=16, num_generations=2, **more)]) == 0
    )
    rollouts = [json.loads(line) for line in (tmp_path / "out/rollouts.jsonl").open()]
    found = [[name for name in names if name in r["question"]] for r in rollouts]
    assert found[:16] == [["logic"]] * 16 and found[48:] == [["rest"]] * 16
    middle = [name for [name] in found[16:48]]
    assert set(middle) == {"maths", "code"} and middle.count("maths") > middle.count("code")


def test_without_max_steps_every_prompt_is_asked_once(words, tmp_path: Path) -> None:
    assert main(["train", *words(max_steps=-1, num_mini_batches=2, prompts_per_round=10)]) == 0
    assert [r["step"] for r in records(tmp_path / "out")] == list(range(1, 7))
    rollouts = [json.loads(line) for line in (tmp_path / "out/rollouts.jsonl").open()]
    assert len({r["where"] for r in rollouts}) == len(rollouts) == 30


def test_more_epochs_are_more_steps(words, tmp_path: Path, capsys) -> None:
    more = {"max_steps": -1, "prompts_per_round": 10, "save_strategy": "steps"}
    assert main(["train", *words(**more)]) == 0
    assert read_yaml(tmp_path / "out/run.yaml")["max_steps"] == -1
    assert main(["resume", str(tmp_path / "out")]) == 0
    assert "all 3 steps are done" in capsys.readouterr().out
    assert main(["resume", str(tmp_path / "out"), "num_train_epochs=2"]) == 0
    assert [r["step"] for r in records(tmp_path / "out")] == list(range(1, 7))
    assert main(["resume", "--verify", str(tmp_path / "out"), "checkpoint=checkpoint-3"]) == 0


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"num_generations": 1}, "num_generations=1 is too small"),
        ({"normalize_rewards": True}, "no effect with advantage_std=True"),
        ({"policy_loss": "none", "upo_mu": 0}, "leave nothing to train"),
        ({"prompts_per_round": 2, "num_mini_batches": 3}, "cannot be cut into 3 batches"),
        ({"max_completion_length": 128}, "leaves no room for a prompt"),
        ({"reward": "exact,format"}, "one weight for each reward"),
        ({"curriculum_shares": "1,1"}, "for each of the 1 training files"),
        ({"curriculum_shares": "1", "curriculum_files": "2"}, "each of the 1 training files once"),
        ({"curriculum_shares": "1,1", "curriculum_files": "1"}, "1 phases of curriculum_files"),
        ({"rollout_server": "http://127.0.0.1:9"}, "no server answers at rollout_server"),
        ({"reward": "model", "reward_model": "somewhere"}, "somewhere"),
    ],
)
def test_settings_that_make_no_sense_are_refused(more, told, words, capsys) -> None:
    assert main(["train", *words(**more)]) == 2
    assert told in capsys.readouterr().err


def test_a_plan_says_what_a_round_takes(words, capsys) -> None:
    assert main(["plan", *words()]) == 0
    told = capsys.readouterr().out
    assert "a round draws 4 x 6 answers of at most 8 tokens" in told
    assert "other models" in told  # the reference


def test_the_data_of_tasks_is_gone_through_like_a_file(words, capsys) -> None:
    spec = "chain_sum?size=4&seed=3&max_terms=2&max_digits=1"
    more = {"train_dataset_type": "reasoning_gym", "train_dataset_path": spec}
    assert main(["data", *words(**more)]) == 0
    assert "chain_sum?size=4" in capsys.readouterr().out
    assert main(["train", *words(stage="SFT", max_steps=1, max_seq_len=256, **more)]) == 0


@pytest.mark.parametrize("stage", ["UPO", "SFT"])
def test_rows_are_told_to_be_full_where_they_are_filled(stage, words, tmp_path, capsys) -> None:
    assert main(["train", *words(stage=stage, max_steps=1)]) == 0
    values = json.loads((tmp_path / "out/plan_error.json").read_text())
    told = capsys.readouterr()
    has_rows = ["row_fill" in values, "% full)" in told.out + told.err]
    assert has_rows == [stage == "SFT"] * 2


def test_held_out_prompts_that_are_trained_on_are_told_of(words, tmp_path: Path, capsys) -> None:
    mixed = [*dialogues(4), *dialogues(3, salt="about ")]
    write_lines(tmp_path / "mixed.jsonl", mixed)
    assert main(["train", *words(max_steps=1, eval_dataset_path=tmp_path / "mixed.jsonl")]) == 0
    told = capsys.readouterr()
    assert "4 of 7 evaluation prompts are also in the training data" in told.out + told.err
    assert main(["train", *words(max_steps=1, output_dir=tmp_path / "other")]) == 0
    told = capsys.readouterr()
    assert "also in the training data" not in told.out + told.err
