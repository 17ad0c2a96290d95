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
from ernie.moe.router import Routing
from erniekit.gradients import Gradients
from erniekit.losses import Loss, Selected, Terms, add_product, head_of_chunks, routing_terms

_NO_TERMS = Terms()


@dataclass(frozen=True)
class Pairs:
    """A row of pairs on the device of the model; `pairs_P4` is that of `shared_prompt`, int64.

    `keys` name the pairs, in order.
    """

    token_ids_T: Tensor
    labels_T: Tensor
    positions_T: Tensor
    pairs_P4: Tensor
    keys: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Objective:
    """A method and its numbers; see the keys of the same names in `erniekit.config`."""

    method: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    normalises_lengths: bool = False


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
    objective: Objective = Objective(),
    terms: Terms = _NO_TERMS,
    share: float = 1.0,
    chunk_size: int = 128,
    gradients: Gradients | None = None,
) -> Loss:
    """Loss of a row of pairs, summed and multiplied by `scale`, and the rewards it rests on.

    `reference_P2` is `sequence_log_probs` of the reference model, zeros for none; `scale` is one
    over the number of pairs of the whole optimizer step. A reward is beta times what the policy has
    gained on the reference. Of `parts`, `rewards_accuracy` is the share of pairs whose chosen
    answer has the larger reward, a tie counting one half. For the rest see `losses.next_token`.
    """
    routings: list[Routing | None] = []
    policy_P2 = sequence_log_probs(
        model, batch, chunk_size=chunk_size, gradients=gradients, routings=routings
    )
    gain_P2 = policy_P2 - reference_P2
    if objective.normalises_lengths:
        lengths_P2 = answer_lengths(batch).double()
        gain_P2 = gain_P2 * (lengths_P2.mean(1, keepdim=True) / lengths_P2)
    rewards_P2 = objective.beta * gain_P2
    margin_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    loss_of = PREFERENCE_LOSSES[objective.method]
    value = loss_of(margin_P, label_smoothing=objective.label_smoothing).sum() * scale
    routed = [routing for routing in routings if routing is not None]
    added = {name: part * share for name, part in routing_terms(model, routed, terms).items()}
    total = value + torch.stack(list(added.values())).sum() if added else value
    parts = {name: part.detach() for name, part in added.items()}
    parts |= {name: n_P.sum() * scale for name, n_P in _told(rewards_P2.detach()).items()}
    return Loss(total, value.detach(), parts, [routing.load_E for routing in routed])


def _told(rewards_P2: Tensor) -> dict[str, Tensor]:
    """What is recorded of each pair, by name."""
    margin_P = rewards_P2[:, 0] - rewards_P2[:, 1]
    return {
        "rewards_chosen": rewards_P2[:, 0],
        "rewards_rejected": rewards_P2[:, 1],
        "rewards_margin": margin_P,
        "rewards_accuracy": (margin_P.sign() + 1) / 2,
    }


def sequence_log_probs(
    model: ErnieModel,
    batch: Pairs,
    *,
    chunk_size: int = 128,
    gradients: Gradients | None = None,
    routings: list[Routing | None] | None = None,
) -> Tensor:
    """Log-probability of the chosen and the rejected answer of every pair, float64 `(P, 2)`.

    Sums are float64: what counts is the difference of two of them, each hundreds of nats large.
    With `gradients` the head's gradient is added to its sum there at once; `routings` as in
    `ErnieModel.hidden`.
    """
    attend = shared_prompt(batch.pairs_P4)
    hidden_TD = model.hidden(batch.token_ids_T, batch.positions_T, attend, routings=routings)
    labelled_T = batch.labels_T != UNTRAINED
    labelled_N = labelled_T.nonzero()[:, 0]
    weight_VD = model.head_weight
    is_summed = gradients is not None and torch.is_grad_enabled() and weight_VD.requires_grad
    values_N = ChunkedLogProbs.apply(
        model.model.norm(Selected.apply(hidden_TD, labelled_N, labelled_T)),
        weight_VD,
        batch.labels_T[labelled_N],
        chunk_size,
        gradients.sum_of(weight_VD) if gradients is not None and is_summed else None,
    )
    answer_N = _answers(batch, labelled_N)
    zeros = values_N.new_zeros(2 * len(batch.pairs_P4), dtype=torch.float64)
    return zeros.index_add(0, answer_N, values_N.double()).view(-1, 2)


def answer_lengths(batch: Pairs) -> Tensor:
    """Tokens with a loss of the chosen and the rejected answer of every pair, int64 `(P, 2)`."""
    answer_N = _answers(batch, (batch.labels_T != UNTRAINED).nonzero()[:, 0])
    return torch.bincount(answer_N, minlength=2 * len(batch.pairs_P4)).view(-1, 2)


def _answers(batch: Pairs, labelled_N: Tensor) -> Tensor:
    """The answer that each token belongs to, counted chosen, rejected, chosen, ..."""
    ends = batch.pairs_P4[:, 2:].flatten().contiguous()
    return torch.searchsorted(ends, labelled_N, right=True)


class ChunkedLogProbs(torch.autograd.Function):
    """`log softmax(W h_n)[target_n]` in float32, logits `chunk_size` rows at a time.

    The gradient of a row is its upstream number times something known in the forward pass, so with
    a frozen W everything is done there and logits are made once. The gradient of W needs the
    upstream numbers of all rows first: then logits are made again in the backward pass. It is added
    to `into` (float32) where that is given, and returned like any other otherwise.
    """

    @staticmethod
    def forward(
        ctx,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        chunk_size: int,
        into: Tensor | None = None,
    ):
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        values_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
        grad_ND = torch.empty_like(hidden_ND) if wants_hidden and not wants_weight else None
        frozen_VD, _ = head_of_chunks(weight_VD)
        for start in range(0, len(hidden_ND), chunk_size):
            rows = slice(start, start + chunk_size)
            chunk_CD, product_CV = _product(hidden_ND[rows], frozen_VD, grad_ND is not None)
            logits_CV = product_CV.detach()  # overwritten by onehot - softmax
            loss_C, _ = kernels.cross_entropy_(logits_CV, targets_N[rows], -1.0)
            values_N[rows] = -loss_C
            if grad_ND is not None:
                (grad_ND[rows],) = torch.autograd.grad(product_CV, chunk_CD, logits_CV)
            del product_CV, logits_CV  # before the next chunk's are made
        ctx.chunk_size, ctx.into = chunk_size, into
        if wants_weight:
            ctx.save_for_backward(hidden_ND, weight_VD, targets_N)
        else:
            ctx.save_for_backward(grad_ND, None, None)
        return values_N

    @staticmethod
    def backward(ctx, upstream_N: Tensor):
        if not ctx.needs_input_grad[1]:
            grad_ND = ctx.saved_tensors[0]
            return grad_ND * upstream_N[:, None].to(grad_ND.dtype), None, None, None, None
        hidden_ND, weight_VD, targets_N = ctx.saved_tensors
        wants_hidden = ctx.needs_input_grad[0]
        grad_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        grad_VD = ctx.into
        if grad_VD is None:
            grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        frozen_VD, is_short = head_of_chunks(weight_VD)
        for start in range(0, len(hidden_ND), ctx.chunk_size):
            rows = slice(start, start + ctx.chunk_size)
            chunk_CD, product_CV = _product(hidden_ND[rows], frozen_VD, wants_hidden)
            logits_CV, up_C1 = product_CV.detach(), upstream_N[rows, None]
            kernels.cross_entropy_(logits_CV, targets_N[rows], -1.0)
            if grad_ND is not None:
                (grad_CD,) = torch.autograd.grad(product_CV, chunk_CD, logits_CV)
                grad_ND[rows] = grad_CD * up_C1
            dtype = torch.bfloat16 if is_short else logits_CV.dtype
            add_product(grad_VD, logits_CV.to(dtype), (chunk_CD.detach() * up_C1).to(dtype))
            del product_CV, logits_CV  # before the next chunk's are made
        returned = None if ctx.into is not None else grad_VD.to(weight_VD.dtype)
        return grad_ND, returned, None, None, None


def _product(hidden_CD: Tensor, weight_VD: Tensor, wants_grad: bool) -> tuple[Tensor, Tensor]:
    """Rows and their logits; the rows' gradient then comes from the product's own backward."""
    chunk_CD = hidden_CD.detach()
    with torch.set_grad_enabled(wants_grad):
        chunk_CD.requires_grad_(wants_grad)
        return chunk_CD, kernels.linear(chunk_CD, weight_VD)
