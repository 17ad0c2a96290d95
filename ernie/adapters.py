"""LoRA adapters as serving uses them: their arithmetic in a fused block, and which rows get it.

    y = x W' + (x A') B'          A (R, I), B (O, R), the adapter's scale in B

A fused block makes several products in one, and so does an adapter: the A of the parts lie one
under the other, and their B stand on the diagonal, each at its own output columns.

    A = [A_q]        B = [B_q        ]       rows of B are cut for a rank like the rows of the
        [A_k]            [   B_k     ]       fused weight, columns of A like its columns
        [A_v]            [       B_v ]

Several adapters work in one flat batch, each on its own rows; the rows of nobody keep the bits
that they have in a batch without adapters, where a row's products do not depend on its neighbours.
Files are read by `ernie.adapter_files`.

Legend: T tokens of the flat batch, N rows of one adapter, I/O in/out width, R rank (of all parts
together), E experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ernie import kernels
from ernie.config import ErnieConfig
from ernie.kernels import Norm

_serials = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Pair:
    """The change of one product; of stacked experts with a leading E."""

    a_RI: Tensor
    b_OR: Tensor  # times the scale

    def to(self, device: torch.device) -> Pair:
        return Pair(self.a_RI.to(device), self.b_OR.to(device))

    def __call__(self, x_NI: Tensor) -> Tensor:
        return kernels.linear(kernels.linear(x_NI, self.a_RI), self.b_OR)

    def of_experts(self, x_NI: Tensor, counts_E: Tensor) -> Tensor:
        """Rows sorted by expert, `counts[e]` of them for expert e."""
        low_NR = kernels.grouped_linear(x_NI, self.a_RI, counts_E)
        return kernels.grouped_linear(low_NR, self.b_OR, counts_E)


# The pairs of one layer by product: qkv, out, gate_up, down (of a dense feed-forward block or of
# the shared experts), experts.gate_up, experts.down, and as vision_experts those of the other bank.
LayerPairs = dict[str, Pair]


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """One adapter in memory. Two loads of the same files are two adapters."""

    layers: tuple[LayerPairs, ...]
    rank: int  # the largest of its modules
    serial: int = field(default_factory=lambda: next(_serials))  # given once in a process

    @property
    def num_bytes(self) -> int:
        pairs = [pair for layer in self.layers for pair in layer.values()]
        return sum(pair.a_RI.nbytes + pair.b_OR.nbytes for pair in pairs)

    def to(self, device: torch.device) -> Adapter:
        """The same on another device, under the same serial."""
        layers = [{name: pair.to(device) for name, pair in layer.items()} for layer in self.layers]
        return replace(self, layers=tuple(layers))

    def sliced(self, rank: int, size: int, config: ErnieConfig) -> Adapter:
        """What one of `size` ranks holds beside its slice of a model of `config`, under the same
        serial.
        """
        layers = [
            {product: _sliced(product, pair, rank, size, config) for product, pair in pairs.items()}
            for pairs in self.layers
        ]
        return replace(self, layers=tuple(layers))


def _sliced(product: str, pair: Pair, rank: int, size: int, config: ErnieConfig) -> Pair:
    if product.endswith(("out", "down")):  # products that the ranks sum
        return Pair(pair.a_RI.chunk(size, -1)[rank].contiguous(), pair.b_OR)
    sizes = [pair.b_OR.shape[-2] // 2] * 2
    if product == "qkv":
        keys = config.num_key_value_heads * config.head_dim
        sizes = [config.num_attention_heads * config.head_dim, keys, keys]
    parts = [part.chunk(size, -2)[rank] for part in pair.b_OR.split(sizes, -2)]
    return Pair(pair.a_RI, torch.cat(parts, -2))


class Changes:
    """What the adapters of a batch change in one layer: each its own rows `(N,)` of the batch."""

    def __init__(self, parts: Sequence[tuple[Tensor, LayerPairs]]) -> None:
        self.parts = parts

    def touch(self, *products: str) -> bool:
        return any(name in pairs for _, pairs in self.parts for name in products)

    def apart(self, place_T: Tensor, num_first: int) -> tuple[Changes, Changes]:
        """Those of the first rows and those of the others, once row t has gone to `place_T[t]`."""
        first, others = [], []
        for rows_N, pairs in self.parts:
            places_N = place_T[rows_N]
            is_first_N = places_N < num_first
            first.append((places_N[is_first_N], pairs))
            others.append((places_N[~is_first_N] - num_first, pairs))
        halves = [Changes([part for part in parts if len(part[0])]) for parts in (first, others)]
        return halves[0], halves[1]

    def add(self, product: str, out_TO: Tensor, x_TI: Tensor, norm: Norm | None = None) -> None:
        """Add what the adapters make of `x` (normed, if `norm` is given) to `out`, in place."""
        for rows_N, pairs in self.parts:
            pair = pairs.get(product)
            if pair is not None:
                x_NI = x_TI[rows_N]
                x_NI = x_NI if norm is None else kernels.rms_norm(x_NI, *norm)
                out_TO.index_add_(0, rows_N, pair(x_NI))


UNCHANGED = Changes(())


@dataclass(frozen=True, slots=True)
class ActiveAdapters:
    """The adapters of one flat batch with the rows of each, int64 `(N,)`; no row is in two."""

    groups: tuple[tuple[Adapter, Tensor], ...]

    def to(self, device: torch.device) -> ActiveAdapters:
        return ActiveAdapters(
            tuple((adapter, rows_N.to(device)) for adapter, rows_N in self.groups)
        )

    def at(self, layer: int) -> Changes:
        return Changes([(rows_N, adapter.layers[layer]) for adapter, rows_N in self.groups])
