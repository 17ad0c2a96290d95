"""Does work end, and memory come back, when clients leave at random moments?

python benchmarks/faults/disconnects.py [--clients 1000]
"""

from __future__ import annotations

import asyncio
import random
import time

import rig
from servers import Server, request_of, streamed

AT_ONCE = 100


async def _leave(server: Server, nonce: int, turn: asyncio.Semaphore) -> None:
    """Send a request, or a part of one, and go away at a moment that depends on the nonce."""
    numbers = random.Random(nonce)
    async with turn:
        _, writer = await asyncio.open_connection(server.host, server.port)
        request = request_of({**rig.body(nonce, 900), "stream": numbers.random() < 0.7})
        if numbers.random() < 0.1:
            request = request[: numbers.randrange(len(request))]
        writer.write(request)
        await asyncio.sleep(numbers.random() * 0.5)
        if numbers.random() < 0.5:
            writer.transport.abort()
        writer.close()


async def _all_leave(server: Server, clients: int) -> float:
    """Returns the seconds from the last leaving until nothing is running or waiting."""
    turn = asyncio.Semaphore(AT_ONCE)
    await asyncio.gather(*(_leave(server, nonce, turn) for nonce in range(clients)))
    left = time.monotonic()
    while server.metric("num_requests_running") + server.metric("num_requests_waiting"):
        await asyncio.sleep(0.01)
        assert time.monotonic() - left < 60, "the work does not end"
    return time.monotonic() - left


def run(clients: int) -> list[rig.Claim]:
    with rig.tiny_server("--max-num-seqs", "16") as server:
        free = server.metric("free_gpu_block_num")
        end_s = asyncio.run(_all_leave(server, clients))
        lost_blocks = free - server.metric("free_gpu_block_num")
        after = asyncio.run(streamed(server, rig.body(0, 8)))
    return [
        rig.Claim("idle after the last one left", end_s, 1, "s"),
        rig.Claim("blocks of the cache that were not given back", lost_blocks, 0),
        rig.Claim("requests that failed afterwards", int(not after.is_whole), 0),
    ]


if __name__ == "__main__":
    raise SystemExit(rig.script("disconnects", __doc__, {"clients": 1000}, run))
