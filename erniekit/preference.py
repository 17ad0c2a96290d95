"""Losses of preference training, as functions of four log-probabilities of each pair.

Policy and reference each give the log-probability of the chosen and of the rejected answer; a
method is a function of these and a row of `erniekit.preference_losses`. Logits are never held
whole: the labelled positions meet the vocabulary a few at a time, in the forward pass for the
log-probability and once more in the backward pass, when the weight of each sequence is known.

Legend: T tokens of the batch, N labelled tokens, C of them at a time, D hidden size, V vocabulary,
P pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ernie.attention import Attend, packed_causal, shared_prompt
from ernie.chat import UNTRAINED
from ernie.model import ErnieModel
from ernie.moe.router import Routing
from erniekit.device_batch import Flat, Pairs
from erniekit.gradients import Gradients
from erniekit.losses import (
    Loss,
    Selected,
    Terms,
    add_product,
    head_of_chunks,
    hidden_of,
    logit_gradients,
    with_terms,
)
from erniekit.preference_losses import Objective, gains

NO_TERMS = Terms()
SIGMOID = Objective()


def preference(
    model: ErnieModel,
    batch: Pairs,
    reference_P2: Tensor,
    *,
    scale: float,
    objective: Objective = SIGMOID,
    sft_scale: float = 0.0,
    baseline_2: Tensor | None = None,
    terms: Terms = NO_TERMS,
    share: float = 1.0,
    chunk_size: int = 128,
    gradients: Gradients | None = None,
) -> Loss:
    """Loss of a row of pairs, summed and multiplied by `scale`, and the rewards it rests on.

    `reference_P2` is `sequence_log_probs` of the reference model, zeros for none; `scale` is one
    over the number of pairs of the whole optimizer step, `sft_scale` one over that of the trained
    tokens of its chosen answers, and `baseline_2` as in `FORMULAS`. A reward is beta times
    what the policy has gained on the reference. Of `parts`, `rewards_accuracy` is the share of
    pairs whose chosen answer has the larger reward, a tie counting one half. For the rest see
    `losses.next_token`.
    """
    routings: list[Routing | None] = []
    policy_P2 = sequence_log_probs(
        model, batch, chunk_size=chunk_size, gradients=gradients, routings=routings
    )
    gain_P2 = gains(policy_P2, reference_P2, answer_lengths(batch), objective)
    given = (baseline_2,) if objective.row.uses_baselines else ()
    compared = objective.formula(gain_P2, objective, *given).sum() * scale
    value, parts = objective.preference_weight * compared, {}
    if objective.sft_weight:
        supervised = -policy_P2[:, 0].sum() * sft_scale
        value = value + objective.sft_weight * supervised
        parts = {"preference_loss": compared.detach(), "sft_loss": supervised.detach()}
    told = told_of_pairs(objective.beta * gain_P2.detach())
    parts |= {name: n_P.sum() * scale for name, n_P in told.items()}
    return with_terms(model, value, parts, routings, terms, share)


def told_of_pairs(rewards_P2: Tensor) -> dict[str, Tensor]:
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
    ends, attend = _ends_of_answers(batch), shared_prompt(batch.pairs_P4)
    return _log_probs(model, batch, attend, ends, chunk_size, gradients, routings).view(-1, 2)


def segment_log_probs(
    model: ErnieModel,
    batch: Flat,
    *,
    chunk_size: int = 128,
    gradients: Gradients | None = None,
    routings: list[Routing | None] | None = None,
) -> Tensor:
    """Log-probability of the labels of every segment, float64 `(S,)`; as `sequence_log_probs`."""
    ends = batch.cu_seqlens_S1[1:].long()
    attend = packed_causal(batch.cu_seqlens_S1, batch.lengths)
    return _log_probs(model, batch, attend, ends, chunk_size, gradients, routings)


def _log_probs(
    model: ErnieModel,
    batch: Pairs | Flat,
    attend: Attend,
    ends: Tensor,
    chunk_size: int,
    gradients: Gradients | None,
    routings: list[Routing | None] | None,
) -> Tensor:
    """Sums over the labelled tokens before each of `ends`, from the end before it on."""
    hidden_TD = hidden_of(model, batch, attend, routings)
    values_N = label_log_probs(
        model, hidden_TD, batch.labels_T, chunk_size=chunk_size, gradients=gradients
    )
    labelled_N = (batch.labels_T != UNTRAINED).nonzero()[:, 0]
    place_N = torch.searchsorted(ends, labelled_N, right=True)
    zeros = values_N.new_zeros(len(ends), dtype=torch.float64)
    return zeros.index_add(0, place_N, values_N.double())


def label_log_probs(
    model: ErnieModel,
    hidden_TD: Tensor,
    labels_T: Tensor,
    *,
    chunk_size: int = 128,
    gradients: Gradients | None = None,
) -> Tensor:
    """Log-probability of each label that is one, float32 `(N,)`; see `sequence_log_probs`."""
    labelled_T = labels_T != UNTRAINED
    labelled_N = labelled_T.nonzero()[:, 0]
    weight_VD = model.head_weight
    is_summed = gradients is not None and torch.is_grad_enabled() and weight_VD.requires_grad
    return ChunkedLogProbs.apply(
        model.model.norm(Selected.apply(hidden_TD, labelled_N, labelled_T)),
        weight_VD,
        labels_T[labelled_N],
        chunk_size,
        gradients.sum_of(weight_VD) if gradients is not None and is_summed else None,
    )


def answer_lengths(batch: Pairs) -> Tensor:
    """Tokens with a loss of the chosen and the rejected answer of every pair, int64 `(P, 2)`."""
    ends = _ends_of_answers(batch)
    labelled_N = (batch.labels_T != UNTRAINED).nonzero()[:, 0]
    place_N = torch.searchsorted(ends, labelled_N, right=True)
    return torch.bincount(place_N, minlength=len(ends)).view(-1, 2)


def _ends_of_answers(batch: Pairs) -> Tensor:
    """Where the answers end, in the order chosen, rejected, chosen, ..."""
    return batch.pairs_P4[:, 2:].flatten().contiguous()


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
        assert chunk_size > 0, f"chunks of {chunk_size} tokens: the settings are not resolved"
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        values_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
        grad_ND = torch.empty_like(hidden_ND) if wants_hidden and not wants_weight else None
        frozen_VD, _ = head_of_chunks(weight_VD)
        for start in range(0, len(hidden_ND), chunk_size):
            rows = slice(start, start + chunk_size)
            wanted = grad_ND is not None
            chunk = logit_gradients(hidden_ND[rows], frozen_VD, targets_N[rows], -1.0, wanted)
            values_N[rows] = -chunk.loss_C
            if grad_ND is not None and chunk.grad_CD is not None:
                grad_ND[rows] = chunk.grad_CD
            del chunk  # before the next one is made
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
            up_C1 = upstream_N[rows, None]
            chunk = logit_gradients(hidden_ND[rows], frozen_VD, targets_N[rows], -1.0, wants_hidden)
            if grad_ND is not None and chunk.grad_CD is not None:
                grad_ND[rows] = chunk.grad_CD * up_C1
            add_product(grad_VD, chunk.logits_CV, hidden_ND[rows] * up_C1, is_short=is_short)
            del chunk  # before the next one is made
        returned = None if ctx.into is not None else grad_VD.to(weight_VD.dtype)
        return grad_ND, returned, None, None, None
