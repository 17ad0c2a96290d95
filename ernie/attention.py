"""Grouped-query attention, and the seam through which training and serving differ.

Legend: T tokens of the flat batch, D hidden size, H query heads, G key/value heads, d head width.

The layer makes queries, keys and values and hands them to `attend`; what a query may look at, and
where old keys are kept, is the business of whoever runs the model:

    training        packed_causal(cu_seqlens)          segments of a packed row
    preferences     shared_prompt(pairs)               two answers after one prompt
    rollouts        shared_prompts(groups)             many answers after one prompt
    plain decoding  GrowingCache (ernie.generate)      one sequence, keys appended
    serving         PagedAttend (fastdeploy.engine)    many sequences, blocks of a pool
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from ernie import kernels
from ernie.config import ErnieConfig
from ernie.kernels.reference import attend_one
from ernie.layers import Linear
from ernie.recomputed import recomputed
from ernie.rope import Rotary

_MOST_WEIGHTS = 2**22  # that are made at once where some of them are dropped


class Drop(Protocol):
    """Dropout of attention weights `(H, q, n)`: those of some queries, the `number`-th part."""

    def __call__(self, weights_Hqn: Tensor, number: int) -> Tensor: ...


class Attend(Protocol):
    """How queries look at keys. q `(T, H, d)`, k and v `(T, G, d)`, already rotated; returns `(T,
    H, d)`.
    """

    def __call__(self, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, *, layer: int) -> Tensor: ...


def packed_causal(cu_seqlens_S1: Tensor, lengths: Sequence[int] | None = None) -> Attend:
    """Causal attention inside each segment of a packed row; no cache. What training calls may
    also be given a `drop`.

    `cu_seqlens` is int32 `(S + 1,)`: segment s is tokens `cu_seqlens[s]:cu_seqlens[s + 1]`;
    `lengths` are those of the segments, where the host knows them.
    """

    def attend(
        q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, *, layer: int, drop: Drop | None = None
    ) -> Tensor:
        del layer  # nothing is remembered between layers
        scale = q_THd.shape[-1] ** -0.5
        if drop is not None:
            return _attend_dropping(q_THd, k_TGd, v_TGd, cu_seqlens_S1.tolist(), scale, drop)
        return kernels.attend_packed(q_THd, k_TGd, v_TGd, cu_seqlens_S1, scale, lengths)

    return attend


def _attend_dropping(
    q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, bounds: list[int], scale: float, drop: Drop
) -> Tensor:
    """As `kernels.attend_packed`, with dropout between softmax and values; in plain torch, of as
    many queries at a time as `_MOST_WEIGHTS` allows. Weights are made again for the gradient, so
    `drop` must drop the same then.
    """
    out: list[Tensor] = []
    for start, end in pairwise(bounds):
        rows = max(_MOST_WEIGHTS // (q_THd.shape[1] * max(end - start, 1)), 1)
        for a in range(start, end, rows):
            b = min(a + rows, end)
            again = partial(attend_one, scale=scale, drop=partial(drop, number=len(out)))
            parts = (q_THd[a:b], k_TGd[start:b], v_TGd[start:b])
            out.append(recomputed(again, *parts))
    return torch.cat(out) if out else torch.zeros_like(q_THd)


def shared_prompt(pairs_P4: Tensor) -> Attend:
    """Causal attention over pairs of answers that share one prompt; no cache.

    A row of `pairs` is (start, chosen, rejected, end): tokens start:chosen are the prompt,
    chosen:rejected one answer, rejected:end the other; see `shared_prompts`.
    """
    return shared_prompts(pairs_P4.tolist(), pairs_P4.device)


def shared_prompts(groups: Sequence[Sequence[int]], device: torch.device) -> Attend:
    """Causal attention over groups of answers, each group after one prompt; no cache.

    A group is (start, first answer, second answer, ..., end): the prompt's tokens, then those of
    each answer. Answers look at their prompt and at themselves. The groups cover the row, one after
    another. Queries and keys are laid out as whole sequences, prompt and answer, so any kernel of
    `attend_packed` serves; only attention is computed again for a prompt, everything else of the
    model once.
    """
    order: list[int] = []
    lengths: list[int] = []
    place: list[int] = []
    laid = 0
    for start, *answers, end in groups:
        prompt = answers[0] - start
        for number, (first, last) in enumerate(zip(answers, [*answers[1:], end])):
            order += [*range(start, start + prompt), *range(first, last)]
            lengths.append(prompt + last - first)
            begin = laid + prompt * (number > 0)  # the prompt's own result is the first answer's
            place += range(begin, laid + lengths[-1])
            laid += lengths[-1]
    order_U = torch.tensor(order, device=device)
    place_T = torch.tensor(place, device=device)
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    attend_whole: Callable[..., Tensor] = packed_causal(bounds, lengths)

    def attend(
        q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, *, layer: int, drop: Drop | None = None
    ) -> Tensor:
        q_UHd, k_UGd, v_UGd = (x[order_U] for x in (q_THd, k_TGd, v_TGd))
        out_UHd = attend_whole(q_UHd, k_UGd, v_UGd, layer=layer, drop=drop)
        return out_UHd[place_T]

    return attend


class Attention(nn.Module):
    """Projections and rotary embedding around `attend`; key/value head j serves query heads j*g ..
    j*g+g-1.
    """

    def __init__(self, config: ErnieConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        h, bias = config.hidden_size, config.use_bias
        self.q_proj = Linear(h, config.q_size, bias=bias)
        self.k_proj = Linear(h, config.kv_size, bias=bias)
        self.v_proj = Linear(h, config.kv_size, bias=bias)
        self.o_proj = Linear(config.q_size, h, bias=bias)

    def forward(self, x_TD: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        q_THd, k_TGd, v_TGd = (
            proj(x_TD).unflatten(-1, (-1, self.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_THd, k_TGd = kernels.rotate(q_THd, *rotary), kernels.rotate(k_TGd, *rotary)
        return self.o_proj(attend(q_THd, k_TGd, v_TGd, layer=self.layer).flatten(-2))
