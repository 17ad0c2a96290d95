"""Memory of the process: what it used at most, and an allocator that gives back what it frees."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys

import torch

_M_MMAP_THRESHOLD = -3  # of <malloc.h>
_MAPPED_BYTES = 4 << 20


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


def map_large_tensors() -> None:
    """Have glibc give every tensor of 4 MiB and more pages of its own; elsewhere do nothing.

    By itself glibc moves that border up to 32 MiB, and then activations of 8 and 12 MiB leave holes
    between those that are kept: a forward pass of the 0.3B shape over 1024 tokens grows by 36 MiB a
    layer where 4 MiB are kept.
    """
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in every C library
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
