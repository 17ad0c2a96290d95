"""The plain building blocks: Linear, RMSNorm, Embedding and the SwiGLU MLP, over flat tokens `(T,
D)`.

They hold parameters under the published names and call `ernie.kernels`; they know of no batch,
phase, device or parallelism. Parameters are created without values: a loader or `init_weights`
fills them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ernie import kernels


class Linear(nn.Module):
    """`x @ weight.T (+ bias)`; weight is `(out, in)`. `product` is the operation that does it."""

    def __init__(self, in_size: int, out_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size))
        self.bias = nn.Parameter(torch.empty(out_size)) if bias else None
        self.product: Callable[..., Tensor] = kernels.linear

    def forward(self, x_TI: Tensor) -> Tensor:
        return self.product(x_TI, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}, {self.weight.dtype}"


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return kernels.rms_norm(x_TD, self.weight, self.eps)


class Embedding(nn.Module):
    """Token ids `(T,)` to rows `(T, D)` of `weight` `(V, D)`, in the weight's dtype."""

    def __init__(self, vocab_size: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, size))

    def forward(self, token_ids_T: Tensor) -> Tensor:
        return nn.functional.embedding(token_ids_T, self.weight)


class MLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`: the dense feed-forward block, and a MoE's shared experts."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(kernels.swiglu(self.gate_proj(x_TD), self.up_proj(x_TD)))
