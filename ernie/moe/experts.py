"""The routed experts of one bank, stacked: two tensors instead of thousands of little ones.

Legend: E experts, M expert size, D hidden size, N (token, choice) pairs sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ernie import kernels


class Experts(nn.Module):
    """E SwiGLU networks. `gate_up_proj` is `(E, 2M, D)` with the gate's rows first, `down_proj`
    `(E, D, M)`. `product` is the operation that multiplies with both.
    """

    def __init__(self, num_experts: int, hidden_size: int, expert_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * expert_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, expert_size))
        self.product: Callable[..., Tensor] = kernels.grouped_linear

    def forward(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        """Rows sorted by expert, `counts[e]` of them for expert e; returns `(N, D)`."""
        gate_up_Nw = self.product(x_ND, self.gate_up_proj, counts_E)
        h_NM = kernels.swiglu_halves(gate_up_Nw)
        return self.product(h_NM, self.down_proj, counts_E)
