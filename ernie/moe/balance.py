"""Losses and updates that keep experts busy and different: pure functions of a `Routing` or a
router weight.

Legend: T tokens, E experts, K choices per token, D hidden size.
"""

from __future__ import annotations

import math

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


def entropy(routing: Routing) -> Tensor:
    """Sum over the tokens of `-sum_e p_e log p_e / log E`, float32: 1 a token where all experts are
    alike to the router, 0 where it is sure.
    """
    probs_TE, num_experts = routing.probs_TE.detach(), routing.probs_TE.shape[1]
    return torch.special.entr(probs_TE).sum() / max(math.log(num_experts), 1e-12)


def orthogonal_loss(weight_ED: Tensor, num_groups: int = 1) -> Tensor:
    """`sum_ef (<w_e, w_f> - [e = f])^2 / E^2` over rows scaled to length 1: experts shall look for
    different things. With `num_groups`, which divides E, only experts of one group of neighbours
    are compared, and it is the mean over the groups. Source: ERNIE 4.5 technical report;
    PaddleFormers `topk_gate`.
    """
    return _gap(_unit_rows(weight_ED, num_groups)[0]).square().mean()


def _unit_rows(weight_ED: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Rows by group, `(groups, E / groups, D)`, scaled to length 1, and their lengths; float32."""
    rows = weight_ED.float().unflatten(0, (num_groups, -1))
    lengths = rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return rows / lengths, lengths


def _gap(rows: Tensor) -> Tensor:
    """`(groups, E / groups, E / groups)`, what products of unit rows are off orthogonality."""
    return rows @ rows.mT - torch.eye(rows.shape[1], device=rows.device)


@torch.no_grad()
def update_orthogonal(weight_ED: Tensor, step_size: float, num_groups: int = 1) -> None:
    """`W -= step_size * gradient of orthogonal_loss`, in place, without an optimizer, as weight
    decay is decoupled in AdamW.

    With `n` rows in each of `g` groups and G their gap, the gradient by unit rows U is
    `4 / (g n^2) G U`, of which a row's length takes the part along the row away. Source: ERNIE's
    callbacks of pre-training (step_size = lambda) and of ERNIEKit (learning rate times lambda).
    """
    units, lengths = _unit_rows(weight_ED, num_groups)
    by_units = 4 / (num_groups * units.shape[1] ** 2) * _gap(units) @ units
    along = (by_units * units).sum(-1, keepdim=True) * units
    weight_ED -= step_size * ((by_units - along) / lengths).flatten(0, 1)


@torch.no_grad()
def update_correction_bias(bias_E: Tensor, load_E: Tensor, step_size: float) -> None:
    """`bias += step_size * sign(mean load - load)`, in place: busy experts become less likely to be
    chosen.

    `load` counts the whole global batch since the last update. Source: PaddleFormers callbacks.
    """
    load = load_E.float()
    bias_E += step_size * torch.sign(load.mean() - load)
