"""Which experts a token goes to, and with which weights.

Legend: T tokens, D hidden size, E experts of one bank, K chosen experts per token.

    p = softmax(W x)                     float32, over the experts of the token's own bank
    chosen = top-k of (p + bias)         the bias steers the *choice* only
    weight = p[chosen] / sum p[chosen]   the bias is not in the weight

With a capacity (training only; a `Router` has none unless it is given one) choices that are one too
many for their expert have weight 0, and the others of the token share its place in the sum.

The correction bias is not trained by gradient: balancing moves it after each optimizer step
(`ernie.moe.balance`), which evens the load without a loss term that bends the model.
Source: PaddleFormers `topk_gate`, transformers `Ernie4_5_MoeTopKRouter`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ernie.config import ErnieConfig


@dataclass(frozen=True)
class Routing:
    """One bank's decision for T tokens, and what the balance losses need to know of it."""

    experts_TK: Tensor  # int64, indices of the chosen experts
    weights_TK: Tensor  # float32, each row sums to 1 (to 0 where all of it is over capacity)
    probs_TE: Tensor  # float32 softmax over all experts, before the bias
    logits_TE: Tensor  # float32
    kept_TK: Tensor | None = None  # bool, choices within the capacity, where there is one
    # In a layer with two banks: this one is about the text tokens, and here is what the vision bank
    # decided about the vision tokens, if there are any.
    vision: Routing | None = None

    @property
    def banks(self) -> tuple[Routing, ...]:
        """The decisions of all banks that had tokens to decide about, text first."""
        return (self,) if self.vision is None else (self, self.vision)

    def without_last(self, count: int) -> Routing:
        """The same without the last `count` text tokens."""
        if not count:
            return self
        rows = slice(len(self.probs_TE) - count)
        return replace(
            self,
            experts_TK=self.experts_TK[rows],
            weights_TK=self.weights_TK[rows],
            probs_TE=self.probs_TE[rows],
            logits_TE=self.logits_TE[rows],
            kept_TK=None if self.kept_TK is None else self.kept_TK[rows],
        )

    @property
    def load_E(self) -> Tensor:
        """How many (token, choice) pairs each expert got, int64 `(E,)`."""
        return counts_of(self.experts_TK, self.probs_TE.shape[1])


def counts_of(experts: Tensor, num_experts: int) -> Tensor:
    """How often each expert occurs, int64 `(E,)`; unlike bincount it does not wait for a GPU."""
    return (experts.flatten()[:, None] == torch.arange(num_experts, device=experts.device)).sum(0)


def within_capacity(experts_TK: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Which choices are among the first `capacity` of their expert, bool `(T, K)`.

    The first choices of all tokens come first, in the order of the batch, then the second ones, and
    so on. Source: the order of Paddle's `moe_gate_dispatch`.
    """
    experts_N = experts_TK.T.flatten()
    is_own_NE = experts_N[:, None] == torch.arange(num_experts, device=experts_TK.device)
    place_N = is_own_NE.cumsum(0).gather(1, experts_N[:, None])[:, 0]
    return (place_N <= capacity).view(experts_TK.T.shape).T


class _Chosen(torch.autograd.Function):
    """`probs.gather(-1, experts)`. The experts of a row differ, so its gradient has no sums, for
    which a GPU would have to sort."""

    @staticmethod
    def forward(ctx, probs_TE: Tensor, experts_TK: Tensor) -> Tensor:
        ctx.save_for_backward(experts_TK)
        ctx.num_experts = probs_TE.shape[1]
        return probs_TE.gather(-1, experts_TK)

    @staticmethod
    def backward(ctx, grad_TK: Tensor):
        (experts_TK,) = ctx.saved_tensors
        expert_E = torch.arange(ctx.num_experts, device=grad_TK.device)
        grad_TE = grad_TK.new_zeros(len(grad_TK), ctx.num_experts)
        for expert_T, grad_T in zip(experts_TK.unbind(1), grad_TK.unbind(1)):
            grad_TE = torch.where(expert_T[:, None] == expert_E, grad_T[:, None], grad_TE)
        return grad_TE, None


class Router(nn.Module):
    """The gate of one bank of experts; `weight` is `(E, D)` and always float32.

    `capacity` is how many times its even share (of one choice a token) an expert takes of a batch
    in training mode; None for all.
    """

    def __init__(self, config: ErnieConfig, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(num_experts, config.hidden_size, dtype=torch.float32)
        )
        assert config.moe_k is not None
        self.top_k = config.moe_k
        self.norm_min = config.moe_norm_min
        self.capacity: float | None = None

    def forward(self, x_TD: Tensor, bias_E: Tensor) -> Routing:
        # Float32 from here on, also under bfloat16 activations: a rounded logit picks another
        # expert.
        logits_TE = F.linear(x_TD.float(), self.weight.float())
        probs_TE = logits_TE.softmax(-1)
        experts_TK = (probs_TE.detach() + bias_E).topk(self.top_k, dim=-1).indices
        chosen_TK, kept_TK = _Chosen.apply(probs_TE, experts_TK), None
        if self.capacity is not None and self.training:
            num_tokens, num_experts = probs_TE.shape
            most = max(int(self.capacity * num_tokens // num_experts), 1)
            kept_TK = within_capacity(experts_TK, num_experts, most)
            chosen_TK = chosen_TK * kept_TK
        weights_TK = chosen_TK / chosen_TK.sum(-1, keepdim=True).clamp(min=self.norm_min)
        return Routing(experts_TK, weights_TK, probs_TE, logits_TE, kept_TK)
