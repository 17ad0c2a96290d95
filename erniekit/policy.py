"""Losses of reinforcement learning with verifiable rewards, and UPO, which adds one of pairs.

    L_UPO = L_PPO + kl_coef * KL + mu * L_DPO                  on one policy

Advantages come from the group: the answers to one prompt are held against each other, and no value
network is needed. Everything but `policy` is a pure function of tensors. The weight of each token
and pair in its optimizer step is part of the batch (`erniekit.rounds`), so sums are means already,
however the step is cut.

Source: ERNIE 4.5 report for UPO; PPO (arXiv 1707.06347, eq. 7), GRPO (2402.03300), GSPO
(2507.18071, eq. 5), the k3 estimator (Schulman, "Approximating KL divergence", 2020), truncated
importance sampling (Yao et al. 2025), IcePop (Ling team, 2025), DPO (2305.18290, eq. 7).

Legend: N labelled tokens, A answers, P prompts, G answers of a group, Q pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ernie.attention import shared_prompts
from ernie.chat import UNTRAINED
from ernie.model import ErnieModel
from ernie.moe.router import Routing
from erniekit.device_batch import Flat
from erniekit.gradients import Gradients
from erniekit.losses import Loss, Terms, with_terms
from erniekit.preference import label_log_probs

_NO_TERMS = Terms()

# What is told of a round with each of its steps: means over all its answers, dropped ones too.
TOLD = ("reward", "right", "length", "cut_share", "entropy", "dropped_share")


@dataclass(frozen=True)
class Objective:
    """A method and its numbers; see the keys of the same names in `erniekit.config.Policy`."""

    method: str = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    mu: float = 0.0
    beta: float = 0.1

    @property
    def has_reference(self) -> bool:
        return self.kl_coef > 0 or self.mu > 0


# --- pure functions ---


def group_advantages(rewards_PG: Tensor, *, divides_by_std: bool) -> Tensor:
    """`(r - mean) / std` within each group, or without the division; 0 where all are equal.

    std is that of the group itself, not an estimate for more answers.
    """
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    if not divides_by_std:
        return centred_PG
    std_P1 = rewards_PG.std(1, correction=0, keepdim=True)
    differ_P1 = (rewards_PG != rewards_PG[:, :1]).any(1, keepdim=True)
    return torch.where(differ_P1, centred_PG / std_P1.clamp(min=1e-12), 0.0)


def normalised_by_domain(rewards_PG: Tensor, domain_P: Tensor) -> Tensor:
    """`(r - mean) / std` over all answers of a domain; 0 where all are equal."""
    out_PG = torch.zeros_like(rewards_PG)
    for domain in domain_P.unique():
        mine = domain_P == domain
        out_PG[mine] = group_advantages(rewards_PG[mine].reshape(1, -1), divides_by_std=True).view(
            -1, rewards_PG.shape[1]
        )
    return out_PG


def ppo_clip(
    log_ratio_N: Tensor, advantage_N: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """`-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)` with rho = exp(log ratio), and
    whether the clip decided.
    """
    ratio_N = log_ratio_N.exp()
    free_N = ratio_N * advantage_N
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high) * advantage_N
    return -torch.minimum(free_N, clipped_N), clipped_N < free_N


def kl_k3(log_probs_N: Tensor, reference_N: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) by tokens drawn from the policy: `e^d - d - 1` with
    d = reference - policy; never negative.
    """
    difference_N = reference_N - log_probs_N
    return difference_N.exp() - difference_N - 1


def trust(old_N: Tensor, rollout_N: Tensor, *, correction: str, low: float, high: float) -> Tensor:
    """Weight of each token where training and the rollout's own arithmetic disagree about it.

    `truncated`: old / rollout, at most `high`. `icepop`: the same between `low` and `high`, and 0
    outside. `none`: 1.
    """
    if correction == "none":
        return torch.ones_like(old_N)
    ratio_N = (old_N - rollout_N).exp()
    if correction == "truncated":
        return ratio_N.clamp(max=high)
    assert correction == "icepop", correction
    return torch.where((ratio_N >= low) & (ratio_N <= high), ratio_N, 0.0)


def answer_sums(values_N: Tensor, answer_N: Tensor, num_answers: int) -> Tensor:
    """Sum over the tokens of each answer, float64 `(A,)`."""
    zeros_A = values_N.new_zeros(num_answers, dtype=torch.float64)
    return zeros_A.index_add(0, answer_N, values_N.double())


def pair_margins(
    log_probs_N: Tensor, reference_N: Tensor, answer_N: Tensor, pairs_Q2: Tensor, num_answers: int
) -> Tensor:
    """`log (pi / ref)(chosen) - log (pi / ref)(rejected)` of each pair of answers, float64."""
    gain_A = answer_sums(log_probs_N - reference_N, answer_N, num_answers)
    return gain_A[pairs_Q2[:, 0]] - gain_A[pairs_Q2[:, 1]]


def clipped_loss(
    log_probs_N: Tensor, numbers: dict[str, Tensor], objective: Objective
) -> tuple[Tensor, Tensor]:
    """L_PPO of tokens (`ppo`) or whole answers (`gspo`), and the share that was clipped.

    GSPO's ratio is that of an answer to the power of one over its length; its weight is that of the
    answer's tokens together.
    """
    o, weight_N = objective, numbers["weight_N"] * numbers["trust_N"]
    log_ratio_N = log_probs_N - numbers["old_N"]
    if o.method == "ppo":
        loss_N, is_clipped_N = ppo_clip(
            log_ratio_N, numbers["advantage_N"], o.clip_low, o.clip_high
        )
        return (weight_N * loss_N).sum(), (numbers["weight_N"] * is_clipped_N).sum()
    assert o.method == "gspo", o.method
    answer_N, num_answers = numbers["answer_N"], int(numbers["counts_G"].sum())
    ones_N = torch.ones_like(log_ratio_N)
    length_A = answer_sums(ones_N, answer_N, num_answers).clamp(min=1)
    mean_A = answer_sums(log_ratio_N, answer_N, num_answers) / length_A
    advantage_A = answer_sums(numbers["advantage_N"], answer_N, num_answers) / length_A
    loss_A, is_clipped_A = ppo_clip(mean_A, advantage_A, o.clip_low, o.clip_high)
    share_A = answer_sums(numbers["weight_N"], answer_N, num_answers)
    weight_A = answer_sums(weight_N, answer_N, num_answers)
    return (weight_A * loss_A).sum(), (share_A * is_clipped_A).sum()


# --- the loss of a batch ---


def log_probs(
    model: ErnieModel,
    batch: Flat,
    *,
    chunk_size: int = 128,
    gradients: Gradients | None = None,
    routings: list[Routing | None] | None = None,
) -> Tensor:
    """Log-probability of every labelled token of groups of answers, float32 `(N,)`.

    `batch.numbers["counts_G"]` are the answers of each group; a group's segments are its prompt and
    its answers.
    """
    bounds, groups, at = batch.cu_seqlens_S1.tolist(), [], 0
    for count in batch.numbers["counts_G"].tolist():
        groups.append(bounds[at : at + count + 2])
        at += count + 1
    attend = shared_prompts(groups, model.device)
    hidden_TD = model.hidden(batch.token_ids_T, batch.positions_T, attend, routings=routings)
    return label_log_probs(
        model, hidden_TD, batch.labels_T, chunk_size=chunk_size, gradients=gradients
    )


def policy(
    model: ErnieModel,
    batch: Flat,
    *,
    objective: Objective,
    scale: float = 1.0,
    terms: Terms = _NO_TERMS,
    share: float = 1.0,
    chunk_size: int = 128,
    gradients: Gradients | None = None,
) -> Loss:
    """UPO of a batch: clipped policy loss, KL term, and `mu` times the loss of pairs.

    `batch.numbers` (float32; see `erniekit.rounds`): old_N, reference_N, advantage_N, trust_N and
    weight_N of each labelled token, answer_N its answer; pairs_Q2 chosen and rejected answers,
    pair_weight_Q their weights; told_K what is recorded of the round. Weights are shares of the
    whole optimizer step: `scale` is not used. For the rest see `losses.next_token`.
    """
    del scale
    routings: list[Routing | None] = []
    values_N = log_probs(
        model, batch, chunk_size=chunk_size, gradients=gradients, routings=routings
    )
    n, parts = dict(batch.numbers), {}
    value = values_N.new_zeros((), dtype=torch.float64)
    if objective.method != "none":
        parts["policy_loss"], parts["clip_share"] = clipped_loss(values_N, n, objective)
        value = value + parts["policy_loss"]
    if objective.has_reference:
        # What has no weight, as the answers of given pairs, counts as unchanged: far from the
        # reference its estimate is infinite, and 0 times that is not a number.
        reference_N = torch.where(n["weight_N"] > 0, n["reference_N"], values_N.detach())
        parts["kl"] = (n["weight_N"] * kl_k3(values_N, reference_N)).sum()
        value = value + objective.kl_coef * parts["kl"]
    if objective.mu and len(n["pairs_Q2"]):
        num_answers = int(n["counts_G"].sum())
        margin_Q = objective.beta * pair_margins(
            values_N, n["reference_N"], n["answer_N"], n["pairs_Q2"], num_answers
        )
        parts["pair_loss"] = -(n["pair_weight_Q"] * logsigmoid(margin_Q)).sum()
        parts["pair_margin"] = (n["pair_weight_Q"] * margin_Q).sum()
        parts["pair_accuracy"] = (n["pair_weight_Q"] * (margin_Q.sign() + 1) / 2).sum()
        value = value + objective.mu * parts["pair_loss"]
    told = {name: n["told_K"][k] * share for k, name in enumerate(TOLD)}
    return with_terms(model, value, parts | told, routings, terms, share)


def answer_of_label(labels_T: Tensor, cu_seqlens_S1: Tensor, counts_G: Tensor) -> Tensor:
    """The answer that each labelled token belongs to, int64 `(N,)`, counted through the batch."""
    is_answer = torch.cat([torch.arange(int(count) + 1) > 0 for count in counts_G])
    ends = cu_seqlens_S1[1:].long()[is_answer].contiguous()
    return torch.searchsorted(ends, (labels_T != UNTRAINED).nonzero()[:, 0], right=True)
