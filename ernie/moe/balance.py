"""Losses and updates that keep experts busy and different: pure functions of a `Routing` or a
router weight.

Legend: T tokens, E experts, K choices per token, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ernie.moe.router import Routing, counts_of


def load_balance_loss(routing: Routing) -> Tensor:
    """`E * sum_e mean_prob_e * share_e`: K when perfectly balanced; the gradient flows through the
    probabilities.

    `share_e` counts the top-k of the *unbiased* probabilities. Source: PaddleFormers `topk_gate`.
    """
    num_tokens, num_experts = routing.probs_TE.shape
    top_k = routing.experts_TK.shape[1]
    unbiased_TK = routing.probs_TE.detach().topk(top_k, dim=-1).indices
    share_E = counts_of(unbiased_TK, num_experts) / num_tokens
    return num_experts * (routing.probs_TE.mean(0) * share_E).sum()


def z_loss(routing: Routing) -> Tensor:
    """Mean square of the log-partition of the router logits: keeps logits small. Source: ST-MoE,
    eq. 5.
    """
    return routing.logits_TE.logsumexp(-1).square().mean()


def orthogonal_loss(weight_ED: Tensor) -> Tensor:
    """`sum_ef (<w_e, w_f> - [e = f])^2 / E^2` over rows scaled to length 1: experts shall look for
    different things. Source: ERNIE 4.5 technical report; PaddleFormers `topk_gate`.
    """
    rows = weight_ED.float()
    rows = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    gap = rows @ rows.T - torch.eye(len(rows), device=rows.device)
    return gap.square().sum() / len(rows) ** 2


@torch.no_grad()
def update_correction_bias(bias_E: Tensor, load_E: Tensor, step_size: float) -> None:
    """`bias += step_size * sign(mean load - load)`, in place: busy experts become less likely to be
    chosen.

    `load` counts the whole global batch since the last update. Source: PaddleFormers callbacks.
    """
    load = load_E.float()
    bias_E += step_size * torch.sign(load.mean() - load)
