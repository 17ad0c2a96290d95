"""What do clients see when the engine is killed with SIGKILL in the middle of their streams?

    python benchmarks/faults/kill_engine.py [--streams 64] [--kills 20]

Before each kill a short request is answered: a server whose engines all die before they have
answered any gives up after the fifth, as it should.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import rig
from servers import Server, Stream, streamed


async def _kill(server: Server, num_streams: int) -> tuple[float, list[Stream]]:
    """Kill the engine once all streams are alive; returns when, and the streams at their ends."""
    streams, tasks, pid = await rig.open_streams(server, num_streams)
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    await asyncio.gather(*tasks)
    return killed, streams


def run(streams: int, kills: int) -> list[rig.Claim]:
    ends_s, unready_s, again_s = [], [], []
    num_silent = num_failed = 0
    pids = set()
    flags = ("--max-num-seqs", str(streams))
    with rig.tiny_server(*flags) as server:
        for _ in range(kills):
            pids.add(server.engine_pid)
            num_failed += not asyncio.run(streamed(server, rig.body(0, 8))).is_whole
            killed, ended = asyncio.run(_kill(server, streams))
            assert not server.is_ready or server.engine_pid not in pids, "ready without an engine"
            unready_s.append(time.monotonic() - killed)
            again_s.append(time.monotonic() - killed + server.wait_until_ready())
            ends_s.append(max(stream.ended - killed for stream in ended))
            num_silent += sum(not stream.has_error for stream in ended)
        pids.add(server.engine_pid)
        num_orphans = sum(_is_alive(pid) for pid in pids - {server.engine_pid})
        num_failed += not asyncio.run(streamed(server, rig.body(0, 8))).is_whole
    num_orphans += sum(map(_is_alive, pids))
    return [
        rig.Claim("last stream ended after the kill", max(ends_s), 2, "s"),
        rig.Claim("not ready after the kill", max(unready_s), 2, "s"),
        rig.Claim("ready again after the kill", max(again_s), 30, "s"),
        rig.Claim("streams that ended without an error event", num_silent, 0),
        rig.Claim("engines left behind", num_orphans, 0),
        rig.Claim("requests between the kills that failed", num_failed, 0),
    ]


def _is_alive(pid: int | None) -> bool:
    return Path(f"/proc/{pid}").exists()


if __name__ == "__main__":
    raise SystemExit(rig.script("kill_engine", __doc__, {"streams": 64, "kills": 20}, run))
