"""Do clients that do not read their streams harm those that do?

    python benchmarks/faults/slow_readers.py [--slow 200] [--normal 20]

Slow ones ask for log-probabilities, many bytes a token, and read 10 of them a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket

import rig
from servers import Server, request_of, streamed

NEW = 150
SLOW_TOKENS = 1900


async def _read_slowly(server: Server, nonce: int) -> None:
    """Until it is cancelled: its own kernel has something to read long after the server cut it."""
    plain = socket.create_connection((server.host, server.port))
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    wish = {**rig.body(nonce, SLOW_TOKENS), "stream": True, "logprobs": 20, "stop": ["\0never"]}
    plain.sendall(request_of(wish))
    plain.setblocking(False)
    loop = asyncio.get_running_loop()
    with contextlib.closing(plain), contextlib.suppress(ConnectionError):
        while True:
            await loop.sock_recv(plain, 5)
            await asyncio.sleep(0.5)


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


async def _both(server: Server, slow: int, normal: int) -> tuple[float, float, int, float]:
    alone_s = min([await _gaps(server, normal, 10_000 * i) for i in (1, 2)])
    before = server.metric("requests_number_total")
    num_open = server.num_sockets
    readers = [asyncio.create_task(_read_slowly(server, i)) for i in range(slow)]
    # All texts of the slow are made before the normal ones are timed: what is measured is what
    # their unread bytes cost, not that their tokens take a share of the engine.
    while (
        server.metric("requests_number_total") < before + slow
        or server.metric("num_requests_running") + server.metric("num_requests_waiting") > 0
    ):
        await asyncio.sleep(0.1)
    unread_mib = server.rss_mib()
    beside_s = min([await _gaps(server, normal, 10_000 * i) for i in (3, 4)])
    await asyncio.sleep(1)
    num_held = server.num_sockets - num_open
    for task in readers:
        task.cancel()
    await asyncio.gather(*readers, return_exceptions=True)
    return alone_s, beside_s, num_held, unread_mib


def run(slow: int, normal: int) -> list[rig.Claim]:
    flags = ("--max-num-seqs", "32", "--enable-logprob")
    with rig.tiny_server(*flags) as server:
        alone_s, beside_s, num_held, unread_mib = asyncio.run(_both(server, slow, normal))
        after = asyncio.run(streamed(server, rig.body(0, 8)))
    return [
        rig.Claim("p99 between tokens beside slow readers / alone", beside_s / alone_s, 1.3),
        rig.Claim("slow readers that were not cut off", max(num_held, 0), 0),
        rig.Claim("memory of the API process", unread_mib, 1024, "MiB"),
        rig.Claim("requests that failed afterwards", int(not after.is_whole), 0),
    ]


if __name__ == "__main__":
    raise SystemExit(rig.script("slow_readers", __doc__, {"slow": 200, "normal": 20}, run))
