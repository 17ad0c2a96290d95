"""Ways of tokens to experts and back on a GPU: gathers in both directions, no atomics.

Legend: T tokens, K choices of a token, N = T K pairs sorted by expert, D hidden size, E experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie.kernels.gpu.experts import sorted_by_expert
from ernie.kernels.gpu.language import rows_of

COLUMNS = 1024  # of a row that one program takes


def sort_pairs(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    order_N, place_N, ends_E = sorted_by_expert(experts_TK.flatten().int(), num_experts)
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1)).long()
    return order_N, place_N.view(experts_TK.shape), counts_E


def spread(x_TD: Tensor, order_N: Tensor, top_k: int) -> Tensor:
    x, num_pairs = rows_of(x_TD), len(order_N)
    width = x.shape[1]
    rows_ND = x.new_empty(num_pairs, width)
    if num_pairs:
        _spread[(num_pairs, triton.cdiv(width, COLUMNS))](
            x, order_N, rows_ND, x.stride(0), width, top_k, COLUMNS
        )
    return rows_ND


def combine(rows_ND: Tensor, place_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    (num_tokens, top_k), width = place_TK.shape, rows_ND.shape[1]
    out_TD = rows_ND.new_empty(num_tokens, width)
    weights = None if weights_TK is None else weights_TK.contiguous()
    if num_tokens:
        _gathered_sum[(num_tokens, triton.cdiv(width, COLUMNS))](
            rows_ND.contiguous(), place_TK, weights, out_TD, width, K=top_k, BLOCK=COLUMNS
        )
    return out_TD


def combine_backward(
    grad_TD: Tensor, rows_ND: Tensor, weights_TK: Tensor, order_N: Tensor
) -> tuple[Tensor, Tensor]:
    num_pairs, width = rows_ND.shape
    drows_ND = rows_ND.new_empty(rows_ND.shape)
    dweights_TK = torch.empty_like(weights_TK, memory_format=torch.contiguous_format)
    if num_pairs:
        _gathered_sum_backward[(num_pairs,)](
            grad_TD.contiguous(), rows_ND.contiguous(), weights_TK.contiguous(), order_N, drows_ND,
            dweights_TK, width, weights_TK.shape[1], COLUMNS,
        )  # fmt: skip
    return drows_ND, dweights_TK


@triton.jit
def _spread(x, order, rows, x_stride, width, top_k, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = (tl.load(order + n) // top_k).to(tl.int64)
    values = tl.load(x + token * x_stride + at, at < width)
    tl.store(rows + n * width + at, values, at < width)


@triton.jit
def _gathered_sum(
    rows, place, weights, out, width, K: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        n = tl.load(place + token * K + k).to(tl.int64)
        part = tl.load(rows + n * width + at, at < width, 0.0).to(tl.float32)
        if weights is not None:
            part *= tl.load(weights + token * K + k)
        total += part
    tl.store(out + token * width + at, total, at < width)


@triton.jit
def _gathered_sum_backward(
    grad, rows, weights, order, drows, dweights, width, top_k, BLOCK: tl.constexpr
):  # fmt: skip
    """One pair: its weight's gradient is a product of two rows, its row's one of them scaled."""
    n = tl.program_id(0).to(tl.int64)
    pair = tl.load(order + n).to(tl.int64)
    weight = tl.load(weights + pair)
    products = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, width, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        g = tl.load(grad + pair // top_k * width + at, at < width, 0.0).to(tl.float32)
        products += g * tl.load(rows + n * width + at, at < width, 0.0).to(tl.float32)
        tl.store(drows + n * width + at, g * weight, at < width)
    tl.store(dweights + pair, tl.sum(products, 0))
