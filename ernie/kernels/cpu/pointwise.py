"""Norm, rotation, gates and AdamW on the CPU: one pass over memory each, little saved."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ernie.kernels import reference
from ernie.kernels.cpu.build import DTYPES, library
from ernie.kernels.reference import AdamWUpdate

NORM_BLOCK = 32  # rows whose gradients of the weight are added up in one place


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    if x_TD.dtype != torch.float32 or weight_D.dtype == torch.float16:
        return reference.rms_norm(x_TD, weight_D, eps)
    if torch.is_grad_enabled() and (x_TD.requires_grad or weight_D.requires_grad):
        return _RmsNorm.apply(x_TD, weight_D, eps)
    return _rms_norm(_rows(x_TD), weight_D, eps, None)


def rotate(x_THd: Tensor, cos_Tp: Tensor, sin_Tp: Tensor, *, halves: bool = False) -> Tensor:
    if x_THd.dtype != torch.float32:
        return rotate(x_THd.float(), cos_Tp, sin_Tp, halves=halves).to(x_THd.dtype)
    if torch.is_grad_enabled() and x_THd.requires_grad:
        return _Rotate.apply(x_THd, cos_Tp, sin_Tp, halves)
    return _rotate(x_THd, cos_Tp, sin_Tp, 1.0, halves)


def rotate_(x_THd: Tensor, cos_Tp: Tensor, sin_Tp: Tensor) -> None:
    if x_THd.dtype == torch.float32 and _heads_lie_together(x_THd):
        _turn(x_THd, cos_Tp, sin_Tp, 1.0, False, x_THd)
    else:
        x_THd.copy_(rotate(x_THd, cos_Tp, sin_Tp))


def swiglu(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    if gate_TI.dtype != torch.float32 or up_TI.dtype != torch.float32:
        return reference.swiglu(gate_TI, up_TI)
    if torch.is_grad_enabled() and (gate_TI.requires_grad or up_TI.requires_grad):
        return _SwiGLU.apply(gate_TI, up_TI)
    return _swiglu(_rows(gate_TI), _rows(up_TI))


def swiglu_halves(gate_up_Tw: Tensor) -> Tensor:
    return swiglu(*gate_up_Tw.chunk(2, dim=-1))


def quick_gelu(x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        return reference.quick_gelu(x)
    if torch.is_grad_enabled() and x.requires_grad:
        return _QuickGelu.apply(x)
    return _quick_gelu(x.contiguous())


def squares(tensors: Sequence[Tensor]) -> Tensor:
    if not all(t.dtype in (torch.float32, torch.bfloat16) and t.is_contiguous() for t in tensors):
        return reference.squares(tensors)
    sums = torch.empty(len(tensors), dtype=torch.float64)
    for number, t in enumerate(tensors):
        library().ernie_sum_of_squares(
            t.data_ptr(),
            DTYPES[t.dtype],
            t.numel(),
            sums[number].data_ptr(),
            torch.get_num_threads(),
        )
    return sums


class Update(ctypes.Structure):
    """The constants of one optimizer step, in the order of `struct Update` in pointwise.cpp."""

    _fields_ = [(name, ctypes.c_float) for name in reference.AdamWConstants._fields] + [
        ("key", ctypes.c_uint32)
    ]


def adamw_step(
    parameter_N: Tensor,
    gradient_N: Tensor,
    moment_N: Tensor,
    square_N: Tensor,
    update: AdamWUpdate,
    short_N: Tensor | None = None,
) -> None:
    tensors = (parameter_N, gradient_N, moment_N, square_N)
    assert parameter_N.dtype == torch.float32 and moment_N.dtype == square_N.dtype
    assert all(t.is_contiguous() and t.numel() == parameter_N.numel() for t in tensors)
    library().ernie_adamw(
        parameter_N.data_ptr(),
        gradient_N.data_ptr(),
        DTYPES[gradient_N.dtype],
        moment_N.data_ptr(),
        square_N.data_ptr(),
        DTYPES[moment_N.dtype],
        parameter_N.numel(),
        ctypes.addressof(passed := Update(*update.constants, update.rounding_key)),
        torch.get_num_threads(),
    )
    del passed  # it had to live until here
    if short_N is not None:
        short_N.copy_(parameter_N)


def adamw_8bit_step(
    parameter_N: Tensor,
    gradient_N: Tensor,
    moment_N: Tensor,
    square_N: Tensor,
    scales_2B: Tensor,
    update: AdamWUpdate,
    short_N: Tensor | None = None,
) -> None:
    tensors = (parameter_N, gradient_N, moment_N, square_N)
    assert parameter_N.dtype == torch.float32 and scales_2B.is_contiguous()
    assert (moment_N.dtype, square_N.dtype) == (torch.int8, torch.uint8)
    assert all(t.is_contiguous() and t.numel() == parameter_N.numel() for t in tensors)
    library().ernie_adamw_8bit(
        parameter_N.data_ptr(),
        gradient_N.data_ptr(),
        DTYPES[gradient_N.dtype],
        moment_N.data_ptr(),
        square_N.data_ptr(),
        scales_2B.data_ptr(),
        parameter_N.numel(),
        ctypes.addressof(passed := Update(*update.constants, update.rounding_key)),
        torch.get_num_threads(),
    )
    del passed  # it had to live until here
    if short_N is not None:
        short_N.copy_(parameter_N)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_TD = _rows(x_TD)
        rstd_T = x_TD.new_empty(len(x_TD))
        ctx.save_for_backward(x_TD, weight_D, rstd_T)
        return _rms_norm(x_TD, weight_D, eps, rstd_T)

    @staticmethod
    def backward(ctx, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_D, rstd_T = ctx.saved_tensors
        grad_TD = grad_TD.contiguous()
        weight_D = weight_D.contiguous()
        num_rows, width = x_TD.shape
        dx = torch.empty_like(grad_TD)
        blocks = -(-num_rows // NORM_BLOCK)
        dweight = x_TD.new_empty(blocks, width) if ctx.needs_input_grad[1] else None
        library().ernie_rms_norm_backward(
            grad_TD.data_ptr(),
            x_TD.data_ptr(),
            x_TD.stride(0),
            weight_D.data_ptr(),
            DTYPES[weight_D.dtype],
            rstd_T.data_ptr(),
            dx.data_ptr(),
            None if dweight is None else dweight.data_ptr(),
            num_rows,
            width,
            NORM_BLOCK,
            torch.get_num_threads(),
        )
        return dx, None if dweight is None else dweight.sum(0).to(weight_D.dtype), None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_THd: Tensor, cos_Tp: Tensor, sin_Tp: Tensor, halves: bool) -> Tensor:
        ctx.save_for_backward(cos_Tp, sin_Tp)
        ctx.halves = halves
        return _rotate(x_THd, cos_Tp, sin_Tp, 1.0, halves)

    @staticmethod
    def backward(ctx, grad_THd: Tensor) -> tuple[Tensor | None, ...]:
        cos_Tp, sin_Tp = ctx.saved_tensors
        return _rotate(grad_THd, cos_Tp, sin_Tp, -1.0, ctx.halves), None, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_TI: Tensor, up_TI: Tensor) -> Tensor:
        gate_TI, up_TI = _rows(gate_TI), _rows(up_TI)
        ctx.save_for_backward(gate_TI, up_TI)
        return _swiglu(gate_TI, up_TI)

    @staticmethod
    def backward(ctx, grad_TI: Tensor) -> tuple[Tensor, Tensor]:
        gate_TI, up_TI = ctx.saved_tensors
        grad_TI = grad_TI.contiguous()
        dgate, dup = torch.empty_like(grad_TI), torch.empty_like(grad_TI)
        library().ernie_swiglu_backward(
            grad_TI.data_ptr(),
            gate_TI.data_ptr(),
            gate_TI.stride(0),
            up_TI.data_ptr(),
            up_TI.stride(0),
            dgate.data_ptr(),
            dup.data_ptr(),
            grad_TI.shape[0],
            grad_TI.shape[1],
            torch.get_num_threads(),
        )
        return dgate, dup


class _QuickGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        return _quick_gelu(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad, dx = grad.contiguous(), torch.empty_like(x)
        library().ernie_quick_gelu_backward(
            grad.data_ptr(), x.data_ptr(), dx.data_ptr(), x.numel(), torch.get_num_threads()
        )
        return dx


def _quick_gelu(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    library().ernie_quick_gelu(x.data_ptr(), out.data_ptr(), x.numel(), torch.get_num_threads())
    return out


def _rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, rstd_T: Tensor | None) -> Tensor:
    weight_D = weight_D.contiguous()
    num_rows, width = x_TD.shape
    out_TD = x_TD.new_empty(num_rows, width)
    library().ernie_rms_norm(
        x_TD.data_ptr(),
        x_TD.stride(0),
        weight_D.data_ptr(),
        DTYPES[weight_D.dtype],
        eps,
        out_TD.data_ptr(),
        None if rstd_T is None else rstd_T.data_ptr(),
        num_rows,
        width,
        torch.get_num_threads(),
    )
    return out_TD


def _rotate(x_THd: Tensor, cos_Tp: Tensor, sin_Tp: Tensor, sign: float, halves: bool) -> Tensor:
    out_THd = x_THd.new_empty(x_THd.shape)
    x_THd = x_THd if _heads_lie_together(x_THd) else x_THd.contiguous()
    _turn(x_THd, cos_Tp, sin_Tp, sign, halves, out_THd)
    return out_THd


def _heads_lie_together(x_THd: Tensor) -> bool:
    """Whether each token's heads are contiguous, as they are in a column slice of a projection."""
    _, head, element = x_THd.stride()
    return element == 1 and head == x_THd.shape[2]


def _turn(
    x_THd: Tensor,
    cos_Tp: Tensor,
    sin_Tp: Tensor,
    sign: float,
    halves: bool,
    out_THd: Tensor,
) -> None:
    tokens, heads, width = x_THd.shape
    cos_Tp, sin_Tp = cos_Tp.contiguous(), sin_Tp.contiguous()
    assert cos_Tp.dtype == sin_Tp.dtype == torch.float32
    library().ernie_rotate(
        x_THd.data_ptr(),
        x_THd.stride(0),
        cos_Tp.data_ptr(),
        sin_Tp.data_ptr(),
        sign,
        halves,
        out_THd.data_ptr(),
        out_THd.stride(0),
        tokens,
        heads,
        width,
        torch.get_num_threads(),
    )


def _swiglu(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    num_rows, width = gate_TI.shape
    out_TI = gate_TI.new_empty(num_rows, width)
    library().ernie_swiglu(
        gate_TI.data_ptr(),
        gate_TI.stride(0),
        up_TI.data_ptr(),
        up_TI.stride(0),
        out_TI.data_ptr(),
        num_rows,
        width,
        torch.get_num_threads(),
    )
    return out_TI


def _rows(x_TI: Tensor) -> Tensor:
    return x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
