"""`linear` and `grouped_linear` on the CPU: float32 rows times float32, bfloat16 or quantised
weights.

Forward, each weight is read once in its own dtype for up to about a hundred rows, and the result of
a row does not depend, to the bit, on the rows computed with it: always in `grouped_linear`, below
`MANY_ROWS` rows in `linear`. From there on the products are torch's float32 ones. Quantised weights
are converted block by block into a buffer that is kept. Backward, the products are ours: of the
speed of torch's with AVX2, and twice that with AVX-512, which torch's library leaves aside on some
processors.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from ernie.kernels import reference
from ernie.kernels.cpu.build import DTYPES, isa, library
from ernie.kernels.dispatch import has_bfloat16_products, is_batch_invariant
from ernie.kernels.weights import NF4_LEVELS, QuantTensor
from ernie.recomputed import Function, keep

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
    counts_E = counts_E.contiguous()
    if torch.is_grad_enabled() and (x_NI.requires_grad or _is_trained(weight_EOI)):
        if isinstance(weight_EOI, QuantTensor):
            return _QuantisedGroups.apply(x_NI, weight_EOI, counts_E)
        return _GroupedLinear.apply(x_NI, weight_EOI, counts_E)
    return _product(x_NI, weight_EOI, None, counts_E)


class _Linear(Function):
    @staticmethod
    def forward(ctx, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        # The rows are kept only for the gradient of the weight: LoRA saves them all.
        ctx.bias_dtype = None if bias_O is None else bias_O.dtype
        keep(ctx, x_TI if ctx.needs_input_grad[1] else None, weight_OI)
        return _product(x_TI, weight_OI, bias_O, None)

    @staticmethod
    def backward(ctx, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, weight_OI = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            _grad_rows(grad_TO, weight_OI) if need_x else None,
            _grad_weight(grad_TO, x_TI, weight_OI, None) if need_weight else None,
            grad_TO.sum(0).to(ctx.bias_dtype) if need_bias else None,
        )


class _LinearInBfloat16(Function):
    """`_Linear` by torch's bfloat16 products; rows are kept in half the bytes.

    Float32 weights are rounded anew in both passes: that is a small part of a product of many rows,
    and a copy kept for backward would be as large as all activations.
    """

    @staticmethod
    def forward(ctx, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        rows_TI = x_TI.to(torch.bfloat16)
        ctx.bias_dtype = None if bias_O is None else bias_O.dtype
        keep(ctx, rows_TI if ctx.needs_input_grad[1] else None, weight_OI)
        out_TO = (rows_TI @ weight_OI.to(torch.bfloat16).T).float()
        return out_TO if bias_O is None else out_TO.add_(bias_O.float())

    @staticmethod
    def backward(ctx, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        rows_TI, weight_OI = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        short_TO = grad_TO.to(torch.bfloat16)
        return (
            _short_grad_rows(short_TO, weight_OI) if need_x else None,
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
        groups = enumerate(grad_NO.split(ctx.counts))
        parts = [_grad_rows(rows, ctx.weight_EOI[e]) for e, rows in groups if len(rows)]
        width = ctx.weight_EOI.shape[2]
        return torch.cat(parts) if parts else grad_NO.new_empty(0, width), None, None


class _GroupedLinear(Function):
    @staticmethod
    def forward(ctx, x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
        keep(ctx, x_NI if ctx.needs_input_grad[1] else None, weight_EOI, counts_E)
        return _product(x_NI, weight_EOI, None, counts_E)

    @staticmethod
    def backward(ctx, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, weight_EOI, counts_E = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        return (
            _grad_rows(grad_NO, weight_EOI, counts_E) if need_x else None,
            _grad_weight(grad_NO, x_NI, weight_EOI, counts_E) if need_weight else None,
            None,
        )


def _product(
    x_NI: Tensor, weight: Weight, bias_O: Tensor | None, counts_E: Tensor | None
) -> Tensor:
    """Rows times `weight (O, I)`, or `(E, O, I)` with counts."""
    assert weight.shape[-1] == x_NI.shape[1], f"x {tuple(x_NI.shape)}, weight {tuple(weight.shape)}"
    out_NO = x_NI.new_empty(len(x_NI), weight.shape[-2])
    if counts_E is None and (isinstance(weight, QuantTensor) or _has_many(x_NI)):
        _multiply_in_blocks(x_NI, weight, out_NO)
        return out_NO if bias_O is None else out_NO.add_(bias_O.float())
    if isinstance(weight, Tensor):
        _multiply(x_NI, _readable(weight), bias_O, counts_E, out_NO)
        return out_NO
    assert counts_E is not None
    counts = counts_E.tolist()
    for e, (rows, out) in enumerate(zip(x_NI.split(counts), out_NO.split(counts))):
        if len(rows):
            _multiply_in_blocks(rows, weight[e], out)
    return out_NO


def _has_many(x_NI: Tensor) -> bool:
    """Whether torch's product is the faster one."""
    return len(x_NI) >= MANY_ROWS[isa()] and not is_batch_invariant()


def _multiply_in_blocks(x_TI: Tensor, weight_OI: Weight, out_TO: Tensor) -> None:
    if isinstance(weight_OI, Tensor) and weight_OI.dtype == torch.float32:
        torch.mm(x_TI, weight_OI.T, out=out_TO)
        return
    for first, block in _float_blocks(weight_OI):
        out = out_TO[:, first : first + len(block)]
        if _has_many(x_TI):
            torch.mm(x_TI, block.T, out=out)
        else:
            _multiply(x_TI, block, None, None, out)


def _multiply(
    x_NI: Tensor,
    weight: Tensor,
    bias_O: Tensor | None,
    counts_E: Tensor | None,
    out_NO: Tensor,
) -> None:
    x_NI = _rows(x_NI)
    bias_O = None if bias_O is None else bias_O.float().contiguous()
    library().ernie_linear(
        x_NI.data_ptr(),
        x_NI.stride(0),
        weight.data_ptr(),
        DTYPES[weight.dtype],
        None if bias_O is None else bias_O.data_ptr(),
        out_NO.data_ptr(),
        out_NO.stride(0),
        *_groups(counts_E, weight),
        len(x_NI),
        weight.shape[-1],
        weight.shape[-2],
        torch.get_num_threads(),
    )


def rows_gradient(grad_TO: Tensor, weight_OI: Tensor) -> Tensor:
    if grad_TO.dtype != torch.float32:
        return reference.rows_gradient(grad_TO, weight_OI)
    if has_bfloat16_products():
        return _short_grad_rows(grad_TO.to(torch.bfloat16), weight_OI)
    return _grad_rows(grad_TO, weight_OI)


def _short_grad_rows(short_TO: Tensor, weight_OI: Tensor) -> Tensor:
    """`grad @ weight` by torch's bfloat16 product."""
    return (short_TO @ weight_OI.to(torch.bfloat16)).float()


def _grad_rows(grad_NO: Tensor, weight: Weight, counts_E: Tensor | None = None) -> Tensor:
    """`grad @ weight` in float32, of a weight `(O, I)`, or `(E, O, I)` with counts."""
    out_NI = grad_NO.new_empty(len(grad_NO), weight.shape[-1])
    if isinstance(weight, Tensor):
        _add_grad_rows(grad_NO, _readable(weight), counts_E, out_NI, add=False)
        return out_NI
    assert counts_E is None
    for first, block in _float_blocks(weight):
        _add_grad_rows(grad_NO[:, first : first + len(block)], block, None, out_NI, add=first > 0)
    return out_NI


def _add_grad_rows(
    grad_NO: Tensor, weight: Tensor, counts_E: Tensor | None, out_NI: Tensor, *, add: bool
) -> None:
    assert grad_NO.dtype == torch.float32 and grad_NO.shape[1] == weight.shape[-2]
    grad_NO = _rows(grad_NO)
    library().ernie_rows_gradient(
        grad_NO.data_ptr(),
        grad_NO.stride(0),
        weight.data_ptr(),
        DTYPES[weight.dtype],
        out_NI.data_ptr(),
        *_groups(counts_E, weight),
        *grad_NO.shape,
        weight.shape[-1],
        add,
        torch.get_num_threads(),
    )


def _grad_weight(grad_NO: Tensor, x_NI: Tensor, weight: Tensor, counts_E: Tensor | None) -> Tensor:
    total = torch.zeros_like(weight, dtype=torch.float32, memory_format=torch.contiguous_format)
    _add_grad_weight(total, grad_NO, x_NI, counts_E)
    return total.to(weight.dtype)


def add_product_(total_OI: Tensor, left_NO: Tensor, right_NI: Tensor) -> None:
    if all(x.dtype == torch.float32 for x in (total_OI, left_NO, right_NI)):
        _add_grad_weight(total_OI, left_NO, right_NI, None)
    else:
        reference.add_product_(total_OI, left_NO, right_NI)


def _add_grad_weight(total: Tensor, grad_NO: Tensor, x_NI: Tensor, counts_E: Tensor | None) -> None:
    assert total.is_contiguous() and grad_NO.dtype == x_NI.dtype == torch.float32
    assert len(grad_NO) == len(x_NI) and total.shape[-2:] == (grad_NO.shape[1], x_NI.shape[1])
    grad_NO, x_NI = _rows(grad_NO), _rows(x_NI)
    library().ernie_weight_gradient(
        grad_NO.data_ptr(),
        grad_NO.stride(0),
        x_NI.data_ptr(),
        x_NI.stride(0),
        total.data_ptr(),
        *_groups(counts_E, total),
        *grad_NO.shape,
        x_NI.shape[1],
        torch.get_num_threads(),
    )


def _groups(counts_E: Tensor | None, weight: Tensor) -> tuple[int | None, int]:
    """Rows of each group, as the library takes them; one group needs no counts."""
    if counts_E is None:
        assert weight.dim() == 2
        return None, 1
    assert counts_E.dtype == torch.int64 and counts_E.is_contiguous()
    assert len(counts_E) == len(weight)
    return counts_E.data_ptr(), len(counts_E)


def _readable(weight: Tensor) -> Tensor:
    """As the library reads it: contiguous, float32 or bfloat16."""
    if weight.dtype not in (torch.float32, torch.bfloat16):
        weight = weight.float()
    return weight.contiguous()


def _rows(x_NI: Tensor) -> Tensor:
    return x_NI if x_NI.stride(1) == 1 else x_NI.contiguous()


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
