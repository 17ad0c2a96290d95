"""What several kernels share on Triton's side: a product and a conversion that also hold in its
interpreter.

The interpreter (`TRITON_INTERPRET=1`, how the tests run where there is no GPU) keeps bfloat16 as
bits and would multiply these, so there values are widened first; on a GPU they are not.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


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
