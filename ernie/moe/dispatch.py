"""How tokens travel to their experts and back.

A dispatcher is called with the tokens, their routing and the experts; the local one sorts and
gathers within this process. One that exchanges tokens between processes has the same signature.

Legend: T tokens, K choices of a token, N (token, choice) pairs sorted by expert, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ernie import kernels
from ernie.moe.router import Routing

Dispatch = Callable[[Tensor, Routing, Callable[[Tensor, Tensor], Tensor]], Tensor]


def local(x_TD: Tensor, routing: Routing, experts: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Weighted sum of each token's chosen experts, all of which live here; `(T, D)` in x's dtype.

    The (token, choice) pairs are sorted by expert (stably, so that results do not depend on
    chance), and summed per token in the order of choice. Both ways are gathers, forward and
    backward: no two pairs are ever added to one place at once.
    """
    order_N, place_TK, counts_E = kernels.sort_pairs(routing.experts_TK, routing.probs_TE.shape[1])
    rows_ND = experts(_Spread.apply(x_TD, order_N, place_TK), counts_E)
    return _Combine.apply(rows_ND, routing.weights_TK, order_N, place_TK)


class _Spread(torch.autograd.Function):
    """A row for each pair."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, order_N: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(place_TK)
        return kernels.spread(x_TD, order_N, place_TK.shape[1])

    @staticmethod
    def backward(ctx, grad_ND: Tensor):
        (place_TK,) = ctx.saved_tensors
        return kernels.combine(grad_ND, place_TK), None, None


class _Combine(torch.autograd.Function):
    """The weighted sum of a token's rows."""

    @staticmethod
    def forward(
        ctx, rows_ND: Tensor, weights_TK: Tensor, order_N: Tensor, place_TK: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows_ND, weights_TK, order_N)
        return kernels.combine(rows_ND, place_TK, weights_TK)

    @staticmethod
    def backward(ctx, grad_TD: Tensor):
        rows_ND, weights_TK, order_N = ctx.saved_tensors
        return *kernels.combine_backward(grad_TD, rows_ND, weights_TK, order_N), None, None
