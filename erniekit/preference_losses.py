"""The losses of preference training: functions of what each answer of a pair has gained.

A gain is the log-probability of an answer under the policy less that under the reference, in nats;
summed over the tokens of the answer, or their mean where the row of `LOSS_TYPES`, in
`erniekit.config.methods`, says so. What else a method needs (a reference, baselines over the whole
step, a supervised term) is data of its row too. `FORMULAS` gives the loss of every pair, `(P,)`, of
`gain_P2` and the objective. They are those of the papers; `docs/methods/dpo.md` tells where
ERNIEKit's differ.

Legend: P pairs; column 0 is the chosen answer (gain a), column 1 the rejected one (gain b).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from erniekit.config.methods import LOSS_TYPES, LossType

_CERTAIN = -1e-12  # the largest mean log-probability whose odds are finite here


@dataclass(frozen=True)
class Objective:
    """A method and its numbers; see the keys of the same names in `erniekit.config`.

    `preference_weight` and `sft_weight` are pref_loss_ratio and sft_loss_ratio.
    """

    method: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    normalises_lengths: bool = False
    simpo_gamma: float = 0.5
    dpop_lambda: float = 50.0
    preference_weight: float = 1.0
    sft_weight: float = 0.0

    @property
    def row(self) -> LossType:
        return LOSS_TYPES[self.method]

    @property
    def formula(self) -> Callable[..., Tensor]:
        return FORMULAS[self.method]


def gains(
    policy_P2: Tensor, reference_P2: Tensor, lengths_P2: Tensor, objective: Objective
) -> Tensor:
    """What each answer has gained, as the method counts it; `lengths_P2` in tokens with a loss.

    `normalises_lengths` scales a sum by the mean length of its pair over the answer's own. Source:
    ERNIEKit's `normalize_logps`.
    """
    gain_P2 = policy_P2 - reference_P2
    if objective.row.uses_means:
        return gain_P2 / lengths_P2
    if objective.normalises_lengths:
        lengths_P2 = lengths_P2.to(gain_P2.dtype)
        return gain_P2 * (lengths_P2.mean(1, keepdim=True) / lengths_P2)
    return gain_P2


def sigmoid(gain_P2: Tensor, o: Objective) -> Tensor:
    """-log sigmoid(beta (a - b)); a share of the labels is taken to be wrong.

    Source: DPO (arXiv 2305.18290, eq. 7); conservative DPO for the smoothing.
    """
    return _smoothed(o.beta * _margin(gain_P2), o)


def robust(gain_P2: Tensor, o: Objective) -> Tensor:
    """The sigmoid loss without the bias that a share of wrong labels gives it.

    Source: robust DPO (arXiv 2403.00409, eq. 12).
    """
    margin_P, e = o.beta * _margin(gain_P2), o.label_smoothing
    return (-(1 - e) * logsigmoid(margin_P) + e * logsigmoid(-margin_P)) / (1 - 2 * e)


def hinge(gain_P2: Tensor, o: Objective) -> Tensor:
    """max(0, 1 - beta (a - b)). Source: SLiC-HF (arXiv 2305.10425), RSO (2309.06657)."""
    return torch.relu(1 - o.beta * _margin(gain_P2))


def ipo(gain_P2: Tensor, o: Objective) -> Tensor:
    """(a - b - 1 / (2 beta))^2 of means over tokens. Source: IPO (arXiv 2310.12036, eq. 17)."""
    return (_margin(gain_P2) - 1 / (2 * o.beta)).square()


def simpo(gain_P2: Tensor, o: Objective) -> Tensor:
    """-log sigmoid(beta (a - b) - gamma), of means, without a reference.

    Source: SimPO (arXiv 2405.14734, eq. 6), whose gamma is `simpo_gamma`; smoothing as in ERNIEKit.
    """
    return _smoothed(o.beta * _margin(gain_P2) - o.simpo_gamma, o)


def dpop(gain_P2: Tensor, o: Objective) -> Tensor:
    """-log sigmoid(beta (a - b - lambda max(0, -a))): the chosen answer shall not become less
    likely. Source: DPO-Positive (arXiv 2402.13228, eq. 3).
    """
    lost_P = torch.relu(-gain_P2[:, 0])
    return -logsigmoid(o.beta * (_margin(gain_P2) - o.dpop_lambda * lost_P))


def sppo_hard(gain_P2: Tensor, o: Objective) -> Tensor:
    """(a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2.

    Source: SPPO (arXiv 2405.00675, eq. 4.7) with probabilities of winning of 1 and 0.
    """
    half = 1 / (2 * o.beta)
    return (gain_P2[:, 0] - half).square() + (gain_P2[:, 1] + half).square()


def nca_pair(gain_P2: Tensor, o: Objective) -> Tensor:
    """-log sigmoid(beta a) - log sigmoid(-beta a) / 2 - log sigmoid(-beta b) / 2.

    Source: noise contrastive alignment (arXiv 2402.05369, table 2) for two answers.
    """
    reward_P2 = o.beta * gain_P2
    return -logsigmoid(reward_P2[:, 0]) - 0.5 * logsigmoid(-reward_P2).sum(1)


def kto_pair(gain_P2: Tensor, o: Objective, baseline_2: Tensor) -> Tensor:
    """Mean over both answers of 1 - sigmoid(beta (a - B)) and 1 - sigmoid(beta (A - b)).

    A and B are the baselines of the chosen and the rejected column. Source: KTO (arXiv 2402.01306,
    eq. 8), each half estimating the KL divergence for the other, as in ERNIEKit.
    """
    chosen_P = torch.sigmoid(-o.beta * (gain_P2[:, 0] - baseline_2[1]))
    rejected_P = torch.sigmoid(-o.beta * (baseline_2[0] - gain_P2[:, 1]))
    return (chosen_P + rejected_P) / 2


def odds_ratio(gain_P2: Tensor, o: Objective) -> Tensor:
    """-log sigmoid(log odds(a) - log odds(b)) of means, without a reference: odds p / (1 - p).

    Source: ORPO (arXiv 2403.07691, eq. 7).
    """
    mean_P2 = gain_P2.clamp(max=_CERTAIN)
    log_odds_P2 = mean_P2 - torch.log(-torch.expm1(mean_P2))
    return -logsigmoid(_margin(log_odds_P2))


def _margin(value_P2: Tensor) -> Tensor:
    return value_P2[:, 0] - value_P2[:, 1]


def _smoothed(margin_P: Tensor, o: Objective) -> Tensor:
    right_P, wrong_P = logsigmoid(margin_P), logsigmoid(-margin_P)
    return -(1 - o.label_smoothing) * right_P - o.label_smoothing * wrong_P


# With `uses_baselines` a formula takes a third argument, `baseline_2`: the mean gain of each column
# over all pairs of the optimizer step, not below 0, through which no gradient flows.
FORMULAS: dict[str, Callable[..., Tensor]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "simpo": simpo,
    "dpop": dpop,
    "sppo_hard": sppo_hard,
    "nca_pair": nca_pair,
    "or": odds_ratio,
    "orpo": odds_ratio,
    "kto_pair": kto_pair,
    "robust": robust,
}
