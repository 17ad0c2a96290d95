"""Weights that are not plain tensors: quantised ones, and ones in the order a device reads them.

Legend: O, I output and input width of a product, E experts (leading, optional), g groups of
`GROUP_SIZE` columns.

    int8    w[o, i] = data[o, i] * channel_scale[o]
    int4    w[o, i] = (nibble[o, i] - 8) * group_scale[o, i // 32] * channel_scale[o]

Two nibbles share a byte, the even column in the low half. The scale of a group is an integer of 8
bits (it may be negative), which costs a quarter of a bit for each weight and lets a kernel stay
in integers for a whole group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

GROUP_SIZE = 32  # columns that share a group scale of an int4 weight
ROUNDED_GROUP = 32  # columns of an activation row that share a scale where it is rounded to 8 bits


@dataclass(frozen=True, slots=True)
class QuantTensor:
    """A weight of 8 or 4 bits, in the order in which files keep it."""

    bits: int
    data: Tensor  # int8 (..., O, I), or uint8 (..., O, ceil(I / 2))
    channel_scale: Tensor  # float32 (..., O)
    group_scale: Tensor | None  # int8 (..., O, ceil(I / 32)) with 4 bits, None with 8
    in_size: int  # I

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
            if self.bits == 4 and size % GROUP_SIZE:
                raise ValueError(
                    f"{self.in_size} columns of a 4-bit weight give {count} slices of {size}; a "
                    f"slice must be a multiple of {GROUP_SIZE}"
                )
        parts = zip(datas, scales, groups)
        return [QuantTensor(self.bits, data, c, g, size) for data, c, g in parts]

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
        )

    def integers(self) -> Tensor:
        """The integers that are multiplied with the scales, int8 `(..., O, I)`."""
        if self.bits == 8:
            return self.data
        nibbles = torch.stack((self.data & 15, self.data >> 4), -1).flatten(-2)
        return nibbles[..., : self.in_size].to(torch.int8) - 8

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the integers stand for, `(..., O, I)`."""
        values = self.integers().float()
        if self.group_scale is not None:
            scales = self.group_scale.float().repeat_interleave(GROUP_SIZE, -1)
            values = values * scales[..., : self.in_size]
        return (values * self.channel_scale[..., None]).to(dtype)


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight as the products of one device read it: made by `kernels.pack`, opaque to others."""

    shape: tuple[int, ...]  # (O, I) or (E, O, I), without padding
    format: str  # float32, bfloat16, int8 or int4
    num_bytes: int  # what one product reads
    tensors: dict[str, Tensor] = field(repr=False)  # own the memory
    handle: Any = field(default=None, repr=False)  # of the back end
