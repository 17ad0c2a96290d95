"""`stage: UPO` on two ranks is the run of one process that accumulates: answers, rewards, steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ernie.settings import ConfigError
from erniekit import checkpoint
from erniekit.cli import main
from erniekit.config import run_from
from erniekit.parallel.ranks import Ranks
from erniekit.recipes import upo
from tests.erniekit.conftest import dialogues, preferences, write_lines
from tests.erniekit.test_parallel import assert_alike, saved, weights_in
from tests.erniekit.test_run import records
from tests.erniekit.test_upo_run import FUNCTION
from tests.helpers_train_ranks import ranks_train

STEPS = 8  # two rounds, of which each rank answers 3 or 2 prompts
KINDS = {
    "full": (
        "tiny-dense",
        {
            "fine_tuning": "Full",
            "sharding": "stage1",
            "upo_mu": 0.5,
            "rollout_correction": "icepop",
        },
    ),
    "lora": (
        "tiny-moe",
        {"fine_tuning": "LoRA", "policy_loss": "gspo", "dynamic_sampling": True, "kl_coef": 0.05},
    ),
    # So few answers differ by so much that one rank has a pair in a step, and the other has none.
    "few": ("tiny-dense", {"fine_tuning": "LoRA", "pair_min_gap": 0.25, "kl_coef": 0.05}),
}


@pytest.fixture(scope="module")
def words(tiny, tmp_path_factory):
    """A function from a kind and an output folder to the words of its run on one process."""
    folder = tmp_path_factory.mktemp("upo")
    write_lines(folder / "train.jsonl", dialogues(30))
    write_lines(folder / "eval.jsonl", dialogues(5, salt="about "))
    write_lines(folder / "pairs.jsonl", preferences(20))
    (folder / "mine.py").write_text(FUNCTION)

    def make(kind: str, output: Path, **more: object) -> list[str]:
        name, settings = KINDS[kind]
        values = {
            "stage": "UPO",
            "model_name_or_path": tiny(name),
            "train_dataset_path": folder / "train.jsonl",
            "eval_dataset_path": folder / "eval.jsonl",
            "reward": f"{folder}/mine.py:vowels",
            "max_seq_len": 128,
            "max_completion_length": 8,
            "prompts_per_round": 5,
            "num_generations": 4,
            "num_iterations": 2,
            "num_mini_batches": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": STEPS,
            "save_steps": STEPS,
            "evaluation_strategy": "steps",
            "eval_steps": STEPS,
            "num_answers": 0,
            "learning_rate": 5e-3,
            "lr_scheduler_type": "constant",
            "amp_master_grad": True,
            "use_lowprecision_moment": False,
            "adam_epsilon": 1e-3,
            **({"pair_dataset_path": folder / "pairs.jsonl"} if kind == "full" else {}),
            **settings,
            **more,
            "output_dir": output,
        }
        return [f"{key}={value}" for key, value in values.items()]

    return make


@pytest.fixture(scope="module")
def runs(words, tmp_path_factory) -> Path:
    """Results of one process and of two, `<kind>-two`; `full-cut` is of two, stopped in a round."""
    root = tmp_path_factory.mktemp("runs")
    for kind in KINDS:
        assert main(["train", *words(kind, root / kind)]) == 0
    halved = {"gradient_accumulation_steps": 1}
    entries = [words(kind, root / f"{kind}-two", **halved) for kind in KINDS]
    entries.append(words("full", root / "full-cut", **halved, stop_after_step=3))
    ranks_train(2, [{"words": entry} for entry in entries], root)
    return root


def rollouts(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "rollouts.jsonl").open()]


def assert_same_run(ours: Path, theirs: Path) -> None:
    assert rollouts(ours) == rollouts(theirs)
    exact = ("step", "reward", "right", "length", "dropped_share", "num_tokens", "eval_reward")
    near = ("loss", "grad_norm", "policy_loss", "kl", "pair_loss", "clip_share", "entropy")
    for a, b in zip(records(ours), records(theirs), strict=True):
        assert a.keys() == b.keys()
        for key in exact:
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=1e-12), key
        for key in near:
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), rel=1e-4, abs=1e-6), key


@pytest.mark.ranks
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_equal_one_process(kind: str, runs: Path) -> None:
    ours, theirs = runs / f"{kind}-two", runs / kind
    assert len(rollouts(theirs)) >= 10 and records(theirs)[-1]["kl"] > 0
    assert_same_run(ours, theirs)
    assert_alike(saved(ours, STEPS), saved(theirs, STEPS), bound=1e-4)


@pytest.mark.ranks
def test_a_round_goes_on_in_two_ranks_and_in_one(runs: Path, words, tmp_path: Path) -> None:
    """From a checkpoint within it: what two ranks have drawn, either number of them trains on."""
    cut = runs / "full-cut"
    assert [step for step, _ in checkpoint.checkpoints(cut)] == [3]
    assert (cut / "checkpoint-3" / checkpoint.BATCHES_FILE).is_file()
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        shutil.copytree(cut, folder)
    assert main(["train", *words("full", one)]) == 0
    entry = {"words": words("full", two, gradient_accumulation_steps=1)}
    ranks_train(2, [entry], tmp_path)
    for folder in (one, two):
        assert_same_run(folder, runs / "full")
    ours, theirs = (
        weights_in(two / f"checkpoint-{STEPS}"),
        weights_in(runs / f"full-two/checkpoint-{STEPS}"),
    )
    assert ours and all((ours[name] == tensor).all() for name, tensor in theirs.items())


@pytest.mark.ranks
def test_a_round_that_was_cut_otherwise_is_not_mixed_up(
    runs: Path, words, tmp_path: Path, capsys
) -> None:
    shutil.copytree(runs / "full-cut", tmp_path / "out")
    again = words("full", tmp_path / "out", gradient_accumulation_steps=1)
    assert main(["train", *again]) == 2
    told = capsys.readouterr().err
    assert "within a round whose steps have 2 batches; this run's have 1" in told


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"sharding": "stage3"}, "sharding=stage3 cuts the weights"),
        ({"prompts_per_round": 3, "num_mini_batches": 2}, "cannot be cut into 4 batches"),
    ],
)
def test_what_does_not_go_with_two_ranks_is_refused(settings: dict, told: str, monkeypatch) -> None:
    monkeypatch.setattr(Ranks, "shards", 2)
    run = run_from({"stage": "UPO", "model_name_or_path": "x", "reward": "exact", **settings})
    with pytest.raises(ConfigError, match=told):
        upo.check_ranks(run, Ranks(0, 2))
