"""Memory of the process: what it used at most, and an allocator that gives back what it frees."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import resource
import sys
from collections.abc import Callable

import torch

from ernie.kernels.cpu import memory as keeper
from ernie.kernels.cpu.build import BuildError

log = logging.getLogger("erniekit")

_M_MMAP_THRESHOLD = -3  # of <malloc.h>
_MAPPED_BYTES = 256 << 10


def peak_gib(device: torch.device) -> float:
    """Most memory used so far: of the device on a GPU, resident of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return _resident_peak_kib() / 2**20


def _resident_peak_kib() -> float:
    """Linux's own count where there is one: what getrusage tells began with the parent's peak."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**10 if sys.platform == "darwin" else 1)


def keep_large_tensors(device: torch.device) -> None:
    """Have large tensors of a CPU not lie in the way of one another, and their pages used again;
    see `ernie.kernels.cpu.memory`.

    Elsewhere, or without a compiler, glibc gives every tensor of 256 KiB and more pages of its own.
    By itself it moves that border up to 32 MiB: activations below it are cut out of one heap, where
    those that are freed leave holes between those that are kept, and the next step's, a few tokens
    longer, do not fit into them.
    """
    if device.type == "cpu":
        try:
            keeper.keep()
            return
        except BuildError as error:
            log.warning("steps will be slower: %s", error)
    if (mallopt := _from_glibc("mallopt")) is not None:
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)


def give_back() -> None:
    """Return to the system what was freed in the heap, wherever it lies; elsewhere do nothing."""
    gc.collect()
    if (trim := _from_glibc("malloc_trim")) is not None:
        trim(0)


def _from_glibc(name: str) -> Callable[..., int] | None:
    """A function of glibc, where that is the C library."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
