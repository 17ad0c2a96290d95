"""The losses of rollouts against transformers and plain formulas of torch, gradients included,
however cut."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

import ernie
from ernie.models import TINY
from erniekit import groups
from erniekit.device_batch import Flat, to_device
from erniekit.groups import Cut, Group, best_and_worst, sampled_group
from erniekit.policy import (
    TOLD,
    Objective,
    group_advantages,
    kl_k3,
    log_probs,
    normalised_by_domain,
    policy,
    trust,
)
from erniekit.rounds import is_flat
from tests.equivalence.test_preference import agree
from tests.helpers import hf_dense, hf_moe, saved

PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11], [12, 13]]
REWARDS = [[0.0, 1.0, 0.5], [1.0, 0.0, 0.0], [0.2, 0.9, 0.4], [0.0, 0.0, 1.0]]
USUAL = -5.4  # about what a token has in the models of transformers


def model_of(name: str) -> ernie.ErnieModel:
    config = dataclasses.replace(TINY[name], vocab_size=61)
    model = ernie.ErnieModel(config, dtype=torch.float32)
    model.init_weights(seed=2, std=0.1)
    return model


def made_groups(usual: float = -4.1) -> list[Group]:
    """Four groups of three answers of different lengths, with log-probabilities about `usual`."""
    rng, found = np.random.default_rng(5), []
    advantages = group_advantages(torch.tensor(REWARDS), divides_by_std=True).numpy()
    for prompt, rewards, own in zip(PROMPTS, REWARDS, advantages):
        answers = [rng.integers(14, 60, size=rng.integers(1, 7)).tolist() for _ in range(3)]
        group = sampled_group(prompt, answers)
        size = group.num_labels
        group.numbers |= {
            "old_N": (usual + 0.3 * rng.standard_normal(size)).astype(np.float32),
            "reference_N": (usual + 0.3 * rng.standard_normal(size)).astype(np.float32),
            "advantage_N": np.repeat(own, group.lengths()).astype(np.float32),
            "trust_N": rng.uniform(0.5, 1.5, size).astype(np.float32),
        }
        group.pair = best_and_worst(rewards, 0.0)
        found.append(group)
    return found


def totals(model: ernie.ErnieModel, objective: Objective, cut: Cut) -> tuple[float, dict]:
    """Loss and recorded parts of the first step of a round; its gradients are left in the model."""
    model.zero_grad()
    told = [float(i) for i in range(len(TOLD))]
    made = made_groups(USUAL)
    batches = list(groups.round_batches(made, [], told, cut, start=0, end=4, seed=1))
    value, parts = 0.0, {}
    for batch in batches[: cut.batches_per_step]:
        flat = to_device(batch, model.device)
        assert isinstance(flat, Flat)
        share = 1 / cut.batches_per_step
        loss = policy(model, flat, objective=objective, share=share, chunk_size=5)
        loss.total.backward()
        value += float(loss.value)
        for name, part in loss.parts.items():
            parts[name] = parts.get(name, 0.0) + float(part)
    return value, parts


def plain(model, o: Objective, by_answer: bool) -> torch.Tensor:
    """The same by formulas on logits of transformers, one sequence after the other."""
    answers, pairs = [], []
    for group in made_groups(USUAL):
        prompt = group.token_ids[: group.starts[0] + 1]
        bounds = [*group.starts, len(group.token_ids)]
        at, sums = 0, []
        for a, b in itertools.pairwise(bounds):
            answer, n = group.labels[a:b], b - a
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
            values = logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
            own = {k: torch.from_numpy(v[at : at + n]) for k, v in group.numbers.items()}
            ratio = (values - own["old_N"]).exp()
            if o.method == "gspo":
                ratio = (values - own["old_N"]).mean().exp().expand(n)
            clipped = ratio.clamp(1 - o.clip_low, 1 + o.clip_high)
            a_t = own["advantage_N"]
            loss = -torch.minimum(ratio * a_t, clipped * a_t) * own["trust_N"]
            d = own["reference_N"] - values
            answers.append((loss, d.exp() - d - 1))
            sums.append((values - own["reference_N"]).sum())
            at += n
        best, worst = group.pair
        pairs.append(-logsigmoid(o.beta * (sums[best] - sums[worst])))
    if by_answer:
        loss = torch.stack([one.mean() for one, _ in answers]).mean()
        kl = torch.stack([one.mean() for _, one in answers]).mean()
    else:
        loss = torch.cat([one for one, _ in answers]).mean()
        kl = torch.cat([one for _, one in answers]).mean()
    return (loss if o.method != "none" else 0) + o.kl_coef * kl + o.mu * torch.stack(pairs).mean()


@pytest.mark.parametrize("make", [hf_dense, hf_moe])
@pytest.mark.parametrize(
    ("objective", "by_answer"),
    [
        (Objective("ppo", 0.2, 0.2), False),  # PPO alone
        (Objective("ppo", 0.2, 0.3), True),
        (Objective("gspo", 0.1, 0.2), True),  # GSPO alone
        (Objective("gspo", 0.05, 0.1, 0.1, 0.5), False),
        (Objective("ppo", 0.1, 0.3, 0.05, 0.7, 0.4), False),  # UPO
        (Objective("none", mu=1.0, beta=0.3), False),  # the loss of pairs alone
    ],
)
def test_loss_and_gradients_are_those_of_transformers(
    make, objective: Objective, by_answer: bool, tmp_path: Path
) -> None:
    theirs = make()
    ours = ernie.load(saved(theirs, tmp_path), dtype=torch.float32)
    wanted = plain(theirs, objective, by_answer)
    wanted.backward()
    for num_batches in (1, 3):
        value, parts = totals(ours, objective, Cut(1, 1, num_batches, by_answer))
        agree(theirs, ours, wanted, torch.tensor(value))
        assert [parts[name] for name in TOLD] == pytest.approx(range(len(TOLD)))
        assert ("pair_loss" in parts) == bool(objective.mu)
        if objective.method != "none":
            assert 0 < parts["clip_share"] < 1, "one side of the clip is not looked at"


def test_batches_without_a_pair_tell_the_numbers_of_pairs_as_the_others_do() -> None:
    """Ranks add their numbers up in one exchange; a step in which no group has a pair has none."""
    model, objective = model_of("tiny-dense"), Objective("ppo", mu=0.5)
    told = [0.0] * len(TOLD)

    def losses_of(num_pairs: int, num_batches: int) -> list:
        made = made_groups()
        for group in made[num_pairs:]:
            group.pair = None
        cut = Cut(1, 1, num_batches, False)
        batches = groups.round_batches(made, [], told, cut, start=0, end=4, seed=1)
        flats = [to_device(batch, model.device) for batch in batches]
        return [policy(model, flat, objective=objective) for flat in flats]

    (whole,), parts = losses_of(1, 1), losses_of(1, 4)
    assert [[*loss.parts] for loss in parts] == 4 * [[*whole.parts]]
    for name in ("pair_loss", "pair_margin", "pair_accuracy"):
        values = [float(loss.parts[name]) for loss in parts]
        assert sum(values) == pytest.approx(float(whole.parts[name]), rel=1e-5)
        assert sum(value != 0 for value in values) == (whole.parts[name] != 0)
    assert whole.parts["pair_loss"] > 0
    gradients = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for loss in parts:
        model.zero_grad()
        loss.total.backward()
        for name, parameter in model.named_parameters():
            gradients[name] += parameter.grad
    model.zero_grad()
    whole.total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)
    assert all("pair_loss" not in loss.parts for loss in losses_of(0, 4))


def test_answers_of_given_pairs_have_no_part_in_the_divergence() -> None:
    """However far the policy has left the reference in one of them: there e^d has no float32."""
    model, sampled, given = model_of("tiny-dense"), made_groups(), made_groups()[:2]
    for group in given:
        group.is_sampled = False
        group.numbers["reference_N"] = np.full(group.num_labels, 95.0, np.float32)
    found = []
    for pairs in ([], given):
        model.zero_grad()
        (batch,) = groups.round_batches(
            sampled, pairs, [0.0] * len(TOLD), Cut(1, 1, 1, False), start=0, end=4, seed=1
        )
        flat = to_device(batch, model.device)
        assert isinstance(flat, Flat)
        loss = policy(model, flat, objective=Objective("ppo", kl_coef=0.1), chunk_size=5)
        loss.total.backward()
        found.append([float(loss.value), *(float(p.grad.norm()) for p in model.parameters())])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_a_group_costs_its_prompt_once_and_gives_what_separate_rows_give() -> None:
    model = model_of("tiny-dense")
    made = made_groups()
    together = to_device(groups.plain_batch(made), model.device)
    with torch.no_grad():
        whole_N = log_probs(model, together)
        alone = [log_probs(model, to_device(groups.plain_batch([g]), model.device)) for g in made]
    assert (whole_N - torch.cat(alone)).abs().max() < 1e-5
    num_tokens = sum(len(g.token_ids) for g in made)
    assert num_tokens == sum(len(p) - 1 for p in PROMPTS) + sum(g.num_labels for g in made)


def test_advantages_have_mean_0_and_deviation_1_where_answers_differ() -> None:
    rewards_PG = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5] * 4, [3.0, 1.0, 2.0, 2.0]])
    found_PG = group_advantages(rewards_PG, divides_by_std=True)
    assert (found_PG.mean(1).abs() < 1e-6).all()
    assert torch.allclose(found_PG.std(1, correction=0), torch.tensor([1.0, 0.0, 1.0]))
    assert found_PG[0, 0] == pytest.approx(3**0.5)
    centred_PG = group_advantages(rewards_PG, divides_by_std=False)
    assert torch.equal(centred_PG[2], torch.tensor([1.0, -1.0, 0.0, 0.0]))


@pytest.mark.parametrize("count", [3, 7, 12, 16])
def test_equal_rewards_are_equal_whatever_their_mean_rounds_to(count: int) -> None:
    for reward in (0.1, 0.7, 1 / 3):
        rewards_PG = torch.full((2, count), reward, dtype=torch.float64)
        assert not group_advantages(rewards_PG, divides_by_std=True).any()
        assert is_flat([reward] * count, 0.0)
    assert not is_flat([0.1] * count + [0.2], 0.0) and is_flat([0.1] * count + [0.2], 0.1)


def test_domains_are_normalised_apart() -> None:
    rewards_PG = torch.tensor([[1.0, 0.0], [30.0, 10.0], [0.0, 1.0], [10.0, 30.0]])
    found_PG = normalised_by_domain(rewards_PG, torch.tensor([0, 1, 0, 1]))
    assert torch.equal(found_PG, torch.tensor([[1.0, -1], [1, -1], [-1, 1], [-1, 1]]))


def test_k3_is_an_estimate_of_the_divergence_without_bias() -> None:
    generator = torch.Generator().manual_seed(1)
    ours, other = torch.randn(2, 20, generator=generator).log_softmax(-1)
    estimate = (ours.exp() * kl_k3(ours, other)).sum()
    assert estimate == pytest.approx(float((ours.exp() * (ours - other)).sum()), rel=1e-5)
    assert (kl_k3(ours, other) >= 0).all()


def test_corrections_truncate_or_leave_tokens_out() -> None:
    old_N, rollout_N = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0.1, -2.0, 2.0])
    bounds = {"low": 0.5, "high": 2.0}
    ratio = (old_N - rollout_N).exp()
    none, truncated, icepop = (
        trust(old_N, rollout_N, correction=kind, **bounds)
        for kind in ("none", "truncated", "icepop")
    )
    assert none.tolist() == [1, 1, 1]
    assert torch.equal(truncated, torch.stack([ratio[0], torch.tensor(2.0), ratio[2]]))
    assert torch.equal(icepop, torch.stack([ratio[0], torch.tensor(0.0), torch.tensor(0.0)]))


def test_a_round_uses_every_group_once_a_pass_and_survives_a_checkpoint() -> None:
    cut = Cut(2, 2, 2, False)
    made = made_groups()
    batches = list(
        groups.round_batches(made, [], [0.0] * len(TOLD), cut, start=7, end=11, seed=3)
    )  # fmt: skip
    assert len(batches) == 8
    for turn in (batches[:4], batches[4:]):
        ids = [set(b.token_ids_T.tolist()) for b in turn]
        for prompt in PROMPTS:
            assert sum(set(prompt) <= one for one in ids) == 1
    assert [b.cursor.rows for b in batches] == [1, 2, 3, 4, 5, 6, 7, 0]
    assert batches[-1].cursor.position == 11 and batches[0].cursor.position == 7
    again = groups.from_tensors(groups.to_tensors(batches))
    for ours, theirs in zip(again, batches, strict=True):
        for field in dataclasses.fields(ours):
            a, b = getattr(ours, field.name), getattr(theirs, field.name)
            if field.name == "numbers":
                assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
            else:
                assert np.array_equal(a, b), field.name
