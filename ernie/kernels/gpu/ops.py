"""What a GPU does better than plain torch: see `ernie.kernels` for shapes and meaning.

Kernels are written in Triton; dense bfloat16 products and attention without a cache are torch's
own. Nothing here waits for the device, so a decode step can be recorded in a CUDA graph; the
exceptions are of training, where torch lacks a kernel: the weight's gradient of `grouped_linear`,
and `attend_packed`. Sums have a fixed order, so the same inputs give the same bits, but for the
backward pass of torch's attention.

Modules are imported when an operation is first asked for, so that this one can say that Triton is
missing.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from importlib.metadata import version

HEEDS_BATCH_INVARIANT = True

MODULE_BY_OPERATION = {
    "rms_norm": "pointwise",
    "rotate": "pointwise",
    "rotate_": "pointwise",
    "swiglu": "pointwise",
    "swiglu_halves": "pointwise",
    "write_cache": "pointwise",
    "pack": "products",
    "project": "products",
    "mlp": "products",
    "moe": "experts",
    "grouped_linear": "experts",
    "fp8_linear": "fp8",
    "fp8_grouped_linear": "fp8",
    "quantize_fp8": "fp8",
    "sort_pairs": "pairs",
    "spread": "pairs",
    "combine": "pairs",
    "combine_backward": "pairs",
    "attend_packed": "attention",
    "attend_paged": "attention",
    "cross_entropy_": "loss",
    "draw": "sampling",
    "token_logprobs": "sampling",
    "float32_sum": "optimizer",
    "adamw_step": "optimizer",
    "adamw_8bit_step": "optimizer",
}


def available() -> str:
    """Empty when the kernels can be compiled here, else why not."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is missing; pip install 'ernie-open[gpu]'"
    return ""


def detail() -> str:
    """The compiler, for `ernie.kernels.report`."""
    return f"triton {version('triton')}"


def __getattr__(name: str) -> Callable:
    if name not in MODULE_BY_OPERATION:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"ernie.kernels.gpu.{MODULE_BY_OPERATION[name]}")
    return getattr(module, name)
