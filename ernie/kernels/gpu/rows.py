"""Products of single rows on a GPU: a decoded token, or the experts that a few tokens have chosen.

    out[row] = W[expert of row] @ x[row]     each program: a few outputs, all columns, float32 sums

One row gives a tensor core nothing to do: what counts is that bytes of the weight are under way all
the time. So a weight goes from memory into registers in runs of 16 bytes a thread, becomes float32
there, and meets x in plain arithmetic. Integers become floats by their bits: 2**23 + n has n in its
last bits, and taking 2**23 off again costs one addition where a conversion would cost four.

A row's result does not depend on the other rows.

Legend: R rows of x, N rows of the result, O outputs, I columns of a weight, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie.kernels.gpu.language import INTERPRETED, overlapped, rows_of, wait
from ernie.kernels.weights import PackedWeight

BYTES = tl.constexpr(32)  # of a row in a block of a 4-bit weight: 64 columns
MAGIC = tl.constexpr(0x4B000000)  # the bits of 2**23 as float32


def row_products(
    x_RI: Tensor,
    weight: PackedWeight,
    *,
    gated: bool = False,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    experts: Tensor | None = None,
    copies: int = 1,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`x @ weight.T (+ bias) (+ residual)`, or with `gated` the swiglu of its two halves; `(N, O)`.

    A weight of experts needs `experts`, int32 `(N,)`: row n takes expert n's weight. Input row of
    row n is `n // copies`. The result has x's dtype unless `out_dtype` says otherwise.
    """
    x = rows_of(x_RI)
    num_rows = len(x) * copies
    num_outputs, width = weight.shape[-2] // (2 if gated else 1), weight.shape[-1]
    out = x.new_empty(num_rows, num_outputs, dtype=out_dtype or x.dtype)
    tensors = weight.tensors
    data = tensors["weight"] if "weight" in tensors else tensors["data"]
    bits = 0 if "weight" in tensors else int(weight.format.removeprefix("int"))
    residual = None if residual is None else rows_of(residual)
    has_experts = len(weight.shape) == 3

    def grid(config: dict[str, Any]) -> tuple[int, int]:
        return triton.cdiv(num_outputs, config["BLOCK_O"]), num_rows

    if num_rows:
        _row[grid](
            x, data, tensors.get("group_scale"), tensors.get("channel_scale"), bias, residual, out,
            experts, num_outputs, width, x.stride(0), data.stride(0) if has_experts else 0,
            0 if residual is None else residual.stride(0),
            COPIES=copies, BITS=bits, GATED=gated,
        )  # fmt: skip
    return out


def _config(outputs: int, columns: int, num_warps: int) -> triton.Config:
    settings = {"BLOCK_O": outputs, "BLOCK_K": columns}
    return triton.Config(settings, num_warps=num_warps, num_stages=1)


CONFIGS = {  # by the bits of the weight
    0: [_config(8, 512, 4), _config(4, 512, 4), _config(16, 256, 4)],
    8: [_config(8, 512, 4), _config(16, 512, 4), _config(8, 1024, 4)],
    4: [_config(8, 512, 4), _config(16, 512, 4), _config(16, 1024, 8)],
}
ALL = list({str(config): config for some in CONFIGS.values() for config in some}.values())


def _fitting(configs: list[triton.Config], arguments: dict, **rest: Any) -> list[triton.Config]:
    """The configs that are worth a trial for such a weight."""
    return CONFIGS[{**arguments, **rest}["BITS"]]


@overlapped
@triton.autotune(
    ALL[:1] if INTERPRETED.value else ALL,
    key=["num_outputs", "width", "BITS", "GATED"],
    prune_configs_by=None if INTERPRETED.value else {"early_config_prune": _fitting},
)
@triton.jit
def _row(
    x, weight, group_scale, channel_scale, bias, residual, out, experts,
    num_outputs, width, x_stride, expert_stride, residual_stride,
    COPIES: tl.constexpr, BITS: tl.constexpr, GATED: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    wait()
    row = tl.program_id(1).to(tl.int64)
    expert = tl.cast(0, tl.int64)
    if experts is not None:
        expert = tl.load(experts + row).to(tl.int64)
    column = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    # Outputs past the last repeat it, and are not stored.
    source = tl.minimum(column, num_outputs - 1)
    total_outputs = num_outputs * 2 if GATED else num_outputs
    x_row = x + row // COPIES * x_stride
    data = weight + expert * expert_stride
    scales = group_scale
    if BITS == 4:
        scales = group_scale + expert * (tl.cdiv(width, 2 * BYTES) * 2 * total_outputs)
    channels = channel_scale
    if BITS != 0:
        channels = channel_scale + expert * total_outputs
    value = _sum(
        x_row, data, scales, channels, source, total_outputs, width, BITS, BLOCK_O, BLOCK_K
    )
    if GATED:
        up = _sum(
            x_row, data, scales, channels, source + num_outputs, total_outputs, width,
            BITS, BLOCK_O, BLOCK_K,
        )  # fmt: skip
        value = value * tl.sigmoid(value) * up
    inside = column < num_outputs
    if bias is not None:
        value += tl.load(bias + column, inside, 0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + row * residual_stride + column, inside, 0.0).to(tl.float32)
    tl.store(out + row * num_outputs + column, value, inside)


@triton.jit
def _sum(
    x_row, data, scales, channels, source, total_outputs, width,
    BITS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The rows `source` of one weight times x, float32 (BLOCK_O,)."""
    if BITS == 4:
        total = _sum_of_nibbles(x_row, data, scales, source, total_outputs, width, BLOCK_O, BLOCK_K)
    else:
        acc = tl.zeros([BLOCK_O, BLOCK_K], tl.float32)
        rows = data + source.to(tl.int64)[:, None] * width
        for k in range(0, width, BLOCK_K):
            at = k + tl.arange(0, BLOCK_K)
            there = at < width
            values = tl.load(rows + at[None, :], there[None, :], 0)
            acc += _floats(values) * tl.load(x_row + at, there, 0.0).to(tl.float32)[None, :]
        total = tl.sum(acc, 1)
    if BITS != 0:
        total *= tl.load(channels + source)
    return total


@triton.jit
def _sum_of_nibbles(
    x_row, data, scales, source, total_outputs, width, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    BLOCKS: tl.constexpr = BLOCK_K // (2 * BYTES)
    acc = tl.zeros([BLOCK_O, BLOCKS], tl.float32)
    byte = tl.arange(0, BYTES)
    num_blocks = tl.cdiv(width, 2 * BYTES)
    for first in range(0, num_blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        there = block < num_blocks
        place = block.to(tl.int64)[None, :] * total_outputs + source[:, None]
        both = tl.load(
            data + place[:, :, None] * BYTES + byte[None, None, :], there[None, :, None], 0
        )
        at = block[:, None] * (2 * BYTES) + byte[None, :]
        low = tl.load(x_row + at, at < width, 0.0).to(tl.float32)
        high = tl.load(x_row + at + BYTES, at + BYTES < width, 0.0).to(tl.float32)
        beside = block[None, :] * 2 * total_outputs + source[:, None]
        scale = tl.load(scales + beside, there[None, :], 0).to(tl.float32)
        acc += tl.sum(_below_16(both & 15) * low[None, :, :], 2) * scale
        scale = tl.load(scales + beside + total_outputs, there[None, :], 0).to(tl.float32)
        acc += tl.sum(_below_16(both >> 4) * high[None, :, :], 2) * scale
    return tl.sum(acc, 1)


@triton.jit
def _floats(values):
    """Values of any type as float32."""
    if values.dtype == tl.int8:
        return (values.to(tl.int32) + (MAGIC + 128)).to(tl.float32, bitcast=True) - 8388736.0
    return values.to(tl.float32)


@triton.jit
def _below_16(nibbles):
    """Numbers 0 .. 15, which stand for -8 .. 7, as float32."""
    return (nibbles.to(tl.int32) | MAGIC).to(tl.float32, bitcast=True) - 8388616.0
