"""What training minimises, as functions of the model and a batch.

`next_token` never holds the logits of a batch: trained positions meet the vocabulary a few at a
time, and one pass gives loss and gradients (the softmax is computed once, in the forward pass, and
the logits are overwritten by their gradient). Losses are *sums times `scale`*, where scale is one
over the number of trained tokens of the whole optimizer step, so that 1 x 8 and 8 x 1 are the same
step.

Legend: T tokens of the batch, N trained tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ernie import kernels
from ernie.attention import Attend, packed_causal
from ernie.chat import UNTRAINED
from ernie.model import Embeds, ErnieModel
from ernie.moe import balance
from ernie.moe.router import Router, Routing
from erniekit.device_batch import Flat, Seen
from erniekit.gradients import Gradients

if TYPE_CHECKING:
    from erniekit.data.batch import Batch

# Parts of a `Loss` that train the router.
ROUTER_LOSSES = ("aux_loss", "z_loss", "orthogonal_loss")


@dataclass(frozen=True)
class Terms:
    """Weights of what is added to the next-token loss; added to the gradient, not to its value."""

    load_balance: float = 0.0
    orthogonal: float = 0.0
    z: float = 0.0
    multi_token: float = 0.0
    balance: str = "none"  # form of `balanced`
    num_groups: int = 1  # within which the orthogonality loss compares experts


@dataclass
class Loss:
    """`total` is to be differentiated; `value` is the next-token part alone, detached.

    `num_right` counts the trained tokens that the model held the likeliest, where that is known.
    """

    total: Tensor
    value: Tensor
    parts: dict[str, Tensor]
    loads_LE: list[Tensor]  # tokens per expert of each bank of each MoE layer
    num_right: Tensor | None = None
    entropies_L: list[Tensor] = field(default_factory=list)  # of each, summed over the tokens


def next_token(
    model: ErnieModel,
    batch: Flat,
    *,
    scale: float,
    chunk_size: int = 128,
    terms: Terms = Terms(),
    share: float = 1.0,
    gradients: Gradients | None = None,
    balance_factor: float | None = None,
) -> Loss:
    """Cross-entropy of every trained token, summed and multiplied by `scale`.

    `share` is this batch's part of the optimizer step, by which the losses that are means over a
    batch are weighted. With `gradients` the head's gradient is added to its sum there at once.
    `balance_factor` is what `balanced` measures of a step.
    """
    routings: list[Routing | None] = []
    attend = packed_causal(batch.cu_seqlens_S1, batch.lengths)
    hidden_TD = hidden_of(model, batch, attend, routings)
    num_right = torch.zeros((), dtype=torch.int64, device=hidden_TD.device)
    weights_T = (
        None if balance_factor is None else token_weights(batch, terms.balance, balance_factor)
    )
    value = _head_loss(
        model, hidden_TD, batch.labels_T, scale, chunk_size, gradients, num_right, weights_T
    )
    trained = {}
    if terms.multi_token:
        weighted = scale * terms.multi_token / len(model.model.mtp)
        trained["mtp_loss"] = _multi_token(
            model, batch, hidden_TD, weighted, chunk_size, gradients, weights_T
        )
    loss = with_terms(
        model, value, {}, routings, terms, share, trained=trained, num_padding=batch.num_padding
    )
    return replace(loss, num_right=num_right)


def with_terms(
    model: ErnieModel,
    value: Tensor,
    reported: dict[str, Tensor],
    routings: list[Routing | None],
    terms: Terms,
    share: float,
    *,
    trained: dict[str, Tensor] | None = None,
    num_padding: int = 0,
) -> Loss:
    """`value`, with the losses of the router and those of `trained` added to what is trained;
    `reported` is recorded beside these. How the last `num_padding` tokens were routed says nothing.
    """
    routed = [routing.without_last(num_padding) for routing in routings if routing is not None]
    added = dict(trained or {})
    added |= {name: part * share for name, part in routing_terms(model, routed, terms).items()}
    total = value + torch.stack(list(added.values())).sum() if added else value
    parts = {name: part.detach() for name, part in (added | reported).items()}
    parts |= {name: part * share for name, part in dropped_share(routed).items()}
    loads_LE, entropies_L = figures_of(model, routed)
    return Loss(total, value.detach(), parts, loads_LE, entropies_L=entropies_L)


def score_targets(
    model: ErnieModel, hidden_ND: Tensor, targets_N: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target (float32), and whether the model holds it the likeliest. The
    logits of `chunk_size` rows at a time are held.
    """
    log_probs, is_top = [], []
    for rows_CD, targets_C in zip(hidden_ND.split(chunk_size), targets_N.split(chunk_size)):
        logits_CV = model.head(rows_CD).float()
        chosen_C = logits_CV.gather(-1, targets_C[:, None])[:, 0]
        log_probs.append(chosen_C - logits_CV.logsumexp(-1))
        is_top.append(logits_CV.argmax(-1) == targets_C)
        del logits_CV  # before the next chunk's are made
    return torch.cat(log_probs), torch.cat(is_top)


class Row(Protocol):
    """What the model reads of a batch, however its tokens look at one another."""

    @property
    def token_ids_T(self) -> Tensor: ...
    @property
    def positions_T(self) -> Tensor: ...
    @property
    def pictures(self) -> Seen | None: ...


def hidden_of(
    model: ErnieModel, batch: Row, attend: Attend, routings: list[Routing | None] | None = None
) -> Tensor:
    """`ErnieModel.hidden` of a batch and its pictures, `(T, D)`."""
    seen, modality, embeds = batch.pictures, None, None
    if seen is not None:
        modality = seen.modality_T
        if seen.grids:
            rows_LD = model.picture_rows(seen.pixel_values_PC, seen.grids)
            embeds = Embeds(rows_LD, seen.places_L)
    return model.hidden(
        batch.token_ids_T,
        batch.positions_T,
        attend,
        modality=modality,
        embeds=embeds,
        routings=routings,
    )


def balanced(window: Sequence[Batch], form: str, budget: int) -> dict[str, float]:
    """What `next_token` must know of a step for a balance of tokens (`token_balance_loss`): a
    factor that goes with `token_weights`, by which gradients are those of

        none     sum of all losses / trained tokens                  (nothing is measured)
        budget   sum of all losses / (tokens that the rows of the step have room for, `budget`)
        sample   mean over samples of (sum of its losses / all its tokens, masked ones too)

    so that a sample with many tokens of pictures and a short answer does not push as hard as a long
    text. The value of the loss stays the first. Source: PaddleFormers' `token_balance_loss`;
    ERNIE 4.5 technical report.
    """
    if form == "none":
        return {}
    num_trained = sum(batch.num_trained for batch in window)
    if form == "budget":
        return {"balance_factor": num_trained / budget}
    return {"balance_factor": num_trained / sum(batch.num_samples for batch in window)}


def token_weights(batch: Flat, form: str, factor: float) -> Tensor:
    """By which the gradient of each token's loss is multiplied, float32 `(T,)`."""
    if form == "budget":
        return torch.full(batch.labels_T.shape, factor, device=batch.labels_T.device)
    sizes_S = batch.cu_seqlens_S1.diff()
    return (factor / sizes_S).float().repeat_interleave(sizes_S)


def figures_of(model: ErnieModel, routed: list[Routing]) -> tuple[list[Tensor], list[Tensor]]:
    """Load `(E,)` and entropy of each bank of each MoE layer, in the order of `routers_of`; zero of
    a bank that had no tokens.
    """
    loads, entropies = [], []
    num_banks = len(model.config.experts_per_bank)
    for routing in routed:
        banks = routing.banks
        loads += [bank.load_E for bank in banks]
        entropies += [balance.entropy(bank) for bank in banks]
        for _ in range(num_banks - len(banks)):
            loads.append(torch.zeros_like(loads[-1]))
            entropies.append(torch.zeros_like(entropies[-1]))
    return loads, entropies


def dropped_share(routed: list[Routing]) -> dict[str, Tensor]:
    """Share of the choices that were over the capacity of their expert, where there is one."""
    banks = [bank for routing in routed for bank in routing.banks]
    kept = [bank.kept_TK for bank in banks if bank.kept_TK is not None and len(bank.kept_TK)]
    if not kept:
        return {}
    return {"moe_dropped": 1 - torch.stack([kept_TK.float().mean() for kept_TK in kept]).mean()}


def routers_of(model: ErnieModel) -> list[Router]:
    """The router of each bank of each MoE layer."""
    return [module for module in model.model.layers.modules() if isinstance(module, Router)]


def routing_terms(model: ErnieModel, routed: list[Routing], terms: Terms) -> dict[str, Tensor]:
    """Mean over the MoE layers of each wanted loss, times its weight; of two banks the sum."""
    if not routed:
        return {}
    weights = [gate.weight for gate in routers_of(model)]
    banks = [bank for routing in routed for bank in routing.banks if len(bank.probs_TE)]
    values = {
        "aux_loss": (terms.load_balance, lambda: map(balance.load_balance_loss, banks)),
        "z_loss": (terms.z, lambda: map(balance.z_loss, banks)),
        "orthogonal_loss": (
            terms.orthogonal,
            lambda: (balance.orthogonal_loss(w, terms.num_groups) for w in weights),
        ),
    }
    return {
        name: weight * torch.stack(list(losses())).sum() / len(routed)
        for name, (weight, losses) in values.items()
        if weight
    }


def _multi_token(
    model: ErnieModel,
    batch: Flat,
    hidden_TD: Tensor,
    scale: float,
    chunk_size: int,
    gradients: Gradients | None,
    weights_T: Tensor | None,
) -> Tensor:
    """Loss of the token after next, summed over the prediction depths.

    A position takes part where the token after next belongs to its own segment and is trained;
    `weights_T` are alike within a segment.
    """
    losses = []
    token_ids_T, labels_T = batch.token_ids_T, batch.labels_T
    attend = packed_causal(batch.cu_seqlens_S1, batch.lengths)
    ends = batch.cu_seqlens_S1[1:].long() - 1
    for depth in range(len(model.model.mtp)):
        token_ids_T, labels_T = token_ids_T.roll(-1), labels_T.roll(-1)
        labels_T[ends] = UNTRAINED  # what was rolled in belongs to the next segment
        hidden_TD = model.hidden_after_next(
            token_ids_T, hidden_TD, batch.positions_T, attend, depth=depth
        )
        losses.append(
            _head_loss(
                model, hidden_TD, labels_T, scale, chunk_size, gradients, weights_T=weights_T
            )
        )
    return torch.stack(losses).sum()


def _head_loss(
    model: ErnieModel,
    hidden_TD: Tensor,
    labels_T: Tensor,
    scale: float,
    chunk_size: int,
    gradients: Gradients | None,
    num_right: Tensor | None = None,
    weights_T: Tensor | None = None,
) -> Tensor:
    trained_T = labels_T != UNTRAINED
    trained_N = trained_T.nonzero()[:, 0]
    hidden_ND = model.model.norm(Selected.apply(hidden_TD, trained_N, trained_T))
    weight_VD = model.head_weight
    into = gradients.sum_of(weight_VD) if gradients and weight_VD.requires_grad else None
    weights_N = None if weights_T is None else weights_T[trained_N]
    return ChunkedCrossEntropy.apply(
        hidden_ND, weight_VD, labels_T[trained_N], scale, chunk_size, into, num_right, weights_N
    )


def head_of_chunks(weight_VD: Tensor) -> tuple[Tensor, bool]:
    """The head, rounded once for all chunks where products are to be bfloat16; whether it was."""
    is_short = weight_VD.device.type == "cpu" and kernels.has_bfloat16_products()
    return weight_VD.detach().to(torch.bfloat16) if is_short else weight_VD.detach(), is_short


class Selected(torch.autograd.Function):
    """Rows by ascending index, no two alike, so that the backward pass is a gather too."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, index_N: Tensor, is_selected_T: Tensor) -> Tensor:
        ctx.save_for_backward(is_selected_T)
        return x_TD[index_N]

    @staticmethod
    def backward(ctx, grad_ND: Tensor):
        (is_selected_T,) = ctx.saved_tensors
        if not len(grad_ND):
            return grad_ND.new_zeros(len(is_selected_T), grad_ND.shape[1]), None, None
        place_T = (is_selected_T.cumsum(0) - 1).clamp_(min=0)
        return grad_ND[place_T].masked_fill_(~is_selected_T[:, None], 0), None, None


@dataclass(frozen=True)
class Chunk:
    """Some rows before the vocabulary: their losses, which are right, and two gradients."""

    loss_C: Tensor
    right_C: Tensor
    logits_CV: Tensor  # the gradient of the logits
    grad_CD: Tensor | None  # of the hidden rows


def logit_gradients(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    targets_C: Tensor,
    scale: float,
    wants_hidden: bool,
    weights_C: Tensor | None = None,
) -> Chunk:
    """Cross-entropy of rows, and the gradients of `scale` times its sum, where given with a weight
    for each row; logits are made once.
    """
    chunk_CD = hidden_CD.detach()
    with torch.set_grad_enabled(wants_hidden):  # where products of training differ from others
        product_CV = kernels.linear(chunk_CD.requires_grad_(wants_hidden), weight_VD)
    logits_CV = product_CV.detach()  # overwritten by their gradient
    loss_C, right_C = kernels.cross_entropy_(logits_CV, targets_C, scale)
    if weights_C is not None:
        logits_CV *= weights_C[:, None]
    grad_CD = kernels.rows_gradient(logits_CV, weight_VD) if wants_hidden else None
    return Chunk(loss_C, right_C, logits_CV, grad_CD)


def add_product(total_VD: Tensor, left_CV: Tensor, right_CD: Tensor, *, is_short: bool) -> None:
    """`total += left.T @ right`, summed in float32 whatever the factors are: of the dtype of
    `left`, or bfloat16 where products are to be (`is_short`).
    """
    dtype = torch.bfloat16 if is_short else left_CV.dtype
    kernels.add_product_(total_VD, left_CV.to(dtype), right_CD.detach().to(dtype))


class ChunkedCrossEntropy(torch.autograd.Function):
    """`scale * sum_n -log softmax(W h_n)[target_n]`, logits `chunk_size` rows at a time, float32.

    Gradients are formed in the forward pass. That of the weight is added to `into` (float32) when
    it is given, for an upstream gradient of 1, and is otherwise returned like any other. Tokens
    whose logit is the largest are added to `num_right`. `weights` `(N,)` multiply the gradients of
    tokens, not the value.
    """

    @staticmethod
    def forward(
        ctx,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        scale: float,
        chunk_size: int,
        into: Tensor | None,
        num_right: Tensor | None = None,
        weights_N: Tensor | None = None,
    ) -> Tensor:
        assert chunk_size > 0, f"chunks of {chunk_size} tokens: the settings are not resolved"
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        grad_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        grad_VD = into
        if wants_weight and into is None:
            grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        frozen_VD, is_short = head_of_chunks(weight_VD)
        for start in range(0, len(hidden_ND), chunk_size):
            rows = slice(start, start + chunk_size)
            weights_C = None if weights_N is None else weights_N[rows]
            chunk = logit_gradients(
                hidden_ND[rows], frozen_VD, targets_N[rows], scale, wants_hidden, weights_C
            )
            total += chunk.loss_C.sum()
            if num_right is not None:
                num_right += chunk.right_C.sum()
            if grad_ND is not None and chunk.grad_CD is not None:
                grad_ND[rows] = chunk.grad_CD
            if wants_weight and grad_VD is not None:
                add_product(grad_VD, chunk.logits_CV, hidden_ND[rows], is_short=is_short)
            del chunk  # before the next one is made
        ctx.is_summed = into is not None
        ctx.save_for_backward(grad_ND, None if ctx.is_summed or not wants_weight else grad_VD)
        return total * scale

    @staticmethod
    def backward(ctx, upstream: Tensor):
        grad_ND, grad_VD = ctx.saved_tensors
        return (
            None if grad_ND is None else grad_ND * upstream.to(grad_ND.dtype),
            None if grad_VD is None else grad_VD * upstream,
            None,
            None,
            None,
            None,
            None,
            None,
        )
