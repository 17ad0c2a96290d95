"""Weights of 8 and 4 bits back as floats on a GPU: for products with so many rows that reading the
weight once more costs less than a tensor core waiting for integers.

Legend: E experts, O outputs, I columns of a weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie.kernels.weights import GROUP_SIZE, PackedWeight

BLOCK_O = 64
BLOCK_I = 2 * GROUP_SIZE


def unpacked(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weight `(..., O, I)`: integers times their scales in float32, rounded once to `dtype`."""
    if "weight" in weight.tensors:
        return weight.tensors["weight"].to(dtype)
    num_outputs, width = weight.shape[-2:]
    num_experts = weight.shape[0] if len(weight.shape) == 3 else 1
    data, channel_scale = weight.tensors["data"], weight.tensors["channel_scale"]
    out = torch.empty(weight.shape, dtype=dtype, device=data.device)
    _unpack[(triton.cdiv(width, BLOCK_I), triton.cdiv(num_outputs, BLOCK_O), num_experts)](
        data, weight.tensors.get("group_scale"), channel_scale, out, num_outputs, width,
        data.stride(0) if num_experts > 1 else 0,
        BITS=int(weight.format.removeprefix("int")), BLOCK_O=BLOCK_O, BLOCK_I=BLOCK_I,
    )  # fmt: skip
    return out


@triton.jit
def _unpack(
    data, group_scale, channel_scale, out, num_outputs, width, expert_stride,
    BITS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    block, expert = tl.program_id(0), tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    inside = row < num_outputs
    scale = tl.load(channel_scale + expert * num_outputs + row, inside, 0.0)[:, None]
    data += expert * expert_stride
    out += (expert * num_outputs + row.to(tl.int64)[:, None]) * width
    first = block * BLOCK_I
    if BITS == 8:
        at = first + tl.arange(0, BLOCK_I)[None, :]
        there = inside[:, None] & (at < width)
        values = tl.load(data + row.to(tl.int64)[:, None] * width + at, there, 0)
        tl.store(out + at, values.to(tl.float32) * scale, there)
    else:
        HALF: tl.constexpr = BLOCK_I // 2
        byte = tl.arange(0, HALF)[None, :]
        place = tl.cast(block, tl.int64) * num_outputs + row
        both = tl.load(data + place[:, None] * HALF + byte, inside[:, None], 0)
        groups = group_scale + (expert * tl.num_programs(0) + block) * 2 * num_outputs + row
        at = first + byte
        group = tl.load(groups, inside, 0).to(tl.float32)[:, None]
        low = ((both & 15).to(tl.int8) - 8).to(tl.float32) * group * scale
        tl.store(out + at, low, inside[:, None] & (at < width))
        at += HALF
        group = tl.load(groups + num_outputs, inside, 0).to(tl.float32)[:, None]
        high = ((both >> 4).to(tl.int8) - 8).to(tl.float32) * group * scale
        tl.store(out + at, high, inside[:, None] & (at < width))
