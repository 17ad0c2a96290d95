"""What several kernels share on Triton's side: a product and a conversion that also hold in its
interpreter.

The interpreter (`TRITON_INTERPRET=1`, how the tests run where there is no GPU) keeps bfloat16 as
bits and would multiply these, so there values are widened first; on a GPU they are not.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
# Whether a kernel may be started while the one in front of it is still at work (Hopper and later).
OVERLAPS = tl.constexpr(
    not INTERPRETED.value
    and hasattr(tl.extra.cuda, "gdc_wait")
    and torch.cuda.is_available()
    and torch.cuda.get_device_capability() >= (9, 0)
)


class overlapped:
    """A kernel that is started before the one in front of it has ended; its first line is
    `wait()`. That hides what a start takes: a microsecond, and a decode step has hundreds. A large
    kernel needs none of this, and one that comes early stands in its way.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable:
        launch = self.kernel[grid]
        return partial(launch, launch_pdl=True) if OVERLAPS.value else launch


@triton.jit
def wait():
    """Until all that earlier kernels write is there; and the next kernel may be started."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def dot(a, b, acc):
    """`a @ b + acc`, float32; never in tf32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def converted(x, dtype: tl.constexpr):
    """x, of integers or floats, in another type of floats."""
    if INTERPRETED:
        x = x.to(tl.float32)
    return x.to(dtype)


def rows_of(x: Tensor) -> Tensor:
    """x with all dimensions but the first contiguous, as kernels take it: a copy only if it must
    be."""
    return x if x[:1].is_contiguous() or not len(x) else x.contiguous()
