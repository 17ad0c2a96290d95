"""Triton's interpreter accepts what its compiler does not: every kernel is compiled for an H100."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_MEMORY = 227 * 1024  # bytes that a block may have on an H100
KERNELS = {
    "_norm_forward", "_norm_backward", "_swiglu_forward", "_swiglu_backward", "_rotate",
    "_write_cache", "_pieces", "_combine", "_tiles", "_product", "_reduce", "_row", "_unpack",
    "_choose_kernel", "_count", "_place", "_combine_kernel", "_adamw", "_adamw_8bit",
    "_float32_sum", "_quantize",
    "_spread", "_gathered_sum", "_gathered_sum_backward", "_cross_entropy",
    "_tops", "_bins", "_cut", "_weigh", "_draw", "_token_logprobs",
}  # fmt: skip


def test_every_kernel_compiles_for_an_h100_and_fits_into_it(tmp_path):
    pytest.importorskip("triton", reason="there are no wheels of it for this platform")
    script = Path(__file__).with_name("compile_gpu_kernels.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _, _ in lines} == KERNELS
    for name, stack, shared in lines:
        assert int(stack) <= 256, f"{name}: {stack} bytes of registers spill"
        assert int(shared) <= SHARED_MEMORY, f"{name}: {shared} bytes of shared memory"
