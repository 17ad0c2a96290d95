"""Does memory stay flat, and nothing fail, while clients of all sorts come and go for long?

python benchmarks/faults/soak.py [--minutes 20]

A few clients ask without a pause: streams and whole answers, short and long, with log-probabilities
or held to a regular expression, cut by their client or sampled several times. The slope of memory
is that of a straight line through its samples after the warm-up, a fifth of the time.
"""

from __future__ import annotations

import asyncio
import random
import time
from statistics import linear_regression

import httpx
import rig
from servers import Server

CLIENTS = 6
SAMPLE_S = 5.0


def _request(numbers: random.Random) -> dict:
    body = rig.body(
        numbers.randrange(10**9), numbers.choice((4, 16, 64)), numbers.randrange(1, 200)
    )
    body |= {"ignore_eos": False, "temperature": numbers.choice((0, 1)), "n": 1}
    kind = numbers.randrange(5)
    if kind == 0:
        body |= {"n": 3, "temperature": 1}
    if kind == 1:
        body |= {"logprobs": 2}
    if kind == 2:
        body |= {"guided_regex": f"[a-z]{{{numbers.randrange(1, 9)}}}"}
    return body


async def _client(server: Server, number: int, end: float, failures: list[str]) -> int:
    numbers, count = random.Random(number), 0
    url = f"http://{server.host}:{server.port}/v1/completions"
    async with httpx.AsyncClient(timeout=60) as http:
        while time.monotonic() < end:
            count += 1
            body, leaves = _request(numbers), numbers.random() < 0.1
            async with http.stream("POST", url, json=body | {"stream": count % 2 == 0}) as answer:
                async for _ in answer.aiter_bytes():
                    if leaves:
                        break
                if answer.status_code != 200:
                    failures.append(f"{answer.status_code} for {body}")
    return count


async def _watch(server: Server, end: float, samples: list[tuple[float, float, float]]) -> None:
    while time.monotonic() < end:
        engine = server.rss_mib(server.engine_pid)
        samples.append((time.monotonic() / 60, server.rss_mib(), engine))
        await asyncio.sleep(SAMPLE_S)


async def _soak(server: Server, end: float) -> tuple[int, list[str], list]:
    failures: list[str] = []
    samples: list[tuple[float, float, float]] = []
    clients = (_client(server, number, end, failures) for number in range(CLIENTS))
    *counts, _ = await asyncio.gather(*clients, _watch(server, end, samples))
    return sum(counts), failures, samples


def run(minutes: int) -> list[rig.Claim]:
    with rig.tiny_server("--max-num-seqs", "8", "--enable-logprob") as server:
        free = server.metric("free_gpu_block_num")
        end = time.monotonic() + 60 * minutes
        count, failures, samples = asyncio.run(_soak(server, end))
        while server.metric("num_requests_running"):
            time.sleep(0.05)
        lost_blocks = free - server.metric("free_gpu_block_num")
    for failure in failures[:5]:
        print(failure)
    times, api, engine = zip(*samples[len(samples) // 5 :])
    print(f"{count} requests; API {api[-1]:.0f} MiB, engine {engine[-1]:.0f} MiB at the end")
    return [
        rig.Claim(
            "memory of the API process grows", linear_regression(times, api).slope, 1, "MiB/min"
        ),
        rig.Claim(
            "memory of the engine grows", linear_regression(times, engine).slope, 1, "MiB/min"
        ),
        rig.Claim("requests that failed", len(failures), 0),
        rig.Claim("blocks of the cache that were not given back", lost_blocks, 0),
    ]


if __name__ == "__main__":
    raise SystemExit(rig.script("soak", __doc__, {"minutes": 20}, run))
