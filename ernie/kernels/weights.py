"""Weights that are not plain tensors: quantised ones, and ones in the order a device reads them.

Legend: O, I output and input width of a product, E experts (leading, optional), g groups of
`GROUP_SIZE` columns.

    int8    w[o, i] = data[o, i] * channel_scale[o]
    int6    w[o, i] = data[o, i] * group_scale[o, i // 32] * channel_scale[o]
    int4    w[o, i] = (nibble[o, i] - 8) * group_scale[o, i // 32] * channel_scale[o]
    nf4     w[o, i] = NF4_LEVELS[nibble[o, i]] * group_scale[o, i // 64] * channel_scale[o]

Two nibbles share a byte, the even column in the low half; integers of 6 bits have a byte each but
in a CPU's packed form. The scale of a group of int4 and int6 is an
integer of 8 bits (it may be negative), which costs a quarter of a bit for each weight and lets a
kernel stay in integers for a whole group. That of nf4 is float32 beside channel scales of one, or,
with double quantisation, 8 bits times the channel's scale. nf4 is for frozen weights in training;
no fused operation packs it.

Products in FP8 round both factors anew each time, with a scale for each row: `FP8Tensor`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

BITS = (8, 6, 4)
GROUP_SIZE = 32  # columns that share a group scale of an int4 weight
NF4_GROUP = 64
# Quantiles of a normal distribution, scaled to [-1, 1]. Source: Dettmers et al., arXiv:2305.14314,
# appendix E.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
FP8_MAX = 448.0  # of float8_e4m3fn
FP8_LEAST = 1e-30  # what the largest magnitude of a row counts as at least
ROUNDED_GROUP = 32  # columns of an activation row that share a scale where it is rounded to 8 bits


@dataclass(frozen=True, slots=True)
class QuantTensor:
    """A weight of 8, 6 or 4 bits, in the order in which files keep it."""

    bits: int
    data: Tensor  # int8 (..., O, I), with 4 bits uint8 (..., O, ceil(I / 2))
    channel_scale: Tensor  # float32 (..., O)
    group_scale: Tensor | None  # (..., O, groups), None with 8 bits: int8; nf4: see above
    in_size: int  # I
    is_normal: bool = False  # nf4

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.channel_scale.shape, self.in_size)

    @property
    def num_bytes(self) -> int:
        tensors = (self.data, self.channel_scale, self.group_scale)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def group_size(self) -> int:
        return NF4_GROUP if self.is_normal else GROUP_SIZE

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int | slice) -> QuantTensor:
        """Rows of a matrix (a slice), or experts of a stack; shares the memory."""
        group = None if self.group_scale is None else self.group_scale[index]
        return QuantTensor(
            self.bits, self.data[index], self.channel_scale[index], group, self.in_size,
            self.is_normal,
        )  # fmt: skip

    def chunk(self, count: int, dim: int) -> list[QuantTensor]:
        """`count` equal slices along dimension -2 (O) or -1 (I, at whole groups)."""
        assert dim in (-1, -2) and self.shape[dim] % count == 0, f"{self.shape} by {count}"
        none: list[Tensor | None] = [None] * count
        datas, groups = self.data.chunk(count, dim), none
        if self.group_scale is not None:
            groups = list(self.group_scale.chunk(count, dim))
        if dim == -2:
            scales, size = self.channel_scale.chunk(count, -1), self.in_size
        else:
            scales, size = (self.channel_scale,) * count, self.in_size // count
            if self.group_scale is not None and size % self.group_size:
                raise ValueError(
                    f"{self.in_size} columns of a {self.bits}-bit weight give {count} slices of "
                    f"{size}; a slice must be a multiple of {self.group_size}"
                )
        parts = zip(datas, scales, groups)
        return [QuantTensor(self.bits, data, c, g, size, self.is_normal) for data, c, g in parts]

    @classmethod
    def cat(cls, weights: Sequence[QuantTensor]) -> QuantTensor:
        """Weights stacked along dimension -2 (O)."""
        first = weights[0]
        assert all(w.bits == first.bits and w.in_size == first.in_size for w in weights)
        groups = [w.group_scale for w in weights if w.group_scale is not None]
        return cls(
            first.bits,
            torch.cat([w.data for w in weights], -2),
            torch.cat([w.channel_scale for w in weights], -1),
            torch.cat(groups, -2) if groups else None,
            first.in_size,
            first.is_normal,
        )

    def integers(self) -> Tensor:
        """The integers that are multiplied with the scales, int8 `(..., O, I)`."""
        return self._nibbles().to(torch.int8) - 8 if self.bits == 4 else self.data

    def _nibbles(self) -> Tensor:
        both = torch.stack((self.data & 15, self.data >> 4), -1).flatten(-2)
        return both[..., : self.in_size]

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the integers stand for, `(..., O, I)`."""
        if self.is_normal:
            levels = torch.tensor(NF4_LEVELS, device=self.device)
            values = levels[self._nibbles().int()]
        else:
            values = self.integers().float()
        if self.group_scale is not None:
            scales = self.group_scale.float().repeat_interleave(self.group_size, -1)
            values = values * scales[..., : self.in_size]
        return (values * self.channel_scale[..., None]).to(dtype)


class FP8Tensor(NamedTuple):
    """Values in 8-bit floats (e4m3: 4 bits of exponent, 3 of mantissa), each row with a scale."""

    data: Tensor  # float8_e4m3fn (..., R, C), contiguous
    scale: Tensor  # float32 (..., R)

    def dequantized(self) -> Tensor:
        """What they stand for, float32."""
        return self.data.float() * self.scale[..., None]


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight as the products of one device read it: made by `kernels.pack`, opaque to others."""

    shape: tuple[int, ...]  # (O, I) or (E, O, I), without padding
    format: str  # float32, bfloat16, int8, int6 or int4
    num_bytes: int  # what one product reads
    tensors: dict[str, Tensor] = field(repr=False)  # own the memory
    handle: Any = field(default=None, repr=False)  # of the back end


def quantized_bytes(shape: Sequence[int], form: str) -> int:
    """Bytes of a weight `(..., O, I)` as `int8`, `int4`, `nf4` or `nf4_double`."""
    *outer, width = shape
    rows = math.prod(outer)
    group_bytes = {
        "int8": 0,
        "int4": -(-width // GROUP_SIZE),
        "nf4": 4 * -(-width // NF4_GROUP),
        "nf4_double": -(-width // NF4_GROUP),
    }[form]
    return rows * ((width if form == "int8" else -(-width // 2)) + 4 + group_bytes)
