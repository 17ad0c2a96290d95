"""What this machine is, and what it can do at most, measured on the spot: for benchmark records."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ernie.kernels.cpu import build

HERE = Path(__file__).parent


@dataclass
class Ceilings:
    read: float  # bytes a second
    update: float  # bytes a second, two thirds of them read and one third written
    rate: float  # float32 operations a second

    def ideal_s(self, num_bytes: float, flop: float, writes: bool) -> float:
        """The least time for work of this size; `writes` where much of the bytes is written."""
        return max(num_bytes / (self.update if writes else self.read), flop / self.rate)


def ceilings() -> Ceilings:
    flags = [*build.FLAGS, *build.ISA_FLAGS[build.isa()], f"-I{build.SOURCES}"]
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        target = f"{folder}/ceilings.so"
        source = str(HERE / "ceilings.cpp")
        subprocess.run([str(build._compiler()), *flags, source, "-o", target], check=True)
        loaded = ctypes.CDLL(target)
    loaded.ernie_start(ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p))
    data = torch.ones(128 << 20)
    pointer, count = ctypes.c_void_p(data.data_ptr()), ctypes.c_long(data.numel())
    other = torch.ones(len(data) // 2)
    halves = (pointer, ctypes.c_void_p(other.data_ptr()), ctypes.c_long(other.numel()))
    update = min(seconds(lambda: loaded.update_all(*halves, threads)) for _ in range(9))
    read = min(seconds(lambda: loaded.read_all(pointer, count, threads)) for _ in range(9))
    rounds = 20_000_000
    fma = min(
        seconds(lambda: loaded.multiply_add(ctypes.c_long(rounds), threads)) for _ in range(5)
    )
    flop = rounds * 12 * 2 * loaded.lanes() * threads
    return Ceilings(data.numel() * 4 / read, other.numel() * 12 / update, flop / fma)


def machine() -> dict[str, str | int]:
    info = Path("/proc/cpuinfo").read_text()
    field = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", info, re.MULTILINE))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
    ).stdout.strip()
    return {
        "cpu": f"{field['model name']} (family {field['cpu family']}, model {field['model']})",
        "threads": torch.get_num_threads(),
        "isa": build.isa(),
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "compiler": build._compiler().name,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def others_cpu_s() -> float:
    """CPU seconds that the machine has spent since its start on anything but this process."""
    user, nice, system, _, _, irq, softirq, steal, *_ = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    )
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()
