"""Activations that are computed again in the backward pass.

`torch.utils.checkpoint` does the same, but imports the compiler to do it, 140 MiB and a second of
every process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class _Enough(Exception):
    """All that was asked for is there; the rest of the function need not run."""


class _Rerun:
    """What a function has saved so far of the tensors that are wanted of it."""

    def __init__(self, num_wanted: int, made: dict[int, Tensor]) -> None:
        self.num_wanted, self.made = num_wanted, made

    def take(self, saved: Tensor) -> Tensor:
        # The tensor itself would keep alive what it comes from.
        self.made[len(self.made)] = kept = saved.detach()
        if len(self.made) == self.num_wanted:
            raise _Enough
        return kept


class _Current(threading.local):
    rerun: _Rerun | None = None  # which takes what is saved at present
    is_recorded: bool = False  # whether autograd saves what the running `Function` keeps


_current = _Current()


class Function(torch.autograd.Function):
    """torch's, whose forward pass is told by `keep` when it may end."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        before, _current.is_recorded = _current.is_recorded, torch.is_grad_enabled()
        try:
            return super().apply(*args)
        finally:
            _current.is_recorded = before


@contextmanager
def saved_by(
    pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor], rerun: _Rerun | None = None
) -> Iterator[None]:
    """torch's `saved_tensors_hooks`, of which `keep` knows."""
    before, _current.rerun = _current.rerun, rerun
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _current.rerun = before


def keep(ctx: Any, *tensors: Tensor | None) -> None:
    """`ctx.save_for_backward(*tensors)`, for the forward pass of a `Function`; in a second run it
    ends here if these are the last tensors that are wanted. torch itself saves them when the
    forward pass is over.
    """
    ctx.save_for_backward(*tensors)
    rerun, saved = _current.rerun, [tensor for tensor in tensors if tensor is not None]
    if rerun is None or not _current.is_recorded or not any(ctx.needs_input_grad):
        return
    if len(rerun.made) + len(saved) == rerun.num_wanted:
        for tensor in saved:
            rerun.take(tensor)


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
            made.clear()
            _run_again(function, args, _Rerun(num_kept, made))
        return made.pop(number)

    with saved_by(pack, unpack):
        return function(*args)


def _run_again(function: Callable[..., object], args: tuple[object, ...], rerun: _Rerun) -> None:
    own = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args]
    try:
        with torch.enable_grad(), saved_by(rerun.take, lambda saved: saved, rerun):
            function(*own)
    except _Enough:
        return
    raise AssertionError(f"{function} kept {rerun.num_wanted} tensors, then {len(rerun.made)}")
