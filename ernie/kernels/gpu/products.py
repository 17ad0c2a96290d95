"""Products with packed weights on a GPU, by how many rows meet a weight.

    one                  `rows.py`: bound by memory, no tensor core
    up to MANY_ROWS      the kernel below, for plain, 8-bit and 4-bit weights, dense or of experts
    more                 torch's product (cuBLAS, CUTLASS), of integers after `unpack.py`

    out[row] = W[expert of row] @ x[row]     acc (outputs x rows) += W tile @ x tile, in float32

The weight is the left operand: it goes from memory through registers, where integers become
floats, straight into the tensor core, and a decode step of few rows wastes no wide tile on them.
Scales of channels are applied to the sums; the scale of a group of a 4-bit weight is applied to its
integers, in float32, and the result rounded to the activations' dtype. With few tiles of outputs
the columns are shared out among several programs, and added up in a fixed order.

Dense bfloat16 and float32 weights go to cuBLAS from two rows on.

A row's result is the same whatever the other rows are, as long as their number stays in the same
class (see above and `tile_rows`): tiles of other shapes add in another order. So with
`batch_invariant` there is one shape for all: tiles of FIXED_ROWS rows, columns never shared out,
the kernel below for every product, and no trials of which settings are fastest.

Legend: T rows, O outputs, I columns of a weight, E experts, M width of an MLP, D hidden size.

A 4-bit weight is packed in blocks of 64 columns, `(..., I / 64, O, 32)`: byte j of a row holds
column j in the low half and column 32 + j in the high half, so that each half is one group, a tile
of rows is one run of memory, and no bits change lanes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ernie.kernels import reference
from ernie.kernels.dispatch import is_batch_invariant
from ernie.kernels.gpu.language import INTERPRETED, converted, dot, overlapped, rows_of, wait
from ernie.kernels.gpu.pointwise import rms_norm, swiglu
from ernie.kernels.gpu.rows import row_products
from ernie.kernels.gpu.unpack import unpacked
from ernie.kernels.weights import GROUP_SIZE, PackedWeight, QuantTensor

PACKED_COLUMNS = 2 * GROUP_SIZE
ENOUGH_PROGRAMS = 264  # two for each multiprocessor of an H100
MANY_ROWS = 512  # that meet one weight: from here on integers are unpacked first
FIXED_ROWS = 64  # of every tile with `batch_invariant`
REDUCE_BLOCK = 1024

Norm = tuple[Tensor, float]


def pack(weight: Tensor | QuantTensor, *, parts: int = 1) -> PackedWeight:
    del parts  # the rows of both parts are found where they are used
    if isinstance(weight, Tensor):
        name, size = (
            str(weight.dtype).removeprefix("torch."),
            weight.numel() * weight.element_size(),
        )
        return PackedWeight(tuple(weight.shape), name, size, {"weight": weight.contiguous()})
    if weight.bits == 6:  # 8 bits with one scale a channel are what the kernels read
        weight = reference.quantize(weight.dequantized(), 8)
    tensors = {"data": weight.data.contiguous(), "channel_scale": weight.channel_scale.contiguous()}
    if weight.bits == 4:
        assert weight.group_scale is not None
        tensors["data"] = _in_blocks(weight)
        odd = weight.group_scale.shape[-1] % 2
        tensors["group_scale"] = F.pad(weight.group_scale, (0, odd)).mT.contiguous()
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    return PackedWeight(weight.shape, f"int{weight.bits}", size, tensors)


def _in_blocks(weight: QuantTensor) -> Tensor:
    """The nibbles in the order that the top of this file describes; padding stands for 0."""
    nibbles = torch.stack((weight.data & 15, weight.data >> 4), -1).flatten(-2)
    nibbles = nibbles[..., : weight.in_size]
    nibbles = F.pad(nibbles, (0, -weight.in_size % PACKED_COLUMNS), value=8)
    low, high = nibbles.unflatten(-1, (-1, 2, GROUP_SIZE)).unbind(-2)
    return (low | high << 4).transpose(-3, -2).contiguous()


def project(
    x_TI: Tensor,
    weight: PackedWeight,
    bias_O: Tensor | None = None,
    *,
    norm: Norm | None = None,
    residual_TO: Tensor | None = None,
) -> Tensor:
    y_TI = x_TI if norm is None else rms_norm(x_TI, *norm)
    if is_batch_invariant():
        return product(y_TI, weight, bias=bias_O, residual=residual_TO)
    if len(y_TI) == 1:
        return row_products(y_TI, weight, bias=bias_O, residual=residual_TO)
    if "weight" not in weight.tensors and len(y_TI) < MANY_ROWS:
        return product(y_TI, weight, bias=bias_O, residual=residual_TO)
    plain_OI = unpacked(weight, x_TI.dtype)
    if bias_O is None and residual_TO is not None:
        return torch.addmm(residual_TO, y_TI, plain_OI.T)
    out_TO = F.linear(y_TI, plain_OI, None if bias_O is None else bias_O.to(x_TI.dtype))
    return out_TO if residual_TO is None else residual_TO + out_TO


def mlp(
    x_TD: Tensor,
    gate_up: PackedWeight,
    down: PackedWeight,
    *,
    norm: Norm | None = None,
    residual_TD: Tensor | None = None,
) -> Tensor:
    y_TD = x_TD if norm is None else rms_norm(x_TD, *norm)
    if len(y_TD) == 1 and not is_batch_invariant():
        h_TM = row_products(y_TD, gate_up, gated=True)
    elif is_batch_invariant() or ("weight" not in gate_up.tensors and len(y_TD) < MANY_ROWS):
        h_TM = product(y_TD, gate_up, gated=True)
    else:
        h_TM = swiglu(*project(y_TD, gate_up).chunk(2, dim=-1))
    return project(h_TM, down, residual_TO=residual_TD)


def product(
    x_RI: Tensor,
    weight: PackedWeight,
    *,
    gated: bool = False,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    ends_E: Tensor | None = None,
    order: Tensor | None = None,
    copies: int = 1,
) -> Tensor:
    """`x @ weight.T (+ bias) (+ residual)`, or with `gated` the swiglu of its two halves; `(N, O)`.

    A weight of experts needs `ends_E`, int32 `(E,)`: rows `order[ends[e - 1]:ends[e]]` take expert
    e's; without `order` they stand in that order. Input row of row n is `n // copies`.
    """
    x = rows_of(x_RI)
    num_rows = len(x) * copies
    num_outputs = weight.shape[-2] // (2 if gated else 1)
    out = x.new_empty(num_rows, num_outputs)
    if not num_rows:
        return out
    num_experts = weight.shape[0] if len(weight.shape) == 3 else 1
    block_t = FIXED_ROWS if is_batch_invariant() else tile_rows(num_rows / num_experts)
    # Each expert begins a tile of its own: no more than this, and the rest stop at once.
    row_tiles = triton.cdiv(num_rows, block_t) + (num_experts if ends_E is not None else 0)
    num_splits = 1 if gated else _splits(num_outputs, row_tiles, weight.shape[-1], block_t)
    target, extras = out, (bias, None if residual is None else rows_of(residual))
    if num_splits > 1:
        target, extras = x.new_empty(num_splits, *out.shape, dtype=torch.float32), (None, None)
    _launch(
        x, weight, target, extras, (ends_E, order), copies, gated, block_t, row_tiles, num_splits
    )
    if num_splits > 1:
        _add_up(target, bias, residual, out)
    return out


def tile_rows(rows: float) -> int:
    """Rows of a tile, where a weight meets so many."""
    return next((size for size in (16, 32, 64) if rows <= size), 128)


def _splits(num_outputs: int, row_tiles: int, width: int, block_t: int) -> int:
    """Among how many programs the columns of a weight are shared out."""
    if block_t > 64 or is_batch_invariant():
        return 1
    wanted = ENOUGH_PROGRAMS // (triton.cdiv(num_outputs, 64) * row_tiles)
    return max(1, min(8, wanted, width // 512))


def _launch(
    x: Tensor, weight: PackedWeight, out: Tensor, extras: tuple, rows: tuple, copies: int,
    gated: bool, block_t: int, row_tiles: int, num_splits: int,
) -> None:  # fmt: skip
    num_outputs, width = weight.shape[-2] // (2 if gated else 1), weight.shape[-1]
    tensors, (bias, residual), (ends_E, order) = weight.tensors, extras, rows
    plain = tensors.get("weight")
    bits = 0 if plain is not None else int(weight.format.removeprefix("int"))
    data = tensors["data"] if plain is None else plain
    per_output, per_column = (0, 0) if bits == 4 else data.stride()[-2:]
    block_k = _columns(x, bits, block_t)
    num_experts = weight.shape[0] if len(weight.shape) == 3 else 1
    per_split = triton.cdiv(triton.cdiv(width, num_splits), block_k) * block_k

    def grid(config: dict[str, Any]) -> tuple[int, int, int]:
        outputs = config["BLOCK_O"] // (2 if gated else 1)
        return triton.cdiv(num_outputs, outputs), row_tiles, num_splits

    # With settings that were found by trials, another run could add in another order.
    kernel, settings = (_product.fn, FIXED.all_kwargs()) if is_batch_invariant() else (_product, {})
    kernel[grid](
        x, data, tensors.get("group_scale"), tensors.get("channel_scale"), bias, residual, out,
        ends_E, order,
        len(x) * copies, num_outputs, width, x.stride(0), data.stride(0) if num_experts > 1 else 0,
        per_output, per_column, 0 if residual is None else residual.stride(0), per_split,
        num_experts, EXPERTS=triton.next_power_of_2(num_experts), COPIES=copies, BITS=bits,
        GATED=gated, SPLIT=num_splits > 1, WHOLE=width % block_k == 0, FULL=num_outputs % 256 == 0,
        BLOCK_T=block_t, BLOCK_K=block_k, **settings,
    )  # fmt: skip


def _columns(x: Tensor, bits: int, block_t: int) -> int:
    """Columns of one step."""
    if bits == 4:
        return PACKED_COLUMNS
    if x.dtype == torch.float32:
        return 32
    return 128 if bits == 8 and block_t <= 32 else 64


def _add_up(parts: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
    num_rows, num_outputs = out.shape
    residual = None if residual is None else rows_of(residual)
    _reduce[(num_rows, triton.cdiv(num_outputs, REDUCE_BLOCK))](
        parts, bias, residual, out, num_outputs, 0 if residual is None else residual.stride(0),
        len(parts), parts.stride(0), REDUCE_BLOCK,
    )  # fmt: skip


def _config(outputs: int, num_warps: int, num_stages: int) -> triton.Config:
    return triton.Config({"BLOCK_O": outputs}, num_warps=num_warps, num_stages=num_stages)


FEW = [_config(64, 4, 5), _config(128, 4, 4)]  # up to 64 rows a tile
FIXED = FEW[0]
MANY = [_config(128, 8, 3), _config(128, 8, 4), _config(256, 8, 3)]


def _fitting(configs: list[triton.Config], arguments: dict, **rest: Any) -> list[triton.Config]:
    """The configs that are worth a trial for so many rows."""
    return FEW if {**arguments, **rest}["BLOCK_T"] <= 64 else MANY


@triton.jit
def _tile_of(ends, tile, num_rows, num_experts, EXPERTS: tl.constexpr, BLOCK_T: tl.constexpr):
    """Expert of a tile of sorted rows (num_experts for a tile too many), its first row, and the
    end of the expert's rows."""
    e = tl.arange(0, EXPERTS)
    real = e < num_experts
    end = tl.load(ends + e, real, num_rows)
    begin = tl.where(real, tl.load(ends + e - 1, real & (e > 0), 0), num_rows)
    tiles = (end - begin + BLOCK_T - 1) // BLOCK_T
    after = tl.cumsum(tiles, 0)
    expert = tl.sum(((after <= tile) & real).to(tl.int32), 0)
    mine = e == expert
    first = tl.sum(tl.where(mine, begin + (tile - after + tiles) * BLOCK_T, 0), 0)
    return expert, first, tl.sum(tl.where(mine, end, 0), 0)


@triton.autotune(
    FEW[:1] if INTERPRETED.value else FEW + MANY,
    key=["num_outputs", "width", "BITS", "GATED", "BLOCK_T"],
    prune_configs_by=None if INTERPRETED.value else {"early_config_prune": _fitting},
)
@triton.jit(do_not_specialize=["num_rows"])
def _product(
    x, weight, group_scale, channel_scale, bias, residual, out,
    ends, order,
    num_rows, num_outputs, width, x_stride, expert_stride, per_output, per_column,
    residual_stride, per_split, num_experts,
    EXPERTS: tl.constexpr, COPIES: tl.constexpr, BITS: tl.constexpr, GATED: tl.constexpr,
    SPLIT: tl.constexpr, WHOLE: tl.constexpr, FULL: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of outputs and rows; with SPLIT, the share of one part of the columns, unfinished.

    With GATED the upper half of the tile's outputs are of the gate, the lower half those of up.
    """
    tile = tl.program_id(1)
    expert, first, end = 0, tile * BLOCK_T, num_rows
    if ends is not None:
        expert, first, end = _tile_of(ends, tile, num_rows, num_experts, EXPERTS, BLOCK_T)
        if expert >= num_experts:
            return
    place = first + tl.arange(0, BLOCK_T)
    there = place < end
    row = tl.where(there, place, first)  # rows past the end repeat one, and are not stored
    if order is not None:
        row = tl.load(order + row)
    lane = tl.arange(0, BLOCK_O)
    OUTPUTS: tl.constexpr = BLOCK_O // 2 if GATED else BLOCK_O
    total_outputs = num_outputs * 2 if GATED else num_outputs
    column = tl.program_id(0) * OUTPUTS + (lane % OUTPUTS if GATED else lane)
    # Lanes past the last output repeat it. Without any, the compiler sees one run of memory.
    source = column if FULL else tl.minimum(column, num_outputs - 1)
    if GATED:
        source += lane // OUTPUTS * num_outputs
    acc = _sum(
        x + (row // COPIES).to(tl.int64) * x_stride, weight, group_scale,
        tl.cast(expert, tl.int64), source, total_outputs, width, expert_stride, per_output,
        per_column, tl.program_id(2) * per_split, per_split,
        BITS, WHOLE, BLOCK_O, BLOCK_T, BLOCK_K,
    )  # fmt: skip
    if BITS != 0:
        acc *= tl.load(channel_scale + expert * total_outputs + source)[:, None]
    row = row.to(tl.int64)
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(acc, [2, OUTPUTS, BLOCK_T]), (1, 2, 0)))
        acc = gate * tl.sigmoid(gate) * up
        column = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = (column < num_outputs)[:, None] & there[None, :]
    if bias is not None:
        acc += tl.load(bias + column, column < num_outputs, 0.0).to(tl.float32)[:, None]
    if residual is not None:
        beside = row[None, :] * residual_stride + column[:, None]
        acc += tl.load(residual + beside, inside, 0.0).to(tl.float32)
    if SPLIT:
        row += tl.program_id(2).to(tl.int64) * num_rows
    tl.store(out + row[None, :] * num_outputs + column[:, None], acc, inside)


@triton.jit
def _sum(
    x_rows, weight, group_scale, expert, source, total_outputs, width, expert_stride,
    per_output, per_column, begin, per_split,
    BITS: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Columns begin .. begin + per_split - 1 of the rows `source` of one expert's weight, times x:
    float32 (BLOCK_O, BLOCK_T), before the scales of channels."""
    acc = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    end = tl.minimum(begin + per_split, width)
    source = source.to(tl.int64)
    dtype: tl.constexpr = x_rows.dtype.element_ty
    if BITS == 4:
        byte = tl.arange(0, BLOCK_K // 2)
        data = weight + expert * expert_stride + source[:, None] * (BLOCK_K // 2) + byte[None, :]
        scales = group_scale + expert * (tl.cdiv(width, BLOCK_K) * 2 * total_outputs) + source
        for k in range(begin, end, BLOCK_K):
            both = tl.load(data + tl.cast(k // BLOCK_K, tl.int64) * total_outputs * (BLOCK_K // 2))
            scale = scales + tl.cast(k // BLOCK_K, tl.int64) * 2 * total_outputs
            low = _scaled((both & 15).to(tl.int8) - 8, tl.load(scale), dtype)
            high = _scaled((both >> 4).to(tl.int8) - 8, tl.load(scale + total_outputs), dtype)
            at = k + byte
            acc = dot(low, _columns_of(x_rows, at, width, WHOLE), acc)
            acc = dot(high, _columns_of(x_rows, at + BLOCK_K // 2, width, WHOLE), acc)
    else:
        data = weight + expert * expert_stride + source[:, None] * per_output
        for k in range(begin, end, BLOCK_K):
            at = k + tl.arange(0, BLOCK_K)
            if WHOLE:
                values = tl.load(data + at[None, :] * per_column)
            else:
                values = tl.load(data + at[None, :] * per_column, at[None, :] < width, 0.0)
            acc = dot(converted(values, dtype), _columns_of(x_rows, at, width, WHOLE), acc)
    return acc


@triton.jit
def _scaled(integers, scale_O, dtype: tl.constexpr):
    return (integers.to(tl.float32) * scale_O.to(tl.float32)[:, None]).to(dtype)


@triton.jit
def _columns_of(x_rows, at, width, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(x_rows[None, :] + at[:, None])
    return tl.load(x_rows[None, :] + at[:, None], at[:, None] < width, 0.0)


@overlapped
@triton.jit
def _reduce(
    parts, bias, residual, out, num_outputs, residual_stride, num_parts, part_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    wait()
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_outputs
    acc = tl.zeros([BLOCK], tl.float32)
    for part in range(num_parts):
        acc += tl.load(parts + part * part_stride + row * num_outputs + at, inside, 0.0)
    if bias is not None:
        acc += tl.load(bias + at, inside, 0.0).to(tl.float32)
    if residual is not None:
        acc += tl.load(residual + row * residual_stride + at, inside, 0.0).to(tl.float32)
    tl.store(out + row * num_outputs + at, acc, inside)
