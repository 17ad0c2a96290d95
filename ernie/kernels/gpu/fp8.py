"""Training products in FP8 on a GPU: rows and weights rounded by one kernel, multiplied by torch
(cuBLAS, CUTLASS) with a scale for each row of both factors.

    forward      x (T, I) by rows, weight (O, I) by rows              x8 @ w8.T
    rows' grad   grad (T, O) by rows, weight.T (I, O) by rows         g8 @ wt8.T
    weight's     grad.T @ x in the dtype of the weight: unrounded

The tensor cores take factors that run along the columns they sum over, so the weight is rounded
twice, once as it lies and once across, which gives it other scales; both are made anew in each
pass, as a copy of the large one would cost more memory than it saves time. What the tensor cores do
not take (widths that are no multiple of 16, another GPU) is multiplied in float32.

Legend: T tokens, N rows sorted by expert, E experts, I and O input and output width, R rows and C
columns of what is rounded.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie.kernels import reference
from ernie.kernels.gpu.experts import grouped, grouped_outer
from ernie.kernels.weights import FP8_LEAST, FP8_MAX, FP8Tensor
from ernie.recomputed import Function, keep

grouped_mm = getattr(torch, "_scaled_grouped_mm", None)  # None where torch has none
HOPPER = (9, 0)  # the one that multiplies rows by experts with scales of rows
BY_ROWS = ((8, 9), HOPPER, (10, 0))  # compute capabilities that multiply with scales of rows
ALONG = (1, 1024)  # rows and columns at a time, where columns lie side by side
ACROSS = (64, 64)  # where rows do


def fp8_linear(
    x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, *, quant_input_grad: bool
) -> Tensor:
    out_TO = _Product.apply(x_TI, weight_OI, None, quant_input_grad)
    return out_TO if bias_O is None else out_TO + bias_O.to(x_TI.dtype)


def fp8_grouped_linear(
    x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor, *, quant_input_grad: bool
) -> Tensor:
    ends_E = counts_E.cumsum(0, dtype=torch.int32)
    return _Product.apply(x_NI, weight_EOI, ends_E, quant_input_grad)


def quantize_fp8(x_RC: Tensor) -> FP8Tensor:
    x = x_RC if x_RC.dim() == 3 else x_RC[None]
    data = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    outer, num_rows, width = x.shape
    rows, columns = ACROSS if x.stride(1) == 1 and num_rows > 1 else ALONG
    if x.numel():
        _quantize[(triton.cdiv(num_rows, rows), outer)](
            x, data, scale, num_rows, width, *x.stride(), FP8_MAX, FP8_LEAST, rows, columns,
            num_warps=4,
        )  # fmt: skip
    return FP8Tensor(data.view(x_RC.shape), scale.view(x_RC.shape[:-1]))


class _Product(Function):
    """Rows times a weight, or with `ends_E` rows sorted by expert times the weights of experts."""

    @staticmethod
    def forward(
        ctx, x_NI: Tensor, weight: Tensor, ends_E: Tensor | None, quant_input_grad: bool
    ) -> Tensor:
        ctx.quant_input_grad = quant_input_grad
        keep(ctx, x_NI, weight, ends_E)
        factors = quantize_fp8(x_NI), quantize_fp8(weight)
        return _multiplied(*factors, ends_E, x_NI.dtype, is_fast=True)

    @staticmethod
    def backward(ctx, grad_NO: Tensor):
        x_NI, weight, ends_E = ctx.saved_tensors
        grad_NO = grad_NO.contiguous()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            if ctx.quant_input_grad:
                factors = quantize_fp8(grad_NO), quantize_fp8(weight.mT)
                dx = _multiplied(*factors, ends_E, x_NI.dtype)
            elif ends_E is None:
                dx = reference.rows_gradient(grad_NO, weight)
            else:
                dx = grouped(grad_NO, weight, ends_E)
        if ctx.needs_input_grad[1]:
            if ends_E is None:
                dw = (grad_NO.T @ x_NI).to(weight.dtype)
            else:
                dw = grouped_outer(grad_NO, x_NI, weight, ends_E)
        return dx, dw, None, None


def _multiplied(
    x: FP8Tensor,
    weight: FP8Tensor,
    ends_E: Tensor | None,
    dtype: torch.dtype,
    *,
    is_fast: bool = False,
) -> Tensor:
    """`x @ weight.T` of dequantised factors, or of each expert's. Fast, Hopper's tensor cores sum
    with fewer bits than float32 has: as usual, gradients are not.
    """
    is_taken = len(x.data) and dtype == torch.bfloat16 and _is_taken(weight.data)
    if ends_E is None:
        if not is_taken:
            return (x.dequantized() @ weight.dequantized().T).to(dtype)
        return torch._scaled_mm(
            x.data, weight.data.T, scale_a=x.scale[:, None], scale_b=weight.scale[None],
            out_dtype=dtype, use_fast_accum=is_fast,
        )  # fmt: skip
    if is_taken and grouped_mm is not None and _capability(x.data.device) == HOPPER:
        return grouped_mm(
            x.data, weight.data.mT, x.scale, weight.scale, offs=ends_E, out_dtype=dtype,
            use_fast_accum=is_fast,
        )  # fmt: skip
    counts = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
    rows = map(FP8Tensor, x.data.split(counts), x.scale.split(counts))
    experts = map(FP8Tensor, weight.data, weight.scale)
    pairs = zip(rows, experts)
    return torch.cat([_multiplied(*pair, None, dtype, is_fast=is_fast) for pair in pairs])


def _is_taken(weight: Tensor) -> bool:
    """Whether the tensor cores multiply with such a weight."""
    is_aligned = weight.shape[-1] % 16 == 0 and weight.shape[-2] % 16 == 0
    return weight.is_cuda and is_aligned and _capability(weight.device) in BY_ROWS


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@triton.jit
def _quantize(
    x, data, scale, num_rows, width, outer_stride, row_stride, column_stride, MOST, LEAST,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some rows: their largest magnitudes, then their values, which are in cache by then."""
    outer = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < num_rows
    source = x + outer * outer_stride + row[:, None] * row_stride
    most = tl.full([ROWS], LEAST, tl.float32)
    for begin in range(0, width, COLUMNS):
        at = begin + tl.arange(0, COLUMNS)
        inside = there[:, None] & (at < width)[None, :]
        value = tl.load(source + at[None, :] * column_stride, inside, 0.0).to(tl.float32)
        most = tl.maximum(most, tl.max(tl.abs(value), 1))
    place = outer * num_rows + row
    tl.store(scale + place, tl.div_rn(most, MOST), there)
    factor = tl.div_rn(tl.full([ROWS], MOST, tl.float32), most)
    for begin in range(0, width, COLUMNS):
        at = begin + tl.arange(0, COLUMNS)
        inside = there[:, None] & (at < width)[None, :]
        value = tl.load(source + at[None, :] * column_stride, inside, 0.0).to(tl.float32)
        value = value * factor[:, None]
        # Not by `clamp`, which would make a number of what is none.
        value = tl.where(value > MOST, MOST, tl.where(value < -MOST, -MOST, value))
        tl.store(data + place[:, None] * width + at[None, :], value.to(tl.float8e4nv), inside)
