"""Reward models against transformers' backbones and plain torch, each answer by itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import ernie
from ernie.settings import ConfigError
from erniekit import reward_model
from erniekit.device_batch import Pairs
from erniekit.reward_model import HEAD, RewardModel, add_reward_head, bradley_terry
from tests.equivalence.test_preference import agree, sequences
from tests.helpers import hf_dense, hf_moe, saved


def row(pairs: list) -> Pairs:
    """One row whose answers are read to their last token."""
    ids, positions, bounds = [], [], []
    for prompt, *answers in pairs:
        bound = [len(ids), len(ids) + len(prompt) - 1]
        ids += prompt[:-1]
        positions += range(len(prompt) - 1)
        for answer in answers:
            ids += [prompt[-1], *answer]
            positions += range(len(prompt) - 1, len(prompt) + len(answer))
            bound.append(len(ids))
        bounds.append(bound)
    labels = [0] * len(ids)  # not looked at
    return Pairs(*(torch.tensor(values) for values in (ids, labels, positions, bounds)))


def scored(folder: Path, seed: int = 4) -> ernie.ErnieModel:
    model = ernie.load(folder, dtype=torch.float32)
    add_reward_head(model, seed=seed)
    return model


def plain_rewards(model, head_1D: torch.Tensor, pairs: list) -> torch.Tensor:
    """(P, 2), by the backbone of transformers, whose last hidden state is normalised."""
    values = [
        (model.model(torch.tensor([prompt + answer])).last_hidden_state[0, -1] * head_1D).sum()
        for prompt, *answers in pairs
        for answer in answers
    ]
    return torch.stack(values).view(-1, 2)


@pytest.mark.parametrize("make", [hf_dense, hf_moe])
def test_loss_and_gradients_equal_plain_ones_on_separate_sequences(make, tmp_path) -> None:
    theirs, pairs = make(), sequences()
    ours = scored(saved(theirs, tmp_path))
    head_1D = ours.get_parameter(HEAD).detach().clone().requires_grad_()
    chosen_P, rejected_P = plain_rewards(theirs, head_1D, pairs).T
    wanted = -(chosen_P.exp() / (chosen_P.exp() + rejected_P.exp())).log().mean()
    wanted.backward()
    found = bradley_terry(ours, row(pairs), scale=1 / 4)
    found.total.backward()
    own = ours.get_parameter(HEAD)
    assert float((own.grad - head_1D.grad).abs().max()) < 1e-5  # type: ignore[operator]
    own.grad = None
    agree(theirs, ours, wanted, found.value)
    right = float((chosen_P > rejected_P).float().mean())
    assert float(found.parts["rewards_accuracy"]) == right
    margin = float((chosen_P - rejected_P).mean().detach())
    assert float(found.parts["rewards_margin"]) == pytest.approx(margin, abs=1e-5)


def test_a_row_of_pairs_equals_rows_of_one_pair(tmp_path) -> None:
    model = scored(saved(hf_dense(), tmp_path))
    whole = bradley_terry(model, row(sequences()), scale=1 / 4)
    alone = [bradley_terry(model, row([pair]), scale=1 / 4) for pair in sequences()]
    assert float(whole.value) == pytest.approx(sum(float(one.value) for one in alone), rel=1e-5)


def test_scores_are_those_of_training_however_they_are_packed(tmp_path) -> None:
    theirs, pairs = hf_moe(), sequences()
    model = scored(saved(theirs, tmp_path))
    with torch.no_grad():
        wanted = plain_rewards(theirs, model.get_parameter(HEAD), pairs).flatten().tolist()
    whole = [prompt + answer for prompt, *answers in pairs for answer in answers]
    for max_tokens in (10_000, 40, 1):
        found = dataclasses.replace(RewardModel(model), max_tokens=max_tokens)(whole)
        assert found == pytest.approx(wanted, abs=1e-4)
    assert RewardModel(model)([]) == []
    with pytest.raises(ValueError, match="has no tokens"):
        RewardModel(model)([[1], []])


def test_the_head_lies_beside_weights_that_load_without_it(tmp_path) -> None:
    folder = saved(hf_dense(), tmp_path / "base")
    with pytest.raises(ConfigError, match="holds no reward_head"):
        reward_model.load(folder)
    model = scored(folder)
    reward_model.write_head(folder, model.get_parameter(HEAD).detach())
    found = reward_model.load(folder, dtype=torch.float32)
    assert torch.equal(found.model.get_parameter(HEAD), model.get_parameter(HEAD))
    assert torch.equal(ernie.load(folder, dtype=torch.float32).head_weight, model.head_weight)
    reward_model.write_head(folder, torch.zeros(1, 7))
    with pytest.raises(ConfigError, match=r"is \(1, 7\), this model wants \(1, 48\)"):
        reward_model.load(folder)
