"""Do clients that do not read their streams harm those that do?

    python benchmarks/faults/slow_readers.py [--slow 200] [--normal 20]

Slow ones ask for log-probabilities, many bytes a token, and read 10 of them a second. They live in
a process of their own and out of step, so that they do not hold up the clients that are timed.
Those are timed before, beside and after them: with more busy threads than processors, as here, what
the 99th percentile is depends on the system's scheduler, and drifts in the first seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import random
import socket
import time
from collections.abc import Iterator
from statistics import median

import rig
from servers import Server, request_of, streamed

NEW = 1500  # tokens of a normal client: seconds, in which one hiccup of the machine is no percent
SLOW_TOKENS = 1900
PAUSE_S = 0.5
TIMES = 3  # that the normal clients are timed before, beside and after


@contextlib.contextmanager
def _slow_readers(server: Server, count: int) -> Iterator[None]:
    args = (server.host, server.port, count)
    process = multiprocessing.get_context("spawn").Process(target=_read_all_slowly, args=args)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _read_all_slowly(host: str, port: int, count: int) -> None:
    async def read() -> None:
        await asyncio.gather(*(_read_slowly(host, port, nonce) for nonce in range(count)))

    rig.raise_file_limit()
    asyncio.run(read())


async def _read_slowly(host: str, port: int, nonce: int) -> None:
    """For ever: its own kernel has something to read long after the server cut it."""
    plain = socket.create_connection((host, port))
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    wish = {**rig.body(nonce, SLOW_TOKENS), "stream": True, "logprobs": 20, "stop": ["\0never"]}
    plain.sendall(request_of(wish))
    plain.setblocking(False)
    loop = asyncio.get_running_loop()
    await asyncio.sleep(random.uniform(0, PAUSE_S))
    with contextlib.closing(plain), contextlib.suppress(ConnectionError):
        while True:
            await loop.sock_recv(plain, 5)
            await asyncio.sleep(PAUSE_S)


async def _gaps(server: Server, normal: int, seed: int) -> float:
    """The 99th percentile, in seconds, of the time between two reads of a normal client."""
    gaps: list[float] = []

    async def read(nonce: int) -> None:
        loop = asyncio.get_running_loop()
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(request_of({**rig.body(nonce, NEW), "stream": True}))
        times = []
        while await reader.read(65536):
            times.append(loop.time())
        writer.close()
        gaps.extend(b - a for a, b in itertools.pairwise(times[1:-1]))

    await asyncio.gather(*(read(seed + i) for i in range(normal)))
    return sorted(gaps)[int(len(gaps) * 0.99)]


def _p99s(server: Server, normal: int, first: int) -> list[float]:
    return [asyncio.run(_gaps(server, normal, 10_000 * (first + i))) for i in range(TIMES)]


def _both(server: Server, slow: int, normal: int) -> tuple[float, int, float]:
    """p99 beside slow readers over that without them, connections held, MiB of the API process."""
    _p99s(server, normal, 0)  # until the scheduler is where it stays
    alone = _p99s(server, normal, 10)
    before = server.metric("requests_number_total")
    num_open = server.num_sockets
    with _slow_readers(server, slow):
        # All texts of the slow are made before the normal ones are timed: what is measured is what
        # their unread bytes cost, not that their tokens take a share of the engine.
        while (
            server.metric("requests_number_total") < before + slow
            or server.metric("num_requests_running") + server.metric("num_requests_waiting") > 0
        ):
            time.sleep(0.1)
        unread_mib = server.rss_mib()
        beside = _p99s(server, normal, 20)
        time.sleep(1)
        num_held = server.num_sockets - num_open
    alone += _p99s(server, normal, 30)
    return median(beside) / median(alone), num_held, unread_mib


def run(slow: int, normal: int) -> list[rig.Claim]:
    flags = ("--max-num-seqs", "32", "--enable-logprob")
    with rig.tiny_server(*flags) as server:
        ratio, num_held, unread_mib = _both(server, slow, normal)
        after = asyncio.run(streamed(server, rig.body(0, 8)))
    return [
        rig.Claim("p99 between tokens beside slow readers / alone", ratio, 1.3),
        rig.Claim("slow readers that were not cut off", max(num_held, 0), 0),
        rig.Claim("memory of the API process", unread_mib, 1024, "MiB"),
        rig.Claim("requests that failed afterwards", int(not after.is_whole), 0),
    ]


if __name__ == "__main__":
    raise SystemExit(rig.script("slow_readers", __doc__, {"slow": 200, "normal": 20}, run))
