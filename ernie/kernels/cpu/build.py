"""The compiled library: found or built at the first use, loaded with ctypes, started on torch's
threads.

The sources are plain C++17 behind a C interface, so a build needs a compiler and nothing else:
neither torch's headers nor Python's. The result is kept in the user's cache folder under a name
that hashes the sources, the compiler and the flags; one library holds one instruction set. What
cannot be built or loaded is a `BuildError` with one sentence.

`ERNIE_CPU_ISA=scalar|avx2|avx512|avx512vnni` asks for a lower instruction set than the processor's
best ("scalar" is the compiler's baseline: SSE2 or NEON).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
import threading
from functools import cache
from pathlib import Path
from typing import Any

import torch

SOURCES = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno")
# By instruction set, lowest first, and by the name that torch gives to the processor's best.
ISA_FLAGS = {
    "scalar": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": (
        AVX512 := ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c")
    ),
    "avx512vnni": (*AVX512, "-mavx512vnni"),
}
ISA_BY_CAPABILITY = {"AVX2": "avx2", "AVX512": "avx512"}

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum Dtype of vec.h
CACHE_DTYPES = {**DTYPES, torch.int8: 3}

# Arguments of each function of the C interface: p pointer, l long, i int, f float.
SIGNATURES = {
    "linear": "plpippl" + "pllll" + "i",
    "rows_gradient": "plpipp" + "lllli" + "i",
    "weight_gradient": "plplpp" + "llll" + "i",
    "rms_norm": "plpifppll" + "i",
    "rms_norm_backward": "pplpipppll" + "li",
    "rotate": "plppfi" + "pllll" + "i",
    "swiglu": "plplpll" + "i",
    "swiglu_backward": "pplplppll" + "i",
    "quick_gelu": "ppl" + "i",
    "quick_gelu_backward": "pppl" + "i",
    "sum_of_squares": "pilp" + "i",
    "argmax": "pllp" + "i",
    "write_cache": "p",
    "attend_packed": "plplplpllllfipp" + "i",
    "attend_packed_backward": "plplplppppllllfilpppp" + "i",
    "attend_paged": "p",
    "adamw": "ppippilp" + "i",
    "adamw_8bit": "ppippplp" + "i",
    "packed_bytes": "p",
    "quantize": "pillippp" + "i",
    "dequantize": "ppppilllp" + "i",
    "pack": "pppp" + "i",
    "pack_coded": "pplp" + "i",
    "project": "pllpp" + "pif" + "plp" + "i",
    "mlp": "pllpp" + "pif" + "plp" + "i",
    "moe": "pllpppppplf" + "pif" + "plp" + "i",
    "replay": "pl" + "i",
}
OPENMP = ("GOMP_parallel", "omp_get_num_threads")
C_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_long, "i": ctypes.c_int, "f": ctypes.c_float}


class BuildError(RuntimeError):
    """The library cannot be built or loaded here; the message is one sentence that says why."""


@cache
def isa() -> str:
    """The instruction set in use: what `ERNIE_CPU_ISA` asks for, else the processor's best."""
    best = ISA_BY_CAPABILITY.get(torch.backends.cpu.get_cpu_capability(), "scalar")
    if best == "avx512" and torch.cpu._is_vnni_supported():
        best = "avx512vnni"
    asked = os.environ.get("ERNIE_CPU_ISA", best)
    usable = list(ISA_FLAGS)[: list(ISA_FLAGS).index(best) + 1]
    if asked not in usable:
        raise BuildError(f"ERNIE_CPU_ISA={asked} cannot run here; use one of {', '.join(usable)}")
    return asked


class _Recorders(threading.local):
    """What this thread's calls go through; see `ernie.kernels.cpu.program`."""

    current: Any = None


recorders = _Recorders()


def library() -> Any:
    """The C interface: the library's, or that of whoever records this thread's calls.

    Raises `BuildError`.
    """
    return recorders.current or loaded_library()


@cache
def loaded_library() -> ctypes.CDLL:
    """The loaded library, built if need be. Raises `BuildError`."""
    runtime = ctypes.CDLL(
        None
    )  # symbols of the process: torch has loaded its OpenMP runtime globally
    for name in OPENMP:
        if not hasattr(runtime, name):
            raise BuildError(f"torch's OpenMP runtime does not export {name} on this platform")
    loaded = ctypes.CDLL(str(built(SOURCES, isa(), ISA_FLAGS[isa()])))
    for name, codes in SIGNATURES.items():
        function = getattr(loaded, f"ernie_{name}")
        function.argtypes = [C_TYPES[code] for code in codes]
        function.restype = None
    loaded.ernie_packed_bytes.restype = ctypes.c_long
    loaded.ernie_start.argtypes = [ctypes.c_void_p] * len(OPENMP)
    loaded.ernie_start.restype = None
    loaded.ernie_start(*(ctypes.cast(getattr(runtime, name), ctypes.c_void_p) for name in OPENMP))
    return loaded


def built(folder: Path, name: str, flags: tuple[str, ...], libraries: tuple[str, ...] = ()) -> Path:
    """The library of a folder's sources, made if need be. Raises `BuildError`."""
    compiler, flags = _compiler(), (*FLAGS, *flags)
    files = sorted([*folder.glob("*.cpp"), *folder.glob("*.h")])
    status = compiler.stat()
    identity = [str(compiler), str(status.st_size), str(status.st_mtime_ns), *flags, *libraries]
    digest = hashlib.sha256("\0".join(identity).encode())
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    target = _cache_folder() / f"{name}-{digest.hexdigest()[:20]}.so"
    if not target.exists():
        sources = [file for file in files if file.suffix == ".cpp"]
        _compile(compiler, flags, libraries, sources, target)
    return target


def _compiler() -> Path:
    asked = os.environ.get("CXX")
    for name in (asked,) if asked else COMPILERS:
        if found := shutil.which(name):
            return Path(found).resolve()
    if asked:
        raise BuildError(f"the C++ compiler named by CXX={asked} was not found")
    raise BuildError(f"no C++ compiler was found: install one of {', '.join(COMPILERS)} or set CXX")


def _cache_folder() -> Path:
    """The user's cache folder, or one of their own among the temporary files where home is
    read-only."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for folder in (home / "ernie/kernels", Path(tempfile.gettempdir()) / f"ernie-{os.getuid()}"):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        status = folder.stat()
        # A library from a folder that others may write to would be theirs to choose.
        private = status.st_uid == os.getuid() and not status.st_mode & (
            stat.S_IWGRP | stat.S_IWOTH
        )
        if private and os.access(folder, os.W_OK):
            return folder
    raise BuildError(f"neither {home} nor {tempfile.gettempdir()} can keep the compiled library")


def _compile(
    compiler: Path,
    flags: tuple[str, ...],
    libraries: tuple[str, ...],
    sources: list[Path],
    target: Path,
) -> None:
    """Build in a folder of our own and rename: several processes may do this at once."""
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        objects = [f"{work}/{source.stem}.o" for source in sources]
        only_object = [flag for flag in flags if flag != "-shared"]
        compilers = [
            _start([str(compiler), *only_object, "-c", str(source), "-o", made])
            for source, made in zip(sources, objects)
        ]
        for process in compilers:
            _finish(process, compiler)
        linked = [str(compiler), "-shared", *objects, *libraries, "-o", f"{work}/library.so"]
        _finish(_start(linked), compiler)
        os.replace(f"{work}/library.so", target)


def _start(command: list[str]) -> subprocess.Popen:
    try:
        return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
    except OSError as error:
        raise BuildError(f"the C++ compiler {command[0]} cannot be run: {error}") from error


def _finish(process: subprocess.Popen, compiler: Path) -> None:
    messages = process.communicate()[1]
    if process.returncode:
        errors = [line for line in messages.splitlines() if "error" in line]
        reason = errors[0][:300] if errors else f"exit status {process.returncode}"
        raise BuildError(f"the C++ compiler {compiler} failed: {reason}")
