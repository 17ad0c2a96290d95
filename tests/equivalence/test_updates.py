"""Whole steps of every loss against transformers and torch.optim: all weights after each step.

Ours is what `erniekit train` does between its data and its checkpoints: settings, the method of the
stage, the loop. The reference is the loss by its formula, one sequence after the other, with
`clip_grad_norm_`, `torch.optim.AdamW` and a schedule of transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import get_scheduler

from erniekit.build import build_model, trained_parameters
from erniekit.config import Run, resolved, run_from
from erniekit.data.batch import Batch, batch_of
from erniekit.data.dialogue import Sample
from erniekit.data.pack import Cursor
from erniekit.data.preference import PairSample
from erniekit.groups import Cut, round_batches
from erniekit.kto import Utility
from erniekit.loop import Parts, Progress, train
from erniekit.optim import OPTIMIZERS, treatments
from erniekit.parallel.forms import form_of
from erniekit.parallel.ranks import ALONE
from erniekit.policy import TOLD, Objective
from erniekit.reward_model import HEAD
from tests.equivalence.test_kto import REFERENCE, after, plain
from tests.equivalence.test_kto import plain_loss as plain_kto_loss
from tests.equivalence.test_kto import samples as judged
from tests.equivalence.test_preference import plain_log_probs, sequences
from tests.equivalence.test_preference import samples as pairs
from tests.equivalence.test_reward import plain_rewards
from tests.equivalence.test_reward import row as read_to_the_end
from tests.equivalence.test_training import assert_equal
from tests.erniekit.test_policy import USUAL, made_groups
from tests.erniekit.test_policy import plain as plain_policy_loss
from tests.helpers import hf_dense, hf_moe, saved

NUM_STEPS, RATE, GATE_RATIO, DECAY, MAX_NORM, BETA2 = 3, 1e-2, 0.5, 0.1, 1.0, 0.95
# AdamW's first step is g / (|g| + eps): with a small eps a gradient that is nothing but rounding is
# a whole step of either sign. Clipped ones have about 4e-3 an element here, and differ by up to
# 5e-8. A large eps also lets the length of a gradient be seen, and so that it was clipped.
EPSILON = 1e-3
# Of the largest distance that an element of the tensor has gone, which is 2e-2: 6e-6. Float32
# gives 5e-5; of all mistakes that were tried, moments of bfloat16 are the smallest with 2.6e-3.
BOUND = 3e-4
LEAST = 1e-3  # how far that is, at least

UTILITY = Utility(0.3, desirable_weight=1.5, undesirable_weight=0.5)
UPO = Objective("ppo", 0.1, 0.3, kl_coef=0.05, mu=0.7, beta=0.3)
BETA = 0.3  # of DPO

# Losses of routers have no part in this (tests/erniekit/test_objectives.py, test_routers.py).
KEYS: dict[str, Any] = {
    "fine_tuning": "Full", "learning_rate": RATE, "lr_scheduler_type": "cosine",
    "weight_decay": DECAY, "moe_gate_lr_ratio": GATE_RATIO, "max_grad_norm": MAX_NORM,
    "adam_beta2": BETA2, "adam_epsilon": EPSILON, "gradient_accumulation_steps": 2,
    "amp_master_grad": True, "use_lowprecision_moment": False, "loss_subbatch_seqlen": 16,
    "moe_aux_loss_lambda": 0, "moe_use_aux_free_update_coef": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A stage: its recipe and keys, the batches of a step or of all of them, and its plain loss.

    `plain(model, start, head)` is the loss of a whole step, by models of transformers; `start` is
    the one before training, `head` the weight of a reward model.
    """

    recipe: str
    keys: dict[str, Any]
    batches: Callable[[], list[Batch]]
    plain: Callable[[Any, Any, Any], Tensor]


def in_two(samples: list) -> list[Batch]:
    """A step in two batches that are not of one size."""
    return [batch_of([samples[:3]], Cursor()), batch_of([samples[3:]], Cursor())]


# --- SFT: the chosen answers are to be said ---


def dialogues() -> list[Batch]:
    return in_two([Sample(*after(prompt, chosen)) for prompt, chosen, _ in sequences()])


def plain_sft(model, start, head) -> Tensor:
    num_trained = sum(len(chosen) for _, chosen, _ in sequences())
    return -plain_log_probs(model, sequences())[:, 0].sum() / num_trained


# --- DPO: -log sigmoid(beta (what the chosen answer has gained - what the rejected one has)) ---


def plain_dpo(model, start, head) -> Tensor:
    with torch.no_grad():
        reference_P2 = plain_log_probs(start, sequences())
    chosen_P, rejected_P = (plain_log_probs(model, sequences()) - reference_P2).T
    return -logsigmoid(BETA * (chosen_P - rejected_P)).mean()


# --- KTO ---


@torch.no_grad()
def ask(start) -> None:
    """The reference about every answer and the one to another prompt, where `plain_kto_loss` looks
    them up.
    """
    for s in judged():
        own, other = (plain(start, [*x.token_ids], [*x.labels]) for x in (s, s.other) if x)
        REFERENCE[s.key] = (float(own), float(other))


def plain_kto(model, start, head) -> Tensor:
    ask(start)
    return plain_kto_loss(model, UTILITY)


# --- RM: -log sigmoid(reward of the chosen answer - reward of the rejected one) ---


def whole_pairs() -> list[Batch]:
    samples = []
    for pair in sequences():
        row = read_to_the_end([pair])
        (_, chosen, rejected, _) = row.pairs_P4[0].tolist()
        columns = (row.token_ids_T.tolist(), row.labels_T.tolist())
        samples.append(PairSample(*columns, chosen=chosen, rejected=rejected))
    return in_two(samples)


def plain_rm(model, start, head) -> Tensor:
    chosen_P, rejected_P = plain_rewards(model, head, sequences()).double().T
    return -logsigmoid(chosen_P - rejected_P).mean()


# --- UPO: every step a pass over the same round ---


def round_of_answers() -> list[Batch]:
    cut, told = Cut(NUM_STEPS, 1, 2, by_answer=False), [0.0] * len(TOLD)
    return list(round_batches(made_groups(USUAL), [], told, cut, start=0, end=4, seed=1))


def plain_upo(model, start, head) -> Tensor:
    return plain_policy_loss(model, UPO, by_answer=False)


ROWS = {
    "SFT": Row("sft", {}, dialogues, plain_sft),
    "DPO": Row(
        "preference", {"beta": BETA, "normalize_logps": False},
        lambda: in_two(pairs()[:4]), plain_dpo,
    ),
    "KTO": Row("kto", asdict(UTILITY), lambda: in_two(judged()), plain_kto),
    "RM": Row("reward", {}, whole_pairs, plain_rm),
    "UPO": Row(
        "upo",
        {
            "policy_loss": UPO.method, "clip_low": UPO.clip_low, "clip_high": UPO.clip_high,
            "kl_coef": UPO.kl_coef, "upo_mu": UPO.mu, "beta": UPO.beta,
        },
        round_of_answers, plain_upo,
    ),
}  # fmt: skip


# --- steps ---


@dataclass(frozen=True)
class Step:
    """What is told of a step, and the weights after it."""

    told: dict[str, float]  # loss, grad_norm (before it is clipped), learning_rate
    weights: dict[str, Tensor]


def copied(parameters: dict[str, Any]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in parameters.items()}


def our_steps(run: Run, row: Row) -> tuple[dict[str, Tensor], list[Step]]:
    """Weights before training, and the steps, of parts that are put together as a session does."""
    batches, o = row.batches(), run.optimisation
    method = import_module(f"erniekit.recipes.{row.recipe}").method(run, "cpu", is_kept=False)
    method.prepare(batches)
    model, form = build_model(run, "cpu"), form_of(run, ALONE)
    form.divide(model)
    trained = trained_parameters(model)
    gradients = form.gradients(model, trained, torch.float32)
    rules = treatments(trained, o, num_layers=model.config.num_hidden_layers)
    optimizer = OPTIMIZERS[o.optim](form.parts(trained), rules, o, seed=3, kept=form.kept())
    # But the routing bias, which no gradient moves.
    named = {n: p for n, p in model.named_parameters() if "e_score_correction_bias" not in n}
    start, steps = copied(named), []

    def loss(model, batch, **options):
        return method.loss(model, batch, gradients=gradients, **options)

    def note(record: dict[str, Any]) -> bool:
        told = {key: record[key] for key in ("loss", "grad_norm", "learning_rate")}
        steps.append(Step(told, copied(named)))
        return False  # it is not enough

    parts = Parts(
        model, loss, optimizer, gradients, o, NUM_STEPS, run.training.gradient_accumulation_steps,
        1, run.training, bias_step=run.bias_step,
        measure=lambda window: method.measure(model, window, ALONE),
    )  # fmt: skip
    train(parts, cycle(batches), Progress(), note)
    return start, steps


def plain_steps(model, head: Tensor | None, row: Row) -> list[Step]:
    """The steps of a model of transformers, which is trained."""
    start = copy.deepcopy(model)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if head is not None:
        named[HEAD] = head = head.clone().requires_grad_()
    routers = [n for n in named if n.endswith("mlp.gate.weight")]
    norms = [n for n in named if n.endswith("norm.weight")]
    others = named.keys() - {*routers, *norms}
    groups = [
        {"params": [named[n] for n in others], "weight_decay": DECAY},
        {"params": [named[n] for n in norms], "weight_decay": 0.0},
        {"params": [named[n] for n in routers], "weight_decay": DECAY, "lr": GATE_RATIO * RATE},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, BETA2), eps=EPSILON)
    schedule = get_scheduler("cosine", optimizer, 0, NUM_STEPS)
    steps = []
    for _ in range(NUM_STEPS):
        rate, *_ = schedule.get_last_lr()
        optimizer.zero_grad()
        loss = row.plain(model, start, head)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), MAX_NORM)
        optimizer.step()
        schedule.step()
        told = {"loss": loss.item(), "grad_norm": norm.item(), "learning_rate": rate}
        steps.append(Step(told, copied(named)))
    return steps


@pytest.mark.parametrize("stage", ROWS)
@pytest.mark.parametrize("make", [hf_dense, hf_moe])
def test_all_weights_after_each_step_equal_those_of_plain_torch(
    make, stage: str, tmp_path: Path
) -> None:
    is_tied, row = make is hf_dense, ROWS[stage]
    theirs = make(tie_word_embeddings=is_tied)
    folders = {"model_name_or_path": str(saved(theirs, tmp_path)), "output_dir": str(tmp_path)}
    settings = {**KEYS, **row.keys, **folders, "stage": stage}
    start, ours = our_steps(resolved(run_from(settings), "cpu"), row)
    expected = plain_steps(theirs, start.get(HEAD), row)
    assert expected[0].told["grad_norm"] > 1.5 * MAX_NORM, "nothing is clipped"
    # What a reward model has no use for is neither moved nor decayed.
    unused = {"lm_head.weight"} if stage == "RM" and not is_tied else set()
    for found, wanted in zip(ours, expected, strict=True):
        assert found.told == pytest.approx(wanted.told, rel=1e-4, abs=1e-6)
        assert found.weights.keys() == wanted.weights.keys()
        moves, known = (
            {n: step.weights[n] - weight for n, weight in start.items()} for step in (found, wanted)
        )
        assert {n for n, move in known.items() if move.abs().max() < LEAST} == unused
        assert_equal(moves, known, BOUND)
