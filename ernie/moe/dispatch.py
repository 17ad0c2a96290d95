"""How tokens travel to their experts and back.

A dispatcher is called with the tokens, their routing and the experts; the local one sorts and
gathers within this process. One that exchanges tokens between processes has the same signature.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ernie.moe.router import Routing

Dispatch = Callable[[Tensor, Routing, Callable[[Tensor, Tensor], Tensor]], Tensor]


def local(x_TD: Tensor, routing: Routing, experts: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Weighted sum of each token's chosen experts, all of which live here; `(T, D)` in x's dtype.

    The (token, choice) pairs are sorted by expert (stably, so that results do not depend on
    chance), and summed per token in the order of choice.
    """
    num_tokens, top_k = routing.experts_TK.shape
    order_N = routing.experts_TK.flatten().argsort(stable=True)
    rows_ND = x_TD[order_N // top_k]
    out_ND = experts(rows_ND, routing.load_E)
    # Back to (token, choice) order by a gather with the inverse permutation: deterministic, unlike
    # index_add.
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    out_TKD = out_ND[place_N].unflatten(0, (num_tokens, top_k))
    return (out_TKD * routing.weights_TK.to(x_TD.dtype)[..., None]).sum(1)
