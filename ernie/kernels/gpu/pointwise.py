"""Norm, rotation, gate and cache writes on a GPU: one pass over memory each, forward and backward.

Rounding follows the reference step by step, so in the forward pass only the order of sums differs.

Legend: T tokens, D hidden size, I width of an MLP, H heads, G key/value heads, d head width,
p pairs of a head, B blocks of the cache, P positions of a block, r elements of a cached row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie.kernels.gpu.language import overlapped, rows_of, wait

NORM_PROGRAMS = 1056  # eight for each multiprocessor of an H100, in the backward pass of the norm
SWIGLU_BLOCK = 1024
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it leaves no bits behind the point


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return _RmsNorm.apply(x_TD, weight_D, eps)


def rotate(x_THd: Tensor, cos_Tp: Tensor, sin_Tp: Tensor, *, halves: bool = False) -> Tensor:
    return _Rotate.apply(x_THd, cos_Tp, sin_Tp, halves)


def rotate_(x_THd: Tensor, cos_Tp: Tensor, sin_Tp: Tensor) -> None:
    assert x_THd[:1].is_contiguous(), "the heads of a token must stand side by side"
    _turn(x_THd, cos_Tp, sin_Tp, x_THd, 1.0, halves=False)


def swiglu(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    return _SwiGLU.apply(gate_TI, up_TI)


def swiglu_halves(gate_up_Tw: Tensor) -> Tensor:
    return _SwiGLUHalves.apply(gate_up_Tw)


def write_cache(
    k_TGd: Tensor, v_TGd: Tensor, k_cache_BPGr: Tensor, v_cache_BPGr: Tensor, slots_T: Tensor
) -> None:
    k, v, (num_tokens, num_heads, width) = rows_of(k_TGd), rows_of(v_TGd), k_TGd.shape
    if num_tokens:
        _write_cache[(num_tokens, 2)](
            k, v, k_cache_BPGr, v_cache_BPGr, scales_of(k_cache_BPGr), scales_of(v_cache_BPGr),
            slots_T, k.stride(0), v.stride(0), num_heads, width, k_cache_BPGr.shape[-1],
            triton.next_power_of_2(num_heads), triton.next_power_of_2(width),
        )  # fmt: skip


def scales_of(cache_BPGr: Tensor) -> Tensor | None:
    """A cache of int8 seen as float32: the last number of each row is its scale."""
    assert cache_BPGr.is_contiguous()
    return cache_BPGr.view(torch.float32) if cache_BPGr.dtype == torch.int8 else None


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
    def forward(ctx: Any, x_THd: Tensor, cos_Tp: Tensor, sin_Tp: Tensor, halves: bool) -> Tensor:
        ctx.save_for_backward(cos_Tp, sin_Tp)
        ctx.halves, out = halves, x_THd.new_empty(x_THd.shape)
        return _turn(rows_of(x_THd), cos_Tp, sin_Tp, out, 1.0, halves=halves)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (cos_Tp, sin_Tp), grad = ctx.saved_tensors, rows_of(grads[0])
        dx = _turn(grad, cos_Tp, sin_Tp, grad.new_empty(grad.shape), -1.0, halves=ctx.halves)
        return dx, None, None, None


def _turn(
    x: Tensor, cos_Tp: Tensor, sin_Tp: Tensor, out: Tensor, direction: float, *, halves: bool
) -> Tensor:
    """Write x turned to `out`, which may be x itself."""
    num_tokens, num_heads, width = x.shape
    if num_tokens:
        _rotate[(num_tokens,)](
            x, cos_Tp.contiguous(), sin_Tp.contiguous(), out, x.stride(0), out.stride(0), direction,
            num_heads, width, triton.next_power_of_2(num_heads), triton.next_power_of_2(width // 2),
            halves,
        )  # fmt: skip
    return out


class _SwiGLUHalves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_Tw: Tensor) -> Tensor:
        both = rows_of(gate_up_Tw)
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, -1)
        out = gate.new_empty(gate.shape)
        if out.numel():
            _swiglu_forward[_swiglu_grid(out)](
                gate, up, out, gate.stride(0), up.stride(0), out.shape[1], SWIGLU_BLOCK
            )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        grad, dboth = grads[0].contiguous(), both.new_empty(both.shape)
        (gate, up), (dgate, dup) = both.chunk(2, -1), dboth.chunk(2, -1)
        if grad.numel():
            _swiglu_backward[_swiglu_grid(grad)](
                gate, up, grad, dgate, dup, gate.stride(0), up.stride(0), dgate.stride(0),
                grad.shape[1], SWIGLU_BLOCK,
            )  # fmt: skip
        return dboth


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
                grad.shape[1], SWIGLU_BLOCK,
            )  # fmt: skip
        return dgate, dup


def _swiglu_grid(out_TI: Tensor) -> tuple[int, int]:
    return len(out_TI), triton.cdiv(out_TI.shape[1], SWIGLU_BLOCK)


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


@overlapped
@triton.jit
def _norm_forward(x, weight, out, scales, x_stride, width, eps, BLOCK: tl.constexpr):
    wait()
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


@overlapped
@triton.jit
def _rotate(
    x, cos, sin, out, x_stride, out_stride, direction,
    num_heads, width, HEADS: tl.constexpr, PAIRS: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """All heads of one token. Heads are read whole: pairs of neighbours are taken apart in
    registers, halves are two reads."""
    wait()
    token = tl.program_id(0).to(tl.int64)
    x += token * x_stride
    out += token * out_stride
    head, pair, pairs = tl.arange(0, HEADS)[:, None], tl.arange(0, PAIRS), width // 2
    c = tl.load(cos + token * pairs + pair, pair < pairs, 0.0)[None, :]
    s = tl.load(sin + token * pairs + pair, pair < pairs, 0.0)[None, :] * direction
    if HALVES:
        place, inside = head * width + pair[None, :], (head < num_heads) & (pair[None, :] < pairs)
        low = tl.load(x + place, inside, 0.0).to(tl.float32)
        high = tl.load(x + pairs + place, inside, 0.0).to(tl.float32)
        tl.store(out + place, low * c - high * s, inside)
        tl.store(out + pairs + place, high * c + low * s, inside)
    else:
        at = tl.arange(0, 2 * PAIRS)[None, :]
        place, inside = head * width + at, (head < num_heads) & (at < width)
        values = tl.load(x + place, inside, 0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(values, [HEADS, PAIRS, 2]))
        turned = tl.join(even * c - odd * s, odd * c + even * s)
        tl.store(out + place, tl.reshape(turned, [HEADS, 2 * PAIRS]), inside)


@overlapped
@triton.jit
def _swiglu_forward(gate, up, out, gate_stride, up_stride, width, BLOCK: tl.constexpr):
    wait()
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    g = tl.load(gate + row * gate_stride + at, inside, 0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + at, inside, 0.0).to(tl.float32)
    activated = (g * tl.sigmoid(g)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + at, activated * u, inside)


@triton.jit
def _swiglu_backward(
    gate, up, grad, dgate, dup, gate_stride, up_stride, out_stride, width, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    g = tl.load(gate + row * gate_stride + at, inside, 0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + at, inside, 0.0).to(tl.float32)
    d = tl.load(grad + row * width + at, inside, 0.0).to(tl.float32)
    gated = tl.sigmoid(g)
    tl.store(dgate + row * out_stride + at, d * u * gated * (1 + g * (1 - gated)), inside)
    tl.store(dup + row * out_stride + at, d * g * gated, inside)


@overlapped
@triton.jit
def _write_cache(
    k, v, k_cache, v_cache, k_scales, v_scales, slots, k_stride, v_stride,
    num_heads, width, row_size, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The key, or the value, of one token: all heads."""
    wait()
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    if tl.program_id(1) == 0:
        _write(
            k + token * k_stride, k_cache, k_scales, slot, num_heads, width, row_size, HEADS, WIDTH
        )
    else:
        _write(
            v + token * v_stride, v_cache, v_scales, slot, num_heads, width, row_size, HEADS, WIDTH
        )


@triton.jit
def _write(
    new, cache, scales, slot, num_heads, width, row_size, HEADS: tl.constexpr, WIDTH: tl.constexpr
):
    head, at = tl.arange(0, HEADS), tl.arange(0, WIDTH)
    inside = (head < num_heads)[:, None] & (at < width)[None, :]
    # Through float32: there is no direct way between the two types of 16 bits.
    values = tl.load(new + head[:, None] * width + at[None, :], inside, 0.0).to(tl.float32)
    row = slot * num_heads + head
    if scales is not None:
        scale = tl.max(tl.abs(values), 1) / 127
        tl.store(scales + (row + 1) * (row_size // 4) - 1, scale, head < num_heads)
        values = values / tl.where(scale == 0.0, 1.0, scale)[:, None]
        values = (values + ROUNDER) - ROUNDER
    tl.store(cache + row[:, None] * row_size + at[None, :], values, inside)
