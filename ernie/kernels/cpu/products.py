"""`linear` and `grouped_linear` on the CPU: float32 rows times float32, bfloat16 or quantised
weights.

Forward, each weight is read once in its own dtype for up to about a hundred rows, and the result of
a row does not depend, to the bit, on the rows computed with it: always in `grouped_linear`, below
`MANY_ROWS` rows in `linear`. From there on, with quantised weights, and backward, the products are
torch's float32 ones; other weights are converted block by block into a buffer that is kept.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from ernie.kernels.cpu.build import DTYPES, isa, library
from ernie.kernels.dispatch import has_bfloat16_products, is_batch_invariant
from ernie.kernels.weights import NF4_LEVELS, QuantTensor

Weight = Tensor | QuantTensor

# From so many rows on, torch's float32 product is faster than ours, by instruction set (measured on
# Zen 4; with AVX-512 ours stays ahead).
MANY_ROWS = {"scalar": 16, "avx2": 384, "avx512": 1 << 62, "avx512vnni": 1 << 62}
BLOCK_WEIGHTS = 4 * 1024 * 1024  # weights converted at a time: 16 MiB of float32
_buffers = threading.local()


def linear(x_TI: Tensor, weight_OI: Weight, bias_O: Tensor | None = None) -> Tensor:
    if x_TI.dtype != torch.float32:
        return linear(x_TI.float(), weight_OI, bias_O).to(x_TI.dtype)
    if torch.is_grad_enabled() and (
        x_TI.requires_grad
        or _is_trained(weight_OI)
        or (bias_O is not None and bias_O.requires_grad)
    ):
        if isinstance(weight_OI, QuantTensor):
            return _QuantisedLinear.apply(x_TI, weight_OI, bias_O)
        product = _LinearInBfloat16 if has_bfloat16_products() else _Linear
        return product.apply(x_TI, weight_OI, bias_O)
    return _product(x_TI, weight_OI, bias_O, None)


def _is_trained(weight: Weight) -> bool:
    return isinstance(weight, Tensor) and weight.requires_grad


def grouped_linear(x_NI: Tensor, weight_EOI: Weight, counts_E: Tensor) -> Tensor:
    if x_NI.dtype != torch.float32:
        return grouped_linear(x_NI.float(), weight_EOI, counts_E).to(x_NI.dtype)
    if torch.is_grad_enabled() and (x_NI.requires_grad or _is_trained(weight_EOI)):
        if isinstance(weight_EOI, QuantTensor):
            return _QuantisedGroups.apply(x_NI, weight_EOI, counts_E)
        return _GroupedLinear.apply(x_NI, weight_EOI, counts_E)
    return _product(x_NI, weight_EOI, None, counts_E)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        # The rows are kept only for the gradient of the weight: LoRA saves them all.
        ctx.save_for_backward(x_TI if ctx.needs_input_grad[1] else None, weight_OI)
        ctx.bias_dtype = None if bias_O is None else bias_O.dtype
        return _product(x_TI, weight_OI, bias_O, None)

    @staticmethod
    def backward(ctx, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, weight_OI = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            _grad_rows(grad_TO, weight_OI) if need_x else None,
            (grad_TO.T @ x_TI).to(weight_OI.dtype) if need_weight else None,
            grad_TO.sum(0).to(ctx.bias_dtype) if need_bias else None,
        )


class _LinearInBfloat16(torch.autograd.Function):
    """`_Linear` by torch's bfloat16 products; rows are kept in half the bytes.

    Float32 weights are rounded anew in both passes: that is a small part of a product of many rows,
    and a copy kept for backward would be as large as all activations.
    """

    @staticmethod
    def forward(ctx, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        rows_TI = x_TI.to(torch.bfloat16)
        ctx.save_for_backward(rows_TI if ctx.needs_input_grad[1] else None, weight_OI)
        ctx.bias_dtype = None if bias_O is None else bias_O.dtype
        out_TO = (rows_TI @ weight_OI.to(torch.bfloat16).T).float()
        return out_TO if bias_O is None else out_TO.add_(bias_O.float())

    @staticmethod
    def backward(ctx, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        rows_TI, weight_OI = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        short_TO = grad_TO.to(torch.bfloat16)
        return (
            (short_TO @ weight_OI.to(torch.bfloat16)).float() if need_x else None,
            (short_TO.T @ rows_TI).to(weight_OI.dtype) if need_weight else None,
            grad_TO.sum(0).to(ctx.bias_dtype) if need_bias else None,
        )


class _QuantisedLinear(torch.autograd.Function):
    """`_Linear` with a weight that is never trained and keeps its few bits between the passes."""

    @staticmethod
    def forward(ctx, x_TI: Tensor, weight_OI: QuantTensor, bias_O: Tensor | None) -> Tensor:
        ctx.weight_OI, ctx.bias_dtype = weight_OI, None if bias_O is None else bias_O.dtype
        return _product(x_TI, weight_OI, bias_O, None)

    @staticmethod
    def backward(ctx, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        need_x, _, need_bias = ctx.needs_input_grad
        return (
            _grad_rows(grad_TO, ctx.weight_OI) if need_x else None,
            None,
            grad_TO.sum(0).to(ctx.bias_dtype) if need_bias else None,
        )


class _QuantisedGroups(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NI: Tensor, weight_EOI: QuantTensor, counts_E: Tensor) -> Tensor:
        ctx.weight_EOI, ctx.counts = weight_EOI, counts_E.tolist()
        return _product(x_NI, weight_EOI, None, counts_E)

    @staticmethod
    def backward(ctx, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        return _grad_of_groups(grad_NO, ctx.weight_EOI, ctx.counts), None, None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_NI if ctx.needs_input_grad[1] else None, weight_EOI)
        ctx.counts = counts_E.tolist()
        return _product(x_NI, weight_EOI, None, counts_E)

    @staticmethod
    def backward(ctx, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, weight_EOI = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        groups = grad_NO.split(ctx.counts)
        grad_x = grad_weight = None
        if need_x:
            grad_x = _grad_of_groups(grad_NO, weight_EOI, ctx.counts)
        if need_weight:
            grad_weight = torch.zeros_like(weight_EOI)
            for expert, (grad, rows) in enumerate(zip(groups, x_NI.split(ctx.counts))):
                if len(rows):
                    grad_weight[expert] = grad.T @ rows
        return grad_x, grad_weight, None


def _product(
    x_NI: Tensor, weight: Weight, bias_O: Tensor | None, counts_E: Tensor | None
) -> Tensor:
    """Rows times `weight (O, I)`, or `(E, O, I)` with counts."""
    if isinstance(weight, QuantTensor):
        if counts_E is None:
            return _many_rows(x_NI, weight, bias_O)
        groups = enumerate(x_NI.split(counts_E.tolist()))
        parts = [_many_rows(rows, weight[e], None) for e, rows in groups if len(rows)]
        return torch.cat(parts) if parts else x_NI.new_empty(0, weight.shape[-2])
    num_rows, width = x_NI.shape
    outputs = weight.shape[-2]
    many = num_rows >= MANY_ROWS[isa()] and not is_batch_invariant()
    if counts_E is None and many:
        return _many_rows(x_NI, weight, bias_O)
    assert weight.shape[-1] == width, f"x is {tuple(x_NI.shape)}, weight {tuple(weight.shape)}"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        weight = weight.float()
    weight = weight.contiguous()
    if x_NI.stride(1) != 1:
        x_NI = x_NI.contiguous()
    if bias_O is not None:
        bias_O = bias_O.float().contiguous()
    if counts_E is not None:
        assert counts_E.dtype == torch.int64 and len(counts_E) == len(weight)
        counts_E = counts_E.contiguous()
    out_NO = x_NI.new_empty(num_rows, outputs)
    library().ernie_linear(
        x_NI.data_ptr(),
        x_NI.stride(0),
        weight.data_ptr(),
        DTYPES[weight.dtype],
        None if bias_O is None else bias_O.data_ptr(),
        out_NO.data_ptr(),
        None if counts_E is None else counts_E.data_ptr(),
        1 if counts_E is None else len(counts_E),
        num_rows,
        width,
        outputs,
        torch.get_num_threads(),
    )
    return out_NO


def _many_rows(x_TI: Tensor, weight_OI: Weight, bias_O: Tensor | None) -> Tensor:
    if isinstance(weight_OI, Tensor) and weight_OI.dtype == torch.float32:
        out_TO = x_TI @ weight_OI.T
    else:
        out_TO = x_TI.new_empty(len(x_TI), weight_OI.shape[0])
        for first, block in _float_blocks(weight_OI):
            torch.mm(x_TI, block.T, out=out_TO[:, first : first + len(block)])
    return out_TO if bias_O is None else out_TO.add_(bias_O.float())


def _grad_of_groups(grad_NO: Tensor, weight_EOI: Weight, counts: list[int]) -> Tensor:
    """Rows sorted by expert: `grad @ weight[expert]`."""
    grad_NI = grad_NO.new_empty(len(grad_NO), weight_EOI.shape[2])
    groups = zip(grad_NO.split(counts), grad_NI.split(counts))
    for e, (rows, out) in enumerate(groups):
        if len(rows):
            _grad_rows(rows, weight_EOI[e], out)
    return grad_NI


def _grad_rows(grad_TO: Tensor, weight_OI: Weight, out_TI: Tensor | None = None) -> Tensor:
    """`grad @ weight` in float32."""
    if out_TI is None:
        out_TI = grad_TO.new_empty(len(grad_TO), weight_OI.shape[1])
    if isinstance(weight_OI, Tensor) and weight_OI.dtype == torch.float32:
        return torch.mm(grad_TO, weight_OI, out=out_TI)
    for first, block in _float_blocks(weight_OI):
        columns = grad_TO[:, first : first + len(block)]
        if first:
            out_TI.addmm_(columns, block)
        else:
            torch.mm(columns, block, out=out_TI)
    return out_TI


def _float_blocks(weight_OI: Weight) -> Iterator[tuple[int, Tensor]]:
    """(first row, float32 copy) of blocks of rows; a copy is valid until the next one."""
    width = weight_OI.shape[1]
    if not hasattr(_buffers, "weights"):
        _buffers.weights = torch.empty(BLOCK_WEIGHTS)
    num_rows = max(1, BLOCK_WEIGHTS // width)
    for first in range(0, weight_OI.shape[0], num_rows):
        block = weight_OI[first : first + num_rows]
        floats = _buffers.weights[: block.shape[0] * width].view(block.shape)
        if isinstance(block, Tensor):
            floats.copy_(block)
        else:
            _dequantize(block, floats)
        yield first, floats


_INT4_LEVELS = torch.arange(-8.0, 8.0)
_NF4_LEVELS = torch.tensor(NF4_LEVELS)


def _dequantize(weight_OI: QuantTensor, out_OI: Tensor) -> None:
    """`weight.dequantized()`, to the bit, into contiguous memory."""
    data, channel_O = weight_OI.data.contiguous(), weight_OI.channel_scale.contiguous()
    groups = weight_OI.group_scale
    scales_Og = None if groups is None else groups.float().contiguous()
    levels = _NF4_LEVELS if weight_OI.is_normal else _INT4_LEVELS
    library().ernie_dequantize(
        data.data_ptr(),
        channel_O.data_ptr(),
        None if scales_Og is None else scales_Og.data_ptr(),
        levels.data_ptr(),
        weight_OI.bits,
        weight_OI.group_size,
        *out_OI.shape,
        out_OI.data_ptr(),
        torch.get_num_threads(),
    )
