"""Activations that are computed again in the backward pass.

`torch.utils.checkpoint` does the same, but imports the compiler to do it, 140 MiB and a second of
every process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class _Enough(Exception):
    """All that was asked for is there; the rest of the function need not run."""


def recomputed(function: Callable[..., T], *args: object) -> T:
    """`function(*args)`, which keeps only its arguments for the backward pass.

    The tensors that autograd saves are numbered; the first number that it asks for runs the
    function again, which must therefore be deterministic (random numbers come from a seed of its
    own). A tensor made again is given up as it is used.
    """
    num_kept = 0
    made: dict[int, Tensor] = {}

    def pack(saved: Tensor) -> tuple[object, ...]:
        nonlocal num_kept
        num_kept += 1
        return num_kept - 1, *args  # what is kept, for whoever counts it

    def unpack(packed: tuple[object, ...]) -> Tensor:
        number = packed[0]
        assert isinstance(number, int)
        if number not in made:
            _run_again(function, args, num_kept, made)
        return made.pop(number)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return function(*args)


def _run_again(
    function: Callable[..., object],
    args: tuple[object, ...],
    num_kept: int,
    made: dict[int, Tensor],
) -> None:
    made.clear()

    def pack(saved: Tensor) -> Tensor:
        made[len(made)] = kept = saved.detach()  # itself would keep alive what it comes from
        if len(made) == num_kept:
            raise _Enough
        return kept

    own = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args]
    try:
        with (
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved),
        ):
            function(*own)
    except _Enough:
        return
    raise AssertionError(f"{function} kept {num_kept} tensors, then {len(made)}")
