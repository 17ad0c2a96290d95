"""Which implementation of an operation runs on which device, decided once, at the first call.

A back end is a module with some of the functions of `ernie.kernels.reference`; what it lacks is taken
from the reference. `ERNIE_KERNELS=reference` forces the reference everywhere (a debugging aid: results
agree within rounding).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import cache

import torch

from ernie.kernels import reference

OPERATIONS = (
    "linear",
    "grouped_linear",
    "rms_norm",
    "rotate",
    "swiglu",
    "attend_packed",
    "attend_paged",
    "write_cache",
)

# The modules that are asked for an operation, best first, by device type. Each offers
# `available() -> str`, the empty string when it can run here, else one sentence that says why not.
BACKENDS = {
    "cpu": ("ernie.kernels.cpu.ops",),
    "cuda": (),
}


def pick(operation: str, device: torch.device) -> Callable:
    """The implementation of `operation` for tensors on `device`."""
    return _chosen(device.type)[operation]


def report(device: str = "cpu") -> dict[str, str]:
    """Name of the module that implements each operation on `device`, for logs and bug reports."""
    return {name: function.__module__ for name, function in _chosen(device).items()}


@cache
def _chosen(device_type: str) -> dict[str, Callable]:
    modules = [reference]
    if os.environ.get("ERNIE_KERNELS") != "reference":
        candidates = map(importlib.import_module, BACKENDS.get(device_type, ()))
        modules = [m for m in candidates if not m.available()] + modules
    return {
        name: next(getattr(m, name) for m in modules if hasattr(m, name)) for name in OPERATIONS
    }
