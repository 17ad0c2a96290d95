"""The loss of single answers that were judged: Kahneman-Tversky optimisation.

    desirable      w_d (1 - sigmoid(beta (g - z)))      g: what the policy has gained on the
    undesirable    w_u (1 - sigmoid(beta (z - g)))         reference for the answer, in nats

z estimates the divergence KL(policy || reference): the mean gain, over a whole step, of answers to
*other* prompts, not below 0, through which no gradient flows. It is measured by a forward pass over
all batches of the step before the first of them is trained, so that a step means the same however
it is cut; the published implementations take it from each small batch. Sources: KTO (arXiv
2402.01306, eq. 8 and section 4.2); weights and averages as in TRL and PaddleNLP.

Legend: S judged answers, one segment each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ernie.model import ErnieModel
from ernie.moe.router import Routing
from erniekit.data.batch import Batch
from erniekit.device_batch import Judged, to_device
from erniekit.gradients import Gradients
from erniekit.losses import Loss, Terms, with_terms
from erniekit.parallel.deal import shared
from erniekit.parallel.ranks import ALONE, Ranks
from erniekit.preference import NO_TERMS, segment_log_probs


@dataclass(frozen=True)
class Utility:
    """The numbers of the method; see the keys of the same names in `erniekit.config`."""

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


@dataclass(frozen=True)
class Usual:
    """What is known of a whole step: z, and how many answers of each kind there are."""

    divergence: Tensor
    num_desirable: int
    num_undesirable: int


def kto(
    model: ErnieModel,
    batch: Judged,
    reference_S: Tensor,
    *,
    scale: float,
    usual: Usual,
    utility: Utility = Utility(),
    terms: Terms = NO_TERMS,
    share: float = 1.0,
    chunk_size: int = 128,
    gradients: Gradients | None = None,
) -> Loss:
    """Loss of a row of judged answers, summed and multiplied by `scale`.

    `reference_S` is `segment_log_probs` of the reference model, zeros for none; `scale` is one over
    the number of answers of the whole optimizer step. Of `parts`, `rewards_chosen` and
    `rewards_rejected` are means of beta g over the desirable and the undesirable answers of the
    step, left out where it has none, `rewards_accuracy` is the share of answers on their side of z,
    a tie counting one half, and `kl` is z. For the rest see `losses.next_token`.
    """
    routings: list[Routing | None] = []
    policy_S = segment_log_probs(
        model, batch.answers, chunk_size=chunk_size, gradients=gradients, routings=routings
    )
    gain_S = policy_S - reference_S
    sign_S = batch.is_desirable_S.to(gain_S.dtype) * 2 - 1
    above_S = sign_S * (gain_S - usual.divergence)
    weight_S = torch.where(
        batch.is_desirable_S, utility.desirable_weight, utility.undesirable_weight
    )
    value = (weight_S * torch.sigmoid(-utility.beta * above_S)).sum() * scale
    told = _told(batch, utility.beta * gain_S.detach(), usual)
    told["rewards_accuracy"] = ((above_S.detach().sign() + 1) / 2).sum() * scale
    told["kl"] = usual.divergence * share
    return with_terms(model, value, told, routings, terms, share)


def _told(batch: Judged, rewards_S: Tensor, usual: Usual) -> dict[str, Tensor]:
    """The batch's part of each mean over the step."""
    found = {}
    if usual.num_desirable:
        chosen = rewards_S[batch.is_desirable_S].sum()
        found["rewards_chosen"] = chosen / usual.num_desirable
    if usual.num_undesirable:
        rejected = rewards_S[~batch.is_desirable_S].sum()
        found["rewards_rejected"] = rejected / usual.num_undesirable
    if len(found) == 2:
        found["rewards_margin"] = found["rewards_chosen"] - found["rewards_rejected"]
    return found


def judged_log_probs(model: ErnieModel, batch: Judged, *, chunk_size: int = 128) -> Tensor:
    """Log-probabilities of each answer and of the answer to another prompt, float64 `(S, 2)`."""
    parts = (batch.answers, batch.others)
    return torch.stack(
        [segment_log_probs(model, part, chunk_size=chunk_size) for part in parts], dim=1
    )


@torch.no_grad()
def usual(
    model: ErnieModel,
    batches: Sequence[Batch],
    reference_of: Callable[[Judged], Tensor],
    *,
    ranks: Ranks = ALONE,
    chunk_size: int = 128,
) -> dict[str, Any]:
    """The `Usual` of a step under this name; `reference_of` gives the answers' log-probabilities
    and those of the others, `(S, 2)`.
    """
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for batch, counts in shared(batches, ranks):
        judged = to_device(batch, model.device)
        assert isinstance(judged, Judged)
        policy_S = segment_log_probs(model, judged.others, chunk_size=chunk_size)
        total += counts * (policy_S - reference_of(judged)[:, 1]).sum()
    (total,) = ranks.all_reduce([total])
    num_all = sum(len(batch.keys) for batch in batches)
    kinds = [batch.is_desirable_S for batch in batches if batch.is_desirable_S is not None]
    num_desirable = sum(int(kind_S.sum()) for kind_S in kinds)
    divergence = (total / num_all).clamp(min=0)
    return {"usual": Usual(divergence, num_desirable, num_all - num_desirable)}
