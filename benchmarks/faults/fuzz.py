"""Can a request, however it is made, break the server or make it hang?

    python benchmarks/faults/fuzz.py [--examples 250]

A server with a tiny random model gets two kinds of requests: those that schemathesis makes from
the server's own OpenAPI document, valid and not (its checks: no 5xx, statuses, headers, media types
and bodies as documented, what breaks the schema is refused), and hostile values in every field of
every body (tests/helpers_hostile.py). Fails on any 5xx, on an answer that takes longer than 10 s,
on an error that is not in OpenAI's form, and on a server that does not work afterwards.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

import harness  # noqa: E402
import helpers_tokenizer  # noqa: E402
import httpx  # noqa: E402
from helpers_hostile import cases, complaint, run_schemathesis  # noqa: E402
from helpers_server import Server, start_server, stop_server  # noqa: E402

MOST_SECONDS = 10.0
KEY = "k"
WANTED = 10_000  # cases of each kind together


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=250, help="of each route at most")
    examples = parser.parse_args().examples
    with tempfile.TemporaryDirectory() as scratch:
        server = start_server(
            helpers_tokenizer.random_model_folder(Path(scratch)), *flags(), max_len=48
        )
        log: list[str] = []
        assert server.process.stderr is not None
        threading.Thread(target=log.extend, args=(server.process.stderr,), daemon=True).start()
        try:
            hostile = send_hostile(server)
            made = send_made(server, Path(scratch), examples)
            alive = is_alive(server)
        finally:
            code = stop_server(server)
    traces = sum("Traceback" in line for line in log)
    return record(hostile, made, examples, alive and code == 0 and not traces)


def flags() -> tuple[str, ...]:
    return ("--enable-logprob", "--api-key", KEY, "--max-body-mib", "1")


def send_hostile(server: Server) -> dict[str, Any]:
    statuses: Counter[int] = Counter()
    complaints: list[str] = []
    slowest = 0.0
    root, headers = server.url.removesuffix("/v1"), {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=root, headers=headers, timeout=MOST_SECONDS) as client:
        for path, body in cases(client.get("/openapi.json").json()):
            began = time.monotonic()
            try:
                answer = client.post(path, content=body)
            except httpx.TimeoutException:
                complaints.append(f"{path} {body[:200]!r}: no answer in {MOST_SECONDS:.0f} s")
                continue
            seconds = time.monotonic() - began
            slowest = max(slowest, seconds)
            statuses[answer.status_code] += 1
            wrong = complaint(answer.status_code, answer.text, seconds, MOST_SECONDS)
            if wrong is not None:
                complaints.append(f"{path} {body[:200]!r}: {wrong}")
    return {
        "cases": statuses.total() + len(complaints),
        "statuses": dict(sorted(statuses.items())),
        "slowest_ms": round(1000 * slowest),
        "complaints": complaints,
    }


def send_made(server: Server, scratch: Path, examples: int) -> dict[str, Any]:
    url = server.url.removesuffix("/v1") + "/openapi.json"
    options = ("--max-examples", str(examples), "--seed", "1")
    options += ("--request-timeout", str(MOST_SECONDS), "--max-response-time", str(MOST_SECONDS))
    found = run_schemathesis(url, scratch / "report.json", KEY, *options)
    report = found["report"]
    if found["returncode"] or not report:
        sys.stderr.write(found["output"][-8000:])
    return {
        "cases": report["test_cases"]["generated"],
        "failures": report["test_cases"]["unique_failures"] + len(report["errors"]),
        "operations": report["operations"]["tested"],
        "version": report["schemathesis_version"],
        "seconds": round(report["running_time"]),
    }


def is_alive(server: Server) -> bool:
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=MOST_SECONDS) as client:
        answer = client.post("/completions", json={"prompt": "Hello", "max_tokens": 3})
        return answer.status_code == 200


def record(hostile: dict[str, Any], made: dict[str, Any], examples: int, works: bool) -> int:
    total = hostile["cases"] + made["cases"]
    found = len(hostile["complaints"]) + made["failures"]
    passed = works and found == 0 and total >= WANTED
    for text in hostile["complaints"][:20]:
        sys.stderr.write(text + "\n")
    table = [
        ("requests", "cases", "5xx, hangs, wrong forms", "slowest"),
        (
            f"schemathesis {made['version']}, {made['operations']} operations",
            f"{made['cases']:,}",
            str(made["failures"]),
            f"below {MOST_SECONDS:.0f} s",
        ),
        (
            "hostile values in every field",
            f"{hostile['cases']:,}",
            str(len(hostile["complaints"])),
            f"{hostile['slowest_ms']} ms",
        ),
    ]
    reading = (
        f"{total:,} requests, {found} findings; the server "
        f"{'works afterwards' if works else 'does NOT work afterwards, or logged a traceback'}."
    )
    harness.write_record(
        "fuzz",
        "Can a request, however it is made, break the server or make it hang?",
        f"python benchmarks/faults/fuzz.py --examples {examples}",
        {"model": "tiny-dense, random, float32", "max_model_len": 48, "flags": " ".join(flags())},
        {"hostile": {k: v for k, v in hostile.items() if k != "complaints"}, "schemathesis": made},
        table,
        reading,
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
