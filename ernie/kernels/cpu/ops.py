"""What the CPU does better than plain torch: see `ernie.kernels` for shapes and meaning.

Kernels take float32 activations; weights may be bfloat16. With bfloat16
activations, products, attention and rotation are computed in float32 and rounded at the end, the
rest is the reference's. The same inputs, instruction set and number of threads give the same bits;
the docstrings say where a row's bits do not depend on its batch either.
"""

from __future__ import annotations

from ernie.kernels.cpu.attention import attend_packed, attend_paged, write_cache
from ernie.kernels.cpu.build import BuildError, isa, library
from ernie.kernels.cpu.fused import expert, mlp, moe, pack, project, quantize
from ernie.kernels.cpu.pointwise import (
    adamw_8bit_step,
    adamw_step,
    quick_gelu,
    rms_norm,
    rotate,
    rotate_,
    squares,
    swiglu,
    swiglu_halves,
)
from ernie.kernels.cpu.products import add_product_, grouped_linear, linear, rows_gradient
from ernie.kernels.cpu.sampling import argmax, draw

HEEDS_BATCH_INVARIANT = True

__all__ = [
    "HEEDS_BATCH_INVARIANT",
    "adamw_8bit_step",
    "adamw_step",
    "add_product_",
    "argmax",
    "attend_packed",
    "attend_paged",
    "available",
    "detail",
    "draw",
    "expert",
    "grouped_linear",
    "linear",
    "mlp",
    "moe",
    "pack",
    "project",
    "quantize",
    "quick_gelu",
    "rms_norm",
    "rotate",
    "rotate_",
    "rows_gradient",
    "squares",
    "swiglu",
    "swiglu_halves",
    "write_cache",
]


def available() -> str:
    """Empty when the library is there (it is built here, at the first call), else why not."""
    try:
        library()
    except BuildError as error:
        return str(error)
    return ""


def detail() -> str:
    """The instruction set, for `ernie.kernels.report`."""
    return isa()
