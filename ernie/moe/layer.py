"""The mixture-of-experts block: route, dispatch, add the shared experts.

Tokens are routed within the bank of their modality; attention and shared experts are common to all.
This module holds the text bank; names are those of the published checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ernie.config import ErnieConfig
from ernie.layers import MLP
from ernie.moe import dispatch
from ernie.moe.experts import Experts
from ernie.moe.router import Router, Routing


class Statics(nn.Module):
    """Holds the correction bias, float32 `(banks, E)`: moved by balancing, never by a gradient."""

    def __init__(self, num_banks: int, num_experts: int) -> None:
        super().__init__()
        bias = torch.zeros(num_banks, num_experts, dtype=torch.float32)
        self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)


class MoE(nn.Module):
    def __init__(self, config: ErnieConfig) -> None:
        super().__init__()
        num_experts, size = config.experts_per_bank[0], config.expert_sizes[0]
        self.gate = Router(config, num_experts)
        self.moe_statics = Statics(1, num_experts)
        self.experts = Experts(num_experts, config.hidden_size, size)
        shared = config.shared_size
        self.shared_experts = (
            MLP(config.hidden_size, shared, bias=config.use_bias) if shared else None
        )
        self.dispatch: dispatch.Dispatch = dispatch.local

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Routing]:
        routing = self.gate(x_TD, self.moe_statics.e_score_correction_bias[0])
        out_TD = self.dispatch(x_TD, routing, self.experts)
        if self.shared_experts is not None:
            out_TD = out_TD + self.shared_experts(x_TD)
        return out_TD, routing
