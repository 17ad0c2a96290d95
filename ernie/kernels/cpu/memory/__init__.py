"""Memory of CPU tensors for training: large blocks are kept when freed, and given out again.

    keep()  from now on, for the whole process
    told()  how it stands

Every tensor of 128 KiB and more has a mapping of its own, so that none lies in the way of another,
and its pages are zeroed by the system once and not in every step. What is kept and what is in use
stay together below the most that was in use at once. See `keeper.cpp`, which is built at the first
use, with the headers that torch brings along.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from ernie.kernels.cpu.build import BuildError, built

_TORCH = Path(torch.__file__).parent


class Kept(NamedTuple):
    """Bytes of large tensors: in use, kept for later, and the most that was in use."""

    used: int
    kept: int
    most_used: int


def keep() -> None:
    """Have torch take the memory of its CPU tensors here. Raises `BuildError`."""
    _library().ernie_keep_memory()


def told() -> Kept:
    """How it stands."""
    numbers = (ctypes.c_long * len(Kept._fields))()
    _library().ernie_memory(numbers)
    return Kept(*numbers)


@cache
def _library() -> ctypes.CDLL:
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    version = f"-DTORCH={torch.__version__}"  # another one needs another build
    flags = (f"-I{_TORCH}/include", abi, version)
    path = built(Path(__file__).parent, "memory", flags, (f"-L{_TORCH}/lib", "-lc10"))
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the library of tensors' memory cannot be loaded: {error}") from error
