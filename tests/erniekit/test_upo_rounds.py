"""What a round of `stage: UPO` makes of its answers, its files and its settings, in numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

import ernie
from ernie.model import ErnieModel
from ernie.rollout import Sampling
from erniekit.cli import main
from erniekit.config import Run, resolved, run_from
from erniekit.data.batch import Batch
from erniekit.data.stream import stream
from erniekit.device_batch import Pairs, to_device
from erniekit.evaluate import eval_batches
from erniekit.groups import Cut
from erniekit.loop import Progress
from erniekit.preference import sequence_log_probs
from erniekit.recipes import upo
from erniekit.rounds import Rounds, sampling_of
from tests.erniekit.conftest import dialogues, preferences, write_lines
from tests.erniekit.test_run import records

# What an answer is worth: its vowels, and a hundred times that where the question is hard.
FUNCTION = """
def vowels(record, answer):
    worth = 100 if "hard" in record["messages"][-1]["content"] else 1
    return worth * sum(c in "aeiou" for c in answer) / max(len(answer), 1)
"""


@pytest.fixture
def settings(tiny, tmp_path: Path):
    """A function from settings to those of a run whose rounds ask questions of two files."""
    write_lines(tmp_path / "easy.jsonl", dialogues(8))
    write_lines(tmp_path / "hard.jsonl", dialogues(8, salt="hard "))
    write_lines(tmp_path / "pairs.jsonl", preferences(4))
    (tmp_path / "mine.py").write_text(FUNCTION)

    def make(**more: object) -> dict[str, str]:
        values = {
            "stage": "UPO",
            "model_name_or_path": tiny("tiny-dense"),
            "train_dataset_path": f"{tmp_path}/easy.jsonl,{tmp_path}/hard.jsonl",
            "train_dataset_type": "erniekit,erniekit",
            "train_dataset_prob": "1,1",
            "output_dir": tmp_path / "out",
            "reward": f"{tmp_path}/mine.py:vowels",
            "max_seq_len": 128,
            "max_completion_length": 8,
            "prompts_per_round": 8,
            "num_generations": 4,
            "max_steps": 2,
            "learning_rate": 5e-3,
            "fine_tuning": "Full",
            "save_strategy": "no",
        } | more
        return {key: str(value) for key, value in values.items()}

    return make


def rounds_of(run: Run) -> Rounds:
    source = upo.method(run, "cpu").source
    assert isinstance(source, Rounds)
    return source


def first_batch(run: Run, model: ErnieModel) -> tuple[Batch, list[dict]]:
    """Of a run whose rounds are one batch, by such a model; and what is told of its prompts."""
    run.output.mkdir()
    batch = next(rounds_of(run).batches(model, Progress(), 1))
    return batch, [json.loads(line) for line in (run.output / "rollouts.jsonl").open()]


def model_of(run: Run) -> ErnieModel:
    return ernie.load(run.model.model_name_or_path, dtype=torch.float32)


def advantages_of(batch: Batch) -> np.ndarray:
    """`(A,)`: every token of an answer has that of the answer."""
    _, first = np.unique(batch.numbers["answer_N"], return_index=True)
    return batch.numbers["advantage_N"][first]


@pytest.mark.parametrize("is_normalised", [False, True])
def test_rewards_are_normalised_within_each_file(is_normalised: bool, settings) -> None:
    more = {"advantage_std": False, "dynamic_sampling": False, "upo_mu": 0, "kl_coef": 0}
    run = resolved(run_from(settings(normalize_rewards=is_normalised, **more)), "cpu")
    batch, told = first_batch(run, model_of(run))
    wanted = []
    for name in ("easy", "hard"):
        rewards_PG = np.array([r["rewards"] for r in told if f"{name}.jsonl" in r["where"]])
        assert len(rewards_PG) > 1 and rewards_PG.std() > 0
        scaled_PG = rewards_PG / (rewards_PG.std() if is_normalised else 1)
        wanted += [*(scaled_PG - scaled_PG.mean(1, keepdims=True)).flatten()]
    found = sorted(advantages_of(batch).tolist())
    assert found == pytest.approx(sorted(wanted), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("share", [0, 0.4, 0.8])
def test_pairs_are_of_groups_whose_rewards_are_further_apart(share: float, settings) -> None:
    """Than those of such a share of the groups: the best answer of each, and its worst."""
    more = {"advantage_std": False, "dynamic_sampling": False, "num_generations": 3}
    run = resolved(run_from(settings(**more)), "cpu")
    model = model_of(run)
    _, told = first_batch(run, model)
    gaps = sorted(max(r["rewards"]) - min(r["rewards"]) for r in told)
    least = gaps[int(share * len(gaps))]
    again = settings(**more, pair_min_gap=least, output_dir=f"{run.output}-again")
    batch, _ = first_batch(resolved(run_from(again), "cpu"), model)
    ends_Q2 = advantages_of(batch)[batch.numbers["pairs_Q2"]]  # less the mean of their group
    wanted = [gap for gap in gaps if gap > least]
    assert 0 < len(wanted) < len(gaps)
    assert sorted(ends_Q2[:, 0] - ends_Q2[:, 1]) == pytest.approx(wanted, rel=1e-4)


# --- pairs of a file ---

OF_PAIRS = {"policy_loss": "none", "kl_coef": 0, "upo_mu": 1, "prompts_per_round": 4}


@pytest.mark.parametrize("start", ["Full", "LoRA", "LoRA, from an adapter"])
def test_pairs_of_a_file_are_held_against_the_model_before_training(
    start: str, settings, tmp_path: Path
) -> None:
    more = OF_PAIRS | {"pair_dataset_path": tmp_path / "pairs.jsonl", "fine_tuning": start[:4]}
    if "adapter" in start:
        before = settings(**more, output_dir=tmp_path / "before")
        assert main(["train", *(f"{key}={value}" for key, value in before.items())]) == 0
        more["lora_path"] = tmp_path / "before"
    words = [f"{key}={value}" for key, value in settings(**more).items()]
    assert main(["train", *words]) == 0
    first, second = records(tmp_path / "out")
    assert first["pair_loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert first["pair_margin"] == pytest.approx(0, abs=1e-5)
    assert abs(second["pair_margin"]) > 1e-3, second


def test_pairs_of_a_file_are_compared_as_dpo_compares_them(settings, tmp_path: Path) -> None:
    """A round by one model, and its loss by another: the first is the reference."""
    pairs = tmp_path / "pairs.jsonl"
    more = OF_PAIRS | {"pair_dataset_path": pairs, "beta": 0.4, "upo_mu": 0.5}
    run = resolved(run_from(settings(**more)), "cpu")
    reference, model = model_of(run), model_of(run)
    batch, _ = first_batch(run, reference)
    weighty = np.unique(batch.numbers["answer_N"][batch.numbers["weight_N"] > 0])
    assert len(weighty) == 4 * 4, "answers of the file have no part in the policy loss"
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        loss = upo.method(run, "cpu").loss(model, to_device(batch, model.device))

    asked = run_from(settings(stage="DPO", eval_dataset_path=pairs))
    margins = []
    with torch.no_grad():
        for held_out in eval_batches(asked, stream(asked, "eval")):
            flat = to_device(held_out, model.device)
            assert isinstance(flat, Pairs)
            gain_P2 = sequence_log_probs(model, flat) - sequence_log_probs(reference, flat)
            margins += [0.4 * (gain_P2[:, 0] - gain_P2[:, 1])]
    margin_P = torch.cat(margins)
    assert len(margin_P) == 4 and margin_P.abs().min() > 1e-3
    assert float(loss.parts["pair_margin"]) == pytest.approx(float(margin_P.mean()), rel=1e-4)
    wanted = float(-logsigmoid(margin_P).mean())
    assert float(loss.parts["pair_loss"]) == pytest.approx(wanted, rel=1e-4)
    assert float(loss.value) == pytest.approx(0.5 * wanted, rel=1e-4)


# --- settings ---


def test_every_key_of_drawing_and_cutting_reaches_its_round(settings) -> None:
    keys = {
        "max_completion_length": 9, "rollout_temperature": 0.7, "rollout_top_p": 0.8,
        "rollout_top_k": 5, "num_iterations": 2, "num_mini_batches": 3,
        "gradient_accumulation_steps": 4, "loss_aggregation": "sequence", "prompts_per_round": 12,
    }  # fmt: skip
    run = run_from(settings(**keys))
    assert sampling_of(run) == Sampling(9, temperature=0.7, top_p=0.8, top_k=5)
    assert rounds_of(run).cut == Cut(2, 3, 4, by_answer=True)
