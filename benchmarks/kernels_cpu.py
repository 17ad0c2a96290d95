"""Question: how fast are the CPU kernels at the shapes of ERNIE-4.5-0.3B, beside plain torch and
beside what the machine can do at most?

    python benchmarks/kernels_cpu.py [--record NAME --reading TEXT] [--only WORD]

Baseline: the fastest plain torch we know for the same result, in the same run, ours and theirs in
turn. Ceiling: the larger of bytes / bandwidth (a C loop over 512 MiB, reading, or updating where a
kernel writes much) and operations / multiply-add rate (a C loop in registers); "of ceiling" is that
ideal time over ours. Weights and caches are taken from pools larger than the last-level cache.
Times are medians.

For a machine with AVX2 only: ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2
ONEDNN_MAX_CPU_ISA=AVX2 holds torch back, and with it the instruction set of our kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass

import torch
from ceilings import HERE, Ceilings, ceilings, machine, others_cpu_s, seconds
from kernels_cpu_cases import CASES, Case
from kernels_cpu_fused_cases import FUSED_CASES

HELD_BACK = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")


@dataclass
class Row:
    name: str
    ratio: float
    of_ceiling: float
    ours_us: float
    peer_us: float
    gb_per_s: float
    gflop_per_s: float
    peer: str


def measure(case: Case, most: Ceilings) -> Row:
    """Ours and the peer's in turn, each sample long enough for the clock, for about a second."""
    repeats = []
    for call in (case.ours, case.peer):
        call()
        repeats.append(max(1, int(0.004 / max(seconds(call), 1e-7))))
    samples: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + 1.0
    while len(samples[0]) < 5 or (time.perf_counter() < end and len(samples[0]) < 60):
        for call, count, out in zip((case.ours, case.peer), repeats, samples):
            out.append(
                seconds(lambda call=call, count=count: [call() for _ in range(count)]) / count
            )
    ours, peer = map(statistics.median, samples)
    ideal = most.ideal_s(case.num_bytes, case.flop, case.writes)
    return Row(
        case.name,
        round(peer / ours, 2),
        round(ideal / ours, 3),
        round(ours * 1e6, 1),
        round(peer * 1e6, 1),
        round(case.num_bytes / ours / 1e9, 2),
        round(case.flop / ours / 1e9, 1),
        case.peer_name,
    )


def markdown(record: dict) -> str:
    host = record["machine"]
    lines = [
        "# CPU kernels beside plain torch",
        "",
        "Question: how fast are the CPU kernels at the shapes of ERNIE-4.5-0.3B, beside plain",
        "torch and beside what the machine can do at most?",
        "",
        f"- machine: {host['cpu']}, {host['threads']} threads; kernels for {host['isa']}",
        f"- torch {host['torch']} held to {host['torch_isa']}, Python {host['python']}, "
        f"{host['compiler']}",
        f"- {host['date']}, commit {host['commit']}: `{record['command']}`",
        f"- ceilings: {record['read_gb_per_s']} GB/s read, {record['update_gb_per_s']} GB/s for "
        f"y = x + 2 y, {record['fma_gflop_per_s']} GFLOP/s float32; torch's product of "
        f"2048 x 2048: {record['sgemm_gflop_per_s']} GFLOP/s",
        f"- processors in use by other programs meanwhile: {record['cpus_used_by_others']}",
        "",
        "Ratio: the time of plain torch over ours. Of ceiling: the ideal time (bytes / bandwidth",
        "or operations / multiply-add rate, whichever is longer) over ours; what stays in a cache",
        "may pass 100 %.",
        "",
        record["reading"],
        "",
        "| what | ratio | of ceiling | ours µs | torch µs | GB/s | GFLOP/s | plain torch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        lines.append(
            f"| {row['name']} | {row['ratio']} | {row['of_ceiling']:.0%} | {row['ours_us']} |"
            f" {row['peer_us']} | {row['gb_per_s']} | {row['gflop_per_s']} | {row['peer']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--record", help="write results/NAME.json and .md")
    parser.add_argument("--reading", default="", help="what the numbers say, for the record")
    parser.add_argument("--only", default="", help="the cases whose name contains this")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    began, others = time.perf_counter(), others_cpu_s()
    most = ceilings()
    square = torch.randn(2048, 2048)
    sgemm = 2 * 2048**3 / min(seconds(lambda: square @ square) for _ in range(9))
    rows = []
    for group in (*CASES, *FUSED_CASES):
        for case in group():
            if arguments.only in case.name:
                rows.append(measure(case, most))
                print(f"{rows[-1].ratio:7.2f}x {rows[-1].of_ceiling:5.0%}  {case.name}", flush=True)
    settings = [f"{name}={os.environ[name]}" for name in HELD_BACK if name in os.environ]
    record = {
        "what": "kernels_cpu",
        "command": " ".join([*settings, "python benchmarks/kernels_cpu.py"]),
        "machine": machine(),
        "read_gb_per_s": round(most.read / 1e9, 1),
        "update_gb_per_s": round(most.update / 1e9, 1),
        "fma_gflop_per_s": round(most.rate / 1e9, 1),
        "sgemm_gflop_per_s": round(sgemm / 1e9, 1),
        "cpus_used_by_others": round((others_cpu_s() - others) / (time.perf_counter() - began), 2),
        "reading": arguments.reading,
        "rows": [asdict(row) for row in rows],
    }
    if arguments.record:
        target = HERE / "results" / arguments.record
        target.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        target.with_suffix(".md").write_text(markdown(record))
    json.dump(record, sys.stdout)
    print()


if __name__ == "__main__":
    main()
