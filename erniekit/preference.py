"""Losses of preference training, as functions of four log-probabilities of each pair.

Policy and reference each give the log-probability of the chosen and of the rejected answer; a
method is a function of these and a row of `PREFERENCE_LOSSES`. Logits are never held whole: the
labelled positions meet the vocabulary a few at a time, in the forward pass for the log-probability
and once more in the backward pass, when the weight of each sequence is known.

Legend: T tokens of the batch, N labelled tokens, C of them at a time, D hidden size, V vocabulary,
P pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ernie import kernels
from ernie.attention import shared_prompt
from ernie.chat import UNTRAINED
from ernie.model import ErnieModel


@dataclass(frozen=True)
class Pairs:
    """A row of pairs on the device of the model; `pairs_P4` is that of `shared_prompt`, int64."""

    token_ids_T: Tensor
    labels_T: Tensor
    positions_T: Tensor
    pairs_P4: Tensor


@dataclass(frozen=True)
class Preference:
    """`total` is to be differentiated; `parts` are sums over the pairs times `scale`, detached."""

    total: Tensor
    parts: dict[str, Tensor]


def sigmoid(margin_P: Tensor, *, label_smoothing: float) -> Tensor:
    """-log sigmoid of the margin of rewards; a share of the labels is taken to be wrong.

    Source: DPO (arXiv 2305.18290, eq. 7); conservative DPO for the smoothing.
    """
    right_P, wrong_P = logsigmoid(margin_P), logsigmoid(-margin_P)
    return -(1 - label_smoothing) * right_P - label_smoothing * wrong_P


PREFERENCE_LOSSES: dict[str, Callable[..., Tensor]] = {"sigmoid": sigmoid}


def preference(
    model: ErnieModel,
    batch: Pairs,
    reference_P2: Tensor,
    *,
    scale: float,
    method: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    chunk_size: int = 128,
) -> Preference:
    """Loss of a row of pairs, summed and multiplied by `scale`, and the rewards it rests on.

    `reference_P2` is `sequence_log_probs` of the reference model; `scale` is one over the number
    of pairs of the whole optimizer step.
    """
    policy_P2 = sequence_log_probs(model, batch, chunk_size=chunk_size)
    rewards_P2 = beta * (policy_P2 - reference_P2)
    margin_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    loss_P = PREFERENCE_LOSSES[method](margin_P, label_smoothing=label_smoothing)
    kept_P2, kept_P = rewards_P2.detach(), margin_P.detach()
    parts = {
        "rewards_chosen": kept_P2[:, 0],
        "rewards_rejected": kept_P2[:, 1],
        "rewards_margin": kept_P,
        "rewards_accuracy": (kept_P > 0).float(),
    }
    return Preference(
        loss_P.sum() * scale, {name: part_P.sum() * scale for name, part_P in parts.items()}
    )


def sequence_log_probs(model: ErnieModel, batch: Pairs, *, chunk_size: int = 128) -> Tensor:
    """Log-probability of the chosen and the rejected answer of every pair, float64 `(P, 2)`.

    Sums are float64: what counts is the difference of two of them, each hundreds of nats large.
    """
    attend = shared_prompt(batch.pairs_P4)
    hidden_TD = model.hidden(batch.token_ids_T, batch.positions_T, attend)
    labelled_N = (batch.labels_T != UNTRAINED).nonzero()[:, 0]
    values_N = ChunkedLogProbs.apply(
        model.model.norm(hidden_TD[labelled_N]),
        model.head_weight,
        batch.labels_T[labelled_N],
        chunk_size,
    )
    ends = batch.pairs_P4[:, 2:].flatten().contiguous()  # of chosen, rejected, chosen, ...
    answer_N = torch.searchsorted(ends, labelled_N, right=True)
    zeros = values_N.new_zeros(len(ends), dtype=torch.float64)
    return zeros.index_add(0, answer_N, values_N.double()).view(-1, 2)


class ChunkedLogProbs(torch.autograd.Function):
    """`log softmax(W h_n)[target_n]` in float32, logits `chunk_size` rows at a time, both ways."""

    @staticmethod
    def forward(ctx, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk_size: int):
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N)
        ctx.chunk_size = chunk_size
        values_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
        for start in range(0, len(hidden_ND), chunk_size):
            rows = slice(start, start + chunk_size)
            logits_CV = kernels.linear(hidden_ND[rows], weight_VD).float()
            chosen_C = logits_CV.gather(-1, targets_N[rows, None])[:, 0]
            values_N[rows] = chosen_C - logits_CV.logsumexp(-1)
        return values_N

    @staticmethod
    def backward(ctx, upstream_N: Tensor):
        hidden_ND, weight_VD, targets_N = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
        frozen_VD = weight_VD.detach()
        for start in range(0, len(hidden_ND), ctx.chunk_size):
            rows = slice(start, start + ctx.chunk_size)
            chunk_CD, up_C1 = hidden_ND[rows].detach(), upstream_N[rows, None]
            with torch.enable_grad():  # for the input's gradient by the product's own backward
                chunk_CD.requires_grad_(wants_hidden)
                product_CV = kernels.linear(chunk_CD, frozen_VD)
            grad_CV = product_CV.detach().float().softmax(-1).mul_(-up_C1)
            grad_CV.scatter_add_(-1, targets_N[rows, None], up_C1)
            grad_CV = grad_CV.to(product_CV.dtype)
            if grad_ND is not None:
                (grad_ND[rows],) = torch.autograd.grad(product_CV, chunk_CD, grad_CV)
            if grad_VD is not None:
                grad_VD.addmm_(grad_CV.T.float(), chunk_CD.detach().float())
        grad_VD = None if grad_VD is None else grad_VD.to(weight_VD.dtype)
        return grad_ND, grad_VD, None, None
