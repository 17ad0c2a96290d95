"""What the benchmarks of GPUs share: the device, its ceilings measured on the spot, and a clock.

Calls are recorded in a CUDA graph and replayed, so that the time is the device's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

COPY_BYTES = 4 << 30
SQUARE = 8192
ROUNDS = 20
LEAST_CALLS = 20


def need_gpu() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA GPU, and torch finds none here")


def device() -> dict[str, Any]:
    """The GPU and its two ceilings."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "copied_gb_per_s": round(_copy_rate() / 1e9),
        "bfloat16_tflop_per_s": round(_product_rate() / 1e12),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def _copy_rate() -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.ones(COPY_BYTES // 2, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds([lambda: target.copy_(source)])


def _product_rate() -> float:
    """Bfloat16 operations a second of a large product."""
    square = torch.randn(SQUARE, SQUARE, device="cuda").bfloat16()
    return 2 * SQUARE**3 / seconds([lambda: square @ square])


@torch.inference_mode()
def seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Time of one call, the median over replays of all of them in turn. Give calls that read
    different memory, larger together than the cache, to time reads from memory."""
    calls = list(calls) * (1 + LEAST_CALLS // len(calls))  # starting a replay takes its time too
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compiles kernels and tries their settings out
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return median(times)
