"""Norm, rotation, gate and cache writes on a GPU: one pass over memory each, forward and backward.

Rounding follows the reference step by step, so in the forward pass only the order of sums differs.

Legend: T tokens, D hidden size, I width of an MLP, H heads, G key/value heads, d head width,
p pairs of a head, B blocks of the cache, P positions of a block.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie.kernels.gpu.language import rows_of

NORM_PROGRAMS = 264  # two for each multiprocessor of an H100, in the backward pass of the norm
SWIGLU_BLOCK = 1024


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return _RmsNorm.apply(x_TD, weight_D, eps)


def rotate(x_THd: Tensor, cos_Tp: Tensor, sin_Tp: Tensor) -> Tensor:
    return _Rotate.apply(x_THd, cos_Tp, sin_Tp)


def swiglu(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    return _SwiGLU.apply(gate_TI, up_TI)


def write_cache(
    k_TGd: Tensor, v_TGd: Tensor, k_cache_BPGd: Tensor, v_cache_BPGd: Tensor, slots_T: Tensor
) -> None:
    assert k_cache_BPGd.is_contiguous() and v_cache_BPGd.is_contiguous()
    k, v = rows_of(k_TGd), rows_of(v_TGd)
    if num_tokens := len(slots_T):
        width = k.shape[1] * k.shape[2]
        _write_cache[(num_tokens,)](
            k, v, k_cache_BPGd, v_cache_BPGd, slots_T, k.stride(0), v.stride(0),
            width, BLOCK=triton.next_power_of_2(width),
        )  # fmt: skip


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x = rows_of(x_TD)
        num_rows, width = x.shape
        out, scale_T = x.new_empty(x.shape), x.new_empty(num_rows, dtype=torch.float32)
        if num_rows:
            block = triton.next_power_of_2(width)
            _norm_forward[(num_rows,)](
                x, weight_D, out, scale_T, x.stride(0), width, eps, block, num_warps=_warps(block)
            )
        ctx.save_for_backward(x, weight_D, scale_T)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, scale_T = ctx.saved_tensors
        grad = grads[0].contiguous()
        num_rows, width = x.shape
        num_programs = max(1, min(NORM_PROGRAMS, num_rows))
        dx, dw = x.new_empty(x.shape), x.new_zeros(num_programs, width, dtype=torch.float32)
        if num_rows:
            block = triton.next_power_of_2(width)
            _norm_backward[(num_programs,)](
                x, weight_D, scale_T, grad, dx, dw, x.stride(0), num_rows, width, block,
                num_warps=_warps(block),
            )  # fmt: skip
        return dx, dw.sum(0).to(weight_D.dtype), None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THd: Tensor, cos_Tp: Tensor, sin_Tp: Tensor) -> Tensor:
        ctx.save_for_backward(cos_Tp, sin_Tp)
        return _rotated(x_THd, cos_Tp, sin_Tp, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _rotated(grads[0], *ctx.saved_tensors, -1.0), None, None


def _rotated(x_THd: Tensor, cos_Tp: Tensor, sin_Tp: Tensor, direction: float) -> Tensor:
    x = rows_of(x_THd)
    num_tokens, num_heads, width = x.shape
    out = x.new_empty(x.shape)
    if num_tokens:
        _rotate[(num_tokens,)](
            x, cos_Tp.contiguous(), sin_Tp.contiguous(), out, x.stride(0), direction,
            num_heads, width, triton.next_power_of_2(num_heads), triton.next_power_of_2(width),
        )  # fmt: skip
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_TI: Tensor, up_TI: Tensor) -> Tensor:
        gate, up = rows_of(gate_TI), rows_of(up_TI)
        ctx.save_for_backward(gate, up)
        out = gate.new_empty(gate.shape)
        if out.numel():
            _swiglu_forward[_swiglu_grid(out)](
                gate, up, out, gate.stride(0), up.stride(0), out.shape[1], SWIGLU_BLOCK
            )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad = grads[0].contiguous()
        dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
        if grad.numel():
            _swiglu_backward[_swiglu_grid(grad)](
                gate, up, grad, dgate, dup, gate.stride(0), up.stride(0), grad.shape[1],
                SWIGLU_BLOCK,
            )  # fmt: skip
        return dgate, dup


def _swiglu_grid(out_TI: Tensor) -> tuple[int, int]:
    return len(out_TI), triton.cdiv(out_TI.shape[1], SWIGLU_BLOCK)


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


@triton.jit
def _norm_forward(x, weight, out, scales, x_stride, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    values = tl.load(x + row * x_stride + at, inside, 0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values) / width + eps)
    tl.store(scales + row, scale)
    normed = (values * scale).to(out.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + at, inside, 0.0).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + at, normed * w, inside)


@triton.jit
def _norm_backward(x, weight, scales, grad, dx, dw, x_stride, num_rows, width, BLOCK: tl.constexpr):
    """With n = x * s, s = 1 / rms(x): dx = s * (g w - n * mean(g w n)); dw = sum over rows of g n.

    Each program takes every `num_programs`-th row and keeps its own sum of dw.
    """
    at = tl.arange(0, BLOCK)
    inside = at < width
    w = tl.load(weight + at, inside, 0.0).to(tl.float32)
    dw_sum = tl.zeros([BLOCK], tl.float32)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        offset = tl.cast(row, tl.int64)
        scale = tl.load(scales + row)
        normed = tl.load(x + offset * x_stride + at, inside, 0.0).to(tl.float32) * scale
        g = tl.load(grad + offset * width + at, inside, 0.0).to(tl.float32)
        dw_sum += g * normed
        gw = g * w
        tl.store(
            dx + offset * width + at, scale * (gw - normed * (tl.sum(gw * normed) / width)), inside
        )
    tl.store(dw + tl.program_id(0) * width + at, dw_sum, inside)


@triton.jit
def _rotate(
    x, cos, sin, out, x_stride, direction,
    num_heads, width, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """All heads of one token. Heads are read whole, and pairs are taken apart in registers."""
    token = tl.program_id(0).to(tl.int64)
    head, at = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
    place, inside = head * width + at, (head < num_heads) & (at < width)
    values = tl.load(x + token * x_stride + place, inside, 0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(values, [HEADS, WIDTH // 2, 2]))
    pair = tl.arange(0, WIDTH // 2)
    pairs = width // 2
    c = tl.load(cos + token * pairs + pair, pair < pairs, 0.0)[None, :]
    s = tl.load(sin + token * pairs + pair, pair < pairs, 0.0)[None, :] * direction
    turned = tl.join(even * c - odd * s, odd * c + even * s)
    tl.store(out + token * num_heads * width + place, tl.reshape(turned, [HEADS, WIDTH]), inside)


@triton.jit
def _swiglu_forward(gate, up, out, gate_stride, up_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    g = tl.load(gate + row * gate_stride + at, inside, 0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + at, inside, 0.0).to(tl.float32)
    activated = (g * tl.sigmoid(g)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + at, activated * u, inside)


@triton.jit
def _swiglu_backward(
    gate, up, grad, dgate, dup, gate_stride, up_stride, width, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    g = tl.load(gate + row * gate_stride + at, inside, 0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + at, inside, 0.0).to(tl.float32)
    d = tl.load(grad + row * width + at, inside, 0.0).to(tl.float32)
    gated = tl.sigmoid(g)
    tl.store(dgate + row * width + at, d * u * gated * (1 + g * (1 - gated)), inside)
    tl.store(dup + row * width + at, d * g * gated, inside)


@triton.jit
def _write_cache(
    k, v, k_cache, v_cache, slots, k_stride, v_stride, width, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    at = tl.arange(0, BLOCK)
    inside = at < width
    new_k = tl.load(k + token * k_stride + at, inside, 0.0)
    new_v = tl.load(v + token * v_stride + at, inside, 0.0)
    # Through float32: there is no direct way between the two types of 16 bits.
    tl.store(k_cache + slot * width + at, new_k.to(tl.float32), inside)
    tl.store(v_cache + slot * width + at, new_v.to(tl.float32), inside)
