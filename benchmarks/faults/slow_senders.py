"""Are half-open requests ended in time, and the others served meanwhile?

    python benchmarks/faults/slow_senders.py [--senders 500]

Half of them never finish their headers, the other half their bodies; each sends a byte a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

import rig
from servers import Server, request_of, streamed

BOUND_S = 15.0


async def _drip(server: Server, nonce: int) -> float:
    """Seconds until the server closes a request that never becomes whole."""
    began = time.monotonic()
    reader, writer = await asyncio.open_connection(server.host, server.port)
    request = request_of(rig.body(nonce, 4))
    head, _, _ = request.partition(b"\r\n\r\n")
    writer.write(head[:20] if nonce % 2 else head + b"\r\n\r\n{")
    reading = asyncio.create_task(reader.read())
    with contextlib.suppress(ConnectionError):
        while not reading.done():
            writer.write(b"x" if nonce % 2 else b" ")
            await asyncio.wait({reading}, timeout=1)
        await reading
    writer.close()
    return time.monotonic() - began


async def _oversized(server: Server) -> int:
    """The status for headers of a MiB."""
    reader, writer = await asyncio.open_connection(server.host, server.port)
    with contextlib.suppress(ConnectionError):
        writer.write(b"GET /live HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 2**20)
        answer = await reader.read(200)
    writer.close()
    return int(answer.split(b" ")[1])


async def _all(server: Server, senders: int) -> tuple[list[float], float, int]:
    dripping = [asyncio.create_task(_drip(server, nonce)) for nonce in range(senders)]
    worst_s = 0.0
    while not all(task.done() for task in dripping):
        stream = await streamed(server, rig.body(0, 4))
        assert stream.is_whole, "an ordinary request failed"
        worst_s = max(worst_s, stream.ended - stream.began)
        await asyncio.sleep(0.2)
    return await asyncio.gather(*dripping), worst_s, await _oversized(server)


def run(senders: int) -> list[rig.Claim]:
    with rig.tiny_server() as server:
        closed_s, worst_s, status = asyncio.run(_all(server, senders))
    return [
        rig.Claim("longest life of a half-open request", max(closed_s), BOUND_S + 1, "s"),
        rig.Claim("longest ordinary request meanwhile", worst_s, 2, "s"),
        rig.Claim("headers of a MiB that were not refused by 431", int(status != 431), 0),
    ]


if __name__ == "__main__":
    raise SystemExit(rig.script("slow_senders", __doc__, {"senders": 500}, run))
