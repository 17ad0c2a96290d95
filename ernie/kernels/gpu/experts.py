"""Mixtures of experts on a GPU: choose, sort, two grouped products, combine.

    y = norm(x)                      logits = router @ y, float32 (cuBLAS)
    choose    softmax, top-k, weights: one program a token
    sort      pairs (token, choice) by expert, stably: counted in blocks, then placed
    product   gate and up of each pair's token, swiglu in registers
    product   down, written to the place of the pair
    combine   weighted sum over the choices of a token in their order, shared experts, residual

A step with few pairs skips the sort: each pair is a row by itself, and an expert that two of them
share is read from cache the second time. In one with many the rows are gathered in the order of
their experts, for torch's grouped product. Nothing is added with atomics, so results repeat; with
`batch_invariant` every step goes the way in the middle.

Legend: T tokens, D hidden size, E experts, K choices of a token, N pairs, I and O input and output
width, M expert size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ernie.kernels.dispatch import is_batch_invariant
from ernie.kernels.gpu.language import overlapped, rows_of, wait
from ernie.kernels.gpu.pointwise import rms_norm, swiglu
from ernie.kernels.gpu.products import MANY_ROWS, Norm, mlp, product
from ernie.kernels.gpu.rows import row_products
from ernie.kernels.gpu.unpack import unpacked
from ernie.kernels.weights import PackedWeight, QuantTensor
from ernie.recomputed import Function, keep

# torch's product of sorted rows with a weight for each expert; None where torch has none.
grouped_mm = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
GROUPED_ROWS = 64  # an expert, from which on that is faster than ours with plain weights
SORT_BLOCK = 128  # pairs that one program of the sort takes
COMBINE_BLOCK = 1024


def moe(
    x_TD: Tensor,
    router_ED: Tensor,
    bias_E: Tensor,
    gate_up: PackedWeight,
    down: PackedWeight,
    shared: tuple[PackedWeight, PackedWeight] | None,
    *,
    top_k: int,
    norm_min: float,
    norm: Norm | None = None,
    residual_TD: Tensor | None = None,
) -> Tensor:
    y_TD = x_TD if norm is None else rms_norm(x_TD, *norm)
    logits_TE = router_logits(y_TD, router_ED)
    experts_TK, weights_TK = _choose(logits_TE, bias_E, top_k, norm_min)
    pairs, place = experts_TK.flatten(), None
    if len(pairs) <= gate_up.shape[0] and not is_batch_invariant():
        h_NM = row_products(y_TD, gate_up, gated=True, experts=pairs, copies=top_k)
        out_ND = row_products(h_NM, down, experts=pairs)
    else:
        order_N, place_N, ends_E = sorted_by_expert(pairs, gate_up.shape[0])
        if _is_grouped(y_TD, gate_up, down, len(pairs)):
            place = place_N
            rows_ND = y_TD[order_N // top_k]
            out_ND = _grouped_mlp(rows_ND, gate_up, down, ends_E)
        else:
            h_NM = product(y_TD, gate_up, gated=True, copies=top_k, order=order_N, ends_E=ends_E)
            out_ND = product(h_NM, down, order=order_N, ends_E=ends_E)
    beside = [] if shared is None else [mlp(y_TD, *shared)]
    if residual_TD is not None:
        beside.append(residual_TD)
    return _combine(out_ND, weights_TK, place, beside)


def router_logits(y_TD: Tensor, router_ED: Tensor) -> Tensor:
    """`y @ router.T` in float32, whatever y is: a rounded logit picks another expert."""
    weight = PackedWeight(tuple(router_ED.shape), "float32", 0, {"weight": router_ED})
    if is_batch_invariant():
        return product(y_TD.float(), weight)
    if len(y_TD) > 1:
        return y_TD.float() @ router_ED.T
    return row_products(y_TD, weight, out_dtype=torch.float32)


def _is_grouped(y_TD: Tensor, gate_up: PackedWeight, down: PackedWeight, num_pairs: int) -> bool:
    """Whether torch's grouped product takes these rows and these weights, and gains by it."""
    if is_batch_invariant():
        return False
    enough = GROUPED_ROWS if "weight" in gate_up.tensors else MANY_ROWS
    return num_pairs >= enough * gate_up.shape[0] and all(
        _takes_grouped(y_TD, weight.shape[1:]) for weight in (gate_up, down)
    )


def _grouped_mlp(x_ND: Tensor, gate_up: PackedWeight, down: PackedWeight, ends_E: Tensor) -> Tensor:
    """Rows sorted by expert through their experts; in the same order."""
    assert grouped_mm is not None
    both_NM = grouped_mm(x_ND, unpacked(gate_up, x_ND.dtype).mT, offs=ends_E)
    h_NM = swiglu(*both_NM.chunk(2, dim=-1))
    return grouped_mm(h_NM, unpacked(down, x_ND.dtype).mT, offs=ends_E)


def grouped_linear(x_NI: Tensor, weight_EOI: Tensor | QuantTensor, counts_E: Tensor) -> Tensor:
    product = _FrozenGroups if isinstance(weight_EOI, QuantTensor) else _GroupedLinear
    return product.apply(x_NI, weight_EOI, counts_E)


class _FrozenGroups(torch.autograd.Function):
    """`_GroupedLinear` of a quantised weight, which is dequantised anew in each pass."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_EOI: QuantTensor, counts_E: Tensor) -> Tensor:
        ctx.weight_EOI, ctx.ends_E = weight_EOI, counts_E.cumsum(0).int()
        x_NI = rows_of(x_NI)
        return grouped(x_NI, weight_EOI.dequantized(x_NI.dtype).mT, ctx.ends_E)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_NO = grads[0].contiguous()
        weight_EOI = ctx.weight_EOI.dequantized(grad_NO.dtype)
        return grouped(grad_NO, weight_EOI, ctx.ends_E), None, None


class _GroupedLinear(Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        ends_E = counts_E.cumsum(0).int()
        x_NI = rows_of(x_NI)
        keep(ctx, x_NI, weight_EOI, ends_E)
        return grouped(x_NI, weight_EOI.mT, ends_E)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, weight_EOI, ends_E = ctx.saved_tensors
        grad_NO = grads[0].contiguous()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = grouped(grad_NO, weight_EOI, ends_E)
        if ctx.needs_input_grad[1]:
            dw = grouped_outer(grad_NO, x_NI, weight_EOI, ends_E)
        return dx, dw, None


def grouped(x_NI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """`x @ weight[e]` for the rows of each expert; the weight may be transposed."""
    if x_NI.dtype == weight_EIO.dtype and _takes_grouped(x_NI, weight_EIO.shape[1:]):
        assert grouped_mm is not None
        return grouped_mm(x_NI, weight_EIO, offs=ends_E)
    name, num_bytes = str(weight_EIO.dtype).removeprefix("torch."), weight_EIO.nbytes
    weight_EOI = weight_EIO.mT
    weight = PackedWeight(tuple(weight_EOI.shape), name, num_bytes, {"weight": weight_EOI})
    return product(x_NI, weight, ends_E=ends_E)


def grouped_outer(grad_NO: Tensor, x_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """`grad.T @ x` over the rows of each expert, in the weight's shape and dtype."""
    if x_NI.dtype == weight_EOI.dtype and _takes_grouped(x_NI, weight_EOI.shape[1:]):
        assert grouped_mm is not None
        return grouped_mm(grad_NO.T, x_NI, offs=ends_E)
    dw, begin = torch.zeros_like(weight_EOI), 0
    for e, end in enumerate(ends_E.tolist()):
        if end > begin:
            dw[e] = grad_NO[begin:end].T @ x_NI[begin:end]
        begin = end
    return dw


def _takes_grouped(x_NI: Tensor, widths: Sequence[int]) -> bool:
    """Whether torch multiplies such rows with weights of these widths group by group, without
    waiting for the groups' sizes: bfloat16, rows of a multiple of 16 bytes, on the devices that it
    has a kernel for."""
    return (
        grouped_mm is not None
        and _has_grouped(x_NI.device)
        and x_NI.dtype == torch.bfloat16
        and len(x_NI) > 0
        and not any(width % 8 for width in widths)
    )


@cache
def _has_grouped(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def sorted_by_expert(experts_N: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs in the order of their experts, those of one expert in their own, int32 `(N,)`; the
    place of each pair in it, int32 `(N,)`; and how many pairs stand before the end of each
    expert's, int32 `(E,)`."""
    num_pairs = len(experts_N)
    num_blocks = max(1, triton.cdiv(num_pairs, SORT_BLOCK))
    sizes = (num_pairs, num_experts, triton.next_power_of_2(num_experts), SORT_BLOCK)
    counts_Eb = experts_N.new_empty(num_experts, num_blocks)
    _count[(num_blocks,)](experts_N, counts_Eb, *sizes)
    ends_Eb = counts_Eb.flatten().cumsum(0, dtype=torch.int32).view(num_experts, num_blocks)
    order_N, place_N = torch.empty_like(experts_N), torch.empty_like(experts_N)
    _place[(num_blocks,)](experts_N, counts_Eb, ends_Eb, order_N, place_N, *sizes)
    return order_N, place_N, ends_Eb[:, -1].contiguous()


def _choose(
    logits_TE: Tensor, bias_E: Tensor, top_k: int, norm_min: float
) -> tuple[Tensor, Tensor]:
    """Experts, int32 `(T, K)`, and their float32 weights."""
    num_tokens, num_experts = logits_TE.shape
    experts_TK = logits_TE.new_empty(num_tokens, top_k, dtype=torch.int32)
    weights_TK = logits_TE.new_empty(num_tokens, top_k)
    if num_tokens:
        _choose_kernel[(num_tokens,)](
            logits_TE, bias_E, experts_TK, weights_TK, num_experts, norm_min,
            K=top_k, CHOICES=triton.next_power_of_2(top_k),
            EXPERTS=triton.next_power_of_2(num_experts), num_warps=1,
        )  # fmt: skip
    return experts_TK, weights_TK


def _combine(
    out_ND: Tensor, weights_TK: Tensor, place_N: Tensor | None, beside: list[Tensor]
) -> Tensor:
    """Weighted sums over the choices of a token, plus up to two more tensors. `place` says where
    the row of each pair stands in `out`; without it, they stand in the order of pairs."""
    num_tokens, top_k = weights_TK.shape
    width = out_ND.shape[1]
    out_TD = out_ND.new_empty(num_tokens, width)
    first, second = ([rows_of(x) for x in beside] + [None, None])[:2]
    if num_tokens:
        _combine_kernel[(num_tokens, triton.cdiv(width, COMBINE_BLOCK))](
            out_ND, weights_TK, place_N, first, second, out_TD,
            0 if first is None else first.stride(0), 0 if second is None else second.stride(0),
            width, K=top_k, BLOCK=COMBINE_BLOCK,
        )  # fmt: skip
    return out_TD


@overlapped
@triton.jit
def _choose_kernel(
    logits, bias, experts, weights, num_experts, norm_min,
    K: tl.constexpr, CHOICES: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    wait()
    token = tl.program_id(0).to(tl.int64)
    e, choice = tl.arange(0, EXPERTS), tl.arange(0, CHOICES)
    real = e < num_experts
    logit = tl.load(logits + token * num_experts + e, real, float("-inf"))
    shares = tl.exp(logit - tl.max(logit, 0))
    probs = shares / tl.sum(shares, 0)
    scores = tl.where(real, probs + tl.load(bias + e, real, 0.0), float("-inf"))
    chosen = tl.zeros([CHOICES], tl.int32)
    weight = tl.zeros([CHOICES], tl.float32)
    for k in tl.static_range(K):
        # The smallest index among equals; always a real one, also where scores are not numbers.
        best = tl.min(tl.where(scores == tl.max(scores, 0), e, num_experts - 1), 0)
        chosen = tl.where(choice == k, best, chosen)
        weight = tl.where(choice == k, tl.sum(tl.where(e == best, probs, 0.0), 0), weight)
        scores = tl.where(e == best, float("-inf"), scores)
    weight = weight / tl.maximum(tl.sum(weight, 0), norm_min)
    tl.store(experts + token * K + choice, chosen, choice < K)
    tl.store(weights + token * K + choice, weight, choice < K)


@triton.jit
def _belongs(experts, num_pairs, num_experts, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """Which of a block's pairs go to which expert, int32 (BLOCK, EXPERTS) of 0 and 1."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(experts + pair, pair < num_pairs, num_experts)
    e = tl.arange(0, EXPERTS)[None, :]
    return ((own[:, None] == e) & (e < num_experts)).to(tl.int32)


@overlapped
@triton.jit
def _count(
    experts, counts, num_pairs, num_experts, EXPERTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    wait()
    e = tl.arange(0, EXPERTS)
    count = tl.sum(_belongs(experts, num_pairs, num_experts, EXPERTS, BLOCK), 0)
    tl.store(counts + e * tl.num_programs(0) + tl.program_id(0), count, e < num_experts)


@overlapped
@triton.jit
def _place(
    experts, counts, ends, order, places, num_pairs, num_experts,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    wait()
    e = tl.arange(0, EXPERTS)
    at = e * tl.num_programs(0) + tl.program_id(0)
    begin = tl.load(ends + at, e < num_experts, 0) - tl.load(counts + at, e < num_experts, 0)
    belongs = _belongs(experts, num_pairs, num_experts, EXPERTS, BLOCK)
    rank = tl.cumsum(belongs, 0) - 1
    place = tl.sum(belongs * (begin[None, :] + rank), 1)
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(order + place, pair, pair < num_pairs)
    tl.store(places + pair, place, pair < num_pairs)


@overlapped
@triton.jit
def _combine_kernel(
    parts, weights, places, first, second, out, first_stride, second_stride, width,
    K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    wait()
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        row = token * K + k
        if places is not None:
            row = tl.load(places + row).to(tl.int64)
        part = tl.load(parts + row * width + at, inside, 0.0).to(tl.float32)
        total += part * tl.load(weights + token * K + k)
    if first is not None:
        total += tl.load(first + token * first_stride + at, inside, 0.0).to(tl.float32)
    if second is not None:
        total += tl.load(second + token * second_stride + at, inside, 0.0).to(tl.float32)
    tl.store(out + token * width + at, total, inside)
