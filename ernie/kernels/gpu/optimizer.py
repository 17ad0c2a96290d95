"""AdamW and sums of gradients on a GPU, in one pass over what they read, with the bits of the
reference.

Every operation rounds by itself, as in the reference: kernels are compiled without fusing products
into sums (`enable_fp_fusion=False`), roots and quotients are correctly rounded, and the random bits
are the same integers. Scalars are rounded to float32 on their way in, as torch rounds them.

Legend: N elements of a parameter, B blocks of 256 of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie.kernels import reference
from ernie.kernels.reference import MOMENT_BLOCK, AdamWUpdate

ELEMENTS = 1024  # of one program
BLOCK = tl.constexpr(MOMENT_BLOCK)
BLOCKS = 4  # of one program, each with scales of its own
UNIT = tl.constexpr(2.0**-16)


def float32_sum(total: Tensor, gradient: Tensor) -> Tensor:
    if not (total.is_contiguous() and gradient.is_contiguous()):
        return reference.float32_sum(total, gradient)
    is_kept = total.dtype == torch.float32
    out = total if is_kept else torch.empty_like(total, dtype=torch.float32)
    size = total.numel()
    _float32_sum[(triton.cdiv(size, ELEMENTS),)](
        total, gradient, out, size, SIZE=ELEMENTS, num_warps=4
    )
    return out


def adamw_step(
    parameter_N: Tensor,
    gradient_N: Tensor,
    moment_N: Tensor,
    square_N: Tensor,
    update: AdamWUpdate,
    short_N: Tensor | None = None,
) -> None:
    size = parameter_N.numel()
    _adamw[(triton.cdiv(size, ELEMENTS),)](
        parameter_N, gradient_N.contiguous(), moment_N, square_N, short_N, size, *update.constants,
        _signed(update.rounding_key), ROUNDS=moment_N.dtype == torch.bfloat16, SIZE=ELEMENTS,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def adamw_8bit_step(
    parameter_N: Tensor,
    gradient_N: Tensor,
    moment_N: Tensor,
    square_N: Tensor,
    scales_2B: Tensor,
    update: AdamWUpdate,
    short_N: Tensor | None = None,
) -> None:
    num_blocks = scales_2B.shape[1]
    _adamw_8bit[(triton.cdiv(num_blocks, BLOCKS),)](
        parameter_N, gradient_N.contiguous(), moment_N, square_N, scales_2B, short_N,
        parameter_N.numel(), num_blocks, *update.constants, _signed(update.rounding_key),
        ROWS=BLOCKS, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def _signed(key: int) -> int:
    """The same 32 bits as a signed integer: one type of argument, whatever they are."""
    return key - 2**32 if key >= 2**31 else key


@triton.jit
def _float32_sum(total, gradient, out, size, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    here = at < size
    added = tl.load(total + at, here).to(tl.float32) + tl.load(gradient + at, here).to(tl.float32)
    tl.store(out + at, added, here)


@triton.jit
def _random_bits(element, key):
    """`reference._rounding_bits` of these elements (int64), uint32."""
    low, high = element.to(tl.uint32), (element >> 32).to(tl.uint32)
    bits = low * 0x9E3779B1 + high * 0x85EBCA6B + key.to(tl.uint32, bitcast=True)
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    return bits ^ (bits >> 16)


@triton.jit
def _rounded_at_random(x, bits):
    """float32 that is exact in bfloat16: away from zero with the probability of the 16 bits cut
    off."""
    raised = x.to(tl.int32, bitcast=True) + bits.to(tl.int32)
    return (raised & -0x10000).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["key"])
def _adamw(
    parameter, gradient, moment, square, short, size,
    decay, step_size, beta1, rest1, beta2, rest2, root_scale, eps, grad_scale, key,
    ROUNDS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    element = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = element < size
    g = tl.load(gradient + element, inside, 0.0).to(tl.float32) * grad_scale
    m = tl.load(moment + element, inside, 0.0).to(tl.float32) * beta1 + g * rest1
    s = tl.load(square + element, inside, 0.0).to(tl.float32) * beta2 + g * g * rest2
    update = tl.div_rn(m * step_size, tl.sqrt_rn(s) * root_scale + eps)
    p = tl.load(parameter + element, inside, 0.0) * decay - update
    tl.store(parameter + element, p, inside)
    if short is not None:
        tl.store(short + element, p, inside)
    if ROUNDS:
        bits = _random_bits(element, key)
        m, s = _rounded_at_random(m, bits & 0xFFFF), _rounded_at_random(s, bits >> 16)
    tl.store(moment + element, m, inside)
    tl.store(square + element, s, inside)


@triton.jit(do_not_specialize=["key"])
def _adamw_8bit(
    parameter, gradient, moment, square, scales, short, size, num_blocks,
    decay, step_size, beta1, rest1, beta2, rest2, root_scale, eps, grad_scale, key,
    ROWS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    element = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    real, inside = block < num_blocks, element < size
    moment_scale = tl.load(scales + block, real, 0.0)[:, None]
    root_unit = tl.load(scales + num_blocks + block, real, 0.0)[:, None]
    g = tl.load(gradient + element, inside, 0.0).to(tl.float32) * grad_scale
    m = tl.load(moment + element, inside, 0).to(tl.float32) * moment_scale * beta1 + g * rest1
    root = tl.load(square + element, inside, 0).to(tl.float32) * root_unit
    root = tl.sqrt_rn(root * root * beta2 + g * g * rest2)
    update = tl.div_rn(m * step_size, root * root_scale + eps)
    p = tl.load(parameter + element, inside, 0.0) * decay - update
    tl.store(parameter + element, p, inside)
    if short is not None:
        tl.store(short + element, p, inside)

    bits = _random_bits(element, key)
    top_m, top_root = tl.max(tl.abs(m), 1), tl.max(root, 1)
    to_m = tl.where(top_m > 1e-30, tl.div_rn(127.0, top_m), 0.0)[:, None]
    to_root = tl.where(top_root > 1e-30, tl.div_rn(255.0, top_root), 0.0)[:, None]
    codes = (m * to_m + 128.0 + (bits & 0xFFFF).to(tl.float32) * UNIT).to(tl.int32)
    roots = (root * to_root + (bits >> 16).to(tl.float32) * UNIT).to(tl.int32)
    roots = tl.maximum(tl.minimum(roots, 255), (root > 0).to(tl.int32))
    tl.store(moment + element, (tl.minimum(codes, 255) - 128).to(tl.int8), inside)
    tl.store(square + element, roots.to(tl.uint8), inside)
    tl.store(scales + block, tl.div_rn(top_m, 127.0), real)
    tl.store(scales + num_blocks + block, tl.div_rn(top_root, 255.0), real)
