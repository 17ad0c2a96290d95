"""Which implementation of an operation runs on which device, decided once, at the first call.

A back end is a module with some of the functions of `ernie.kernels.reference`; what it lacks is
taken from the reference. `ERNIE_KERNELS=reference` forces the reference everywhere (a debugging
aid: results agree within rounding). Where no back end of a device can run there is one warning, and
`report()` says why.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch

from ernie.kernels import reference

log = logging.getLogger("ernie.kernels")

OPERATIONS = (
    "linear",
    "grouped_linear",
    "fp8_linear",
    "fp8_grouped_linear",
    "quantize_fp8",
    "rows_gradient",
    "add_product_",
    "sort_pairs",
    "spread",
    "combine",
    "combine_backward",
    "rms_norm",
    "rotate",
    "rotate_",
    "swiglu",
    "swiglu_halves",
    "quick_gelu",
    "squares",
    "cross_entropy_",
    "argmax",
    "draw",
    "token_logprobs",
    "attend_packed",
    "attend_paged",
    "write_cache",
    "quantize",
    "quantize_nf4",
    "pack",
    "expert",
    "project",
    "mlp",
    "moe",
    "float32_sum",
    "adamw_step",
    "adamw_8bit_step",
)

# The modules that are asked for an operation, best first, by device type. Each offers `available()
# -> str`, the empty string when it can run here, else one sentence that says why not, `detail() ->
# str`, a word for the report, and maybe `HEEDS_BATCH_INVARIANT`, true if its products and its paged
# attention do what `batch_invariant` asks for.
BACKENDS = {
    "cpu": ("ernie.kernels.cpu.ops",),
    "cuda": ("ernie.kernels.gpu.flash", "ernie.kernels.gpu.ops"),
}


def pick(operation: str, device: torch.device) -> Callable:
    """The implementation of `operation` for tensors on `device`."""
    return _chosen(device.type)[operation]


def is_compiled(device: str) -> bool:
    """Whether anything better than plain torch runs on `device`."""
    return bool(_modules(device)[0])


def report(device: str = "cpu") -> dict[str, str]:
    """What implements each operation on `device`, and why not something better: for logs and bug
    reports."""
    modules, refused = _modules(device)
    reasons = "".join(f" ({why})" for why in refused)
    lines = {}
    for name, function in _chosen(device).items():
        owner = next((m for m in modules if hasattr(m, name)), None)
        lines[name] = function.__module__ + (reasons if owner is None else f" [{owner.detail()}]")
    return lines


_batch_invariant = False


def batch_invariant(on: bool, device: str = "cpu") -> None:
    """Switch for the whole process: whether a token's result may not depend, to the bit, on what
    else is computed with it.

    On, products and paged attention keep one order of sums whatever the batch is, which costs
    some speed: on a CPU where many rows come together, on a GPU in every step. Raises ValueError
    when the back end of `device` cannot do that.
    """
    global _batch_invariant
    modules, refused = _modules(device)
    if on and not any(getattr(module, "HEEDS_BATCH_INVARIANT", False) for module in modules):
        why = "" if modules else "".join(f": {reason}" for reason in refused)
        raise ValueError(
            f"batch invariance needs kernels that {device} does not have here{why}; leave it off"
        )
    _batch_invariant = on


def is_batch_invariant() -> bool:
    return _batch_invariant


_has_bfloat16_products = False


def bfloat16_products(on: bool) -> None:
    """Switch for the whole process: whether differentiable `linear` on a CPU multiplies in
    bfloat16.

    On, rows and weights are rounded to bfloat16 first and the result after; sums are float32.
    Raises ValueError on a processor without instructions for it, where it would be many times
    slower.
    """
    global _has_bfloat16_products
    if on and not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        raise ValueError(
            "bfloat16 products need a processor with AVX512-BF16 or AMX, which this one lacks; "
            "use float32"
        )
    _has_bfloat16_products = on


def has_bfloat16_products() -> bool:
    return _has_bfloat16_products


@cache
def _chosen(device_type: str) -> dict[str, Callable]:
    modules = [*_modules(device_type)[0], reference]
    return {
        name: next(getattr(m, name) for m in modules if hasattr(m, name)) for name in OPERATIONS
    }


@cache
def _modules(device_type: str) -> tuple[list[ModuleType], list[str]]:
    """The back ends that can run here, and why each other one cannot."""
    if os.environ.get("ERNIE_KERNELS") == "reference":
        return [], ["ERNIE_KERNELS=reference"]
    usable, refused = [], []
    for name in BACKENDS.get(device_type, ()):
        module = importlib.import_module(name)
        if reason := module.available():
            refused.append(reason)
        else:
            usable.append(module)
    if refused and not usable:
        log.warning("plain torch runs in place of %s kernels: %s", device_type, "; ".join(refused))
    return usable, refused
