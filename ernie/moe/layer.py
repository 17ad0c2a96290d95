"""The mixture-of-experts block: route, dispatch, add the shared experts.

    text tokens    gate, experts                 64 experts of size moe_intermediate_size[0]
    vision tokens  vision_gate, vision_experts   64 experts of size moe_intermediate_size[1]
    all tokens     shared_experts

Tokens are routed within the bank of their modality, each with its own gate and row of the
correction bias; attention and shared experts are common to all. Text models have the text bank
only. A batch without vision tokens takes the same path in both kinds of model.

Legend: T tokens, X text tokens, D hidden size, E experts of a bank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ernie.config import ErnieConfig
from ernie.layers import MLP
from ernie.moe import dispatch
from ernie.moe.experts import Experts
from ernie.moe.router import Router, Routing


@dataclass(frozen=True)
class Split:
    """Which tokens of a batch go to which bank: made once for all layers."""

    order_T: Tensor  # int64: the text tokens in order, then the vision tokens
    place_T: Tensor  # int64, its inverse
    num_text: int

    @classmethod
    def of(cls, modality_T: Tensor | None) -> Split | None:
        """By modality: 0 is text, any other number vision. None where all is text."""
        if modality_T is None or not bool(modality_T.any()):
            return None
        is_vision_T = modality_T != 0
        order_T = is_vision_T.to(torch.uint8).argsort(stable=True)
        place_T = torch.empty_like(order_T)
        place_T[order_T] = torch.arange(len(order_T), device=order_T.device)
        return cls(order_T, place_T, len(order_T) - int(is_vision_T.sum()))

    def apart(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of text tokens and rows of vision tokens."""
        rows_TD = _Permute.apply(x_TD, self.order_T, self.place_T)
        return rows_TD[: self.num_text], rows_TD[self.num_text :]

    def together(self, text_XD: Tensor, vision_ZD: Tensor) -> Tensor:
        """The way back."""
        return _Permute.apply(torch.cat((text_XD, vision_ZD)), self.place_T, self.order_T)


class _Permute(torch.autograd.Function):
    """`x[order]` for an order that names each row once: both ways are gathers."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, order_T: Tensor, inverse_T: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_T)
        return x_TD[order_T]

    @staticmethod
    def backward(ctx, grad_TD: Tensor):
        (inverse_T,) = ctx.saved_tensors
        return grad_TD[inverse_T], None, None


class Statics(nn.Module):
    """Holds the correction bias, float32 `(banks, E)`: moved by balancing, never by a gradient."""

    def __init__(self, num_banks: int, num_experts: int) -> None:
        super().__init__()
        bias = torch.zeros(num_banks, num_experts, dtype=torch.float32)
        self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)


class MoE(nn.Module):
    def __init__(self, config: ErnieConfig) -> None:
        super().__init__()
        counts, sizes, hidden = config.experts_per_bank, config.expert_sizes, config.hidden_size
        self.gate = Router(config, counts[0])
        self.moe_statics = Statics(len(counts), counts[0])
        self.experts = Experts(counts[0], hidden, sizes[0])
        has_vision = len(counts) > 1
        self.vision_gate = Router(config, counts[1]) if has_vision else None
        self.vision_experts = Experts(counts[1], hidden, sizes[1]) if has_vision else None
        shared = config.shared_size
        self.shared_experts = MLP(hidden, shared, bias=config.use_bias) if shared else None
        self.dispatch: dispatch.Dispatch = dispatch.local

    def forward(self, x_TD: Tensor, split: Split | None = None) -> tuple[Tensor, Routing]:
        """`(T, D)`, and how tokens were routed; `split` where some of them are of vision."""
        bias = self.moe_statics.e_score_correction_bias
        if split is None:
            out_TD, routing = self._bank(x_TD, self.gate, self.experts, bias[0])
        else:
            assert self.vision_gate is not None and self.vision_experts is not None
            text_XD, vision_ZD = split.apart(x_TD)
            text_XD, routing = self._bank(text_XD, self.gate, self.experts, bias[0])
            vision_ZD, other = self._bank(vision_ZD, self.vision_gate, self.vision_experts, bias[1])
            out_TD = split.together(text_XD, vision_ZD)
            routing = replace(routing, vision=other)
        if self.shared_experts is not None:
            out_TD = out_TD + self.shared_experts(x_TD)
        return out_TD, routing

    def _bank(
        self, x_XD: Tensor, gate: Router, experts: Experts, bias_E: Tensor
    ) -> tuple[Tensor, Routing]:
        routing = gate(x_XD, bias_E)
        return self.dispatch(x_XD, routing, experts), routing
