"""What happens when the engine freezes: is stopped with SIGSTOP in the middle of streams?

python benchmarks/faults/freeze_engine.py [--streams 16]
"""

from __future__ import annotations

import asyncio
import os
import signal
import time

import rig
from servers import Server, Stream, streamed


async def _freeze(server: Server, num_streams: int) -> tuple[float, list[Stream], float]:
    """Returns when it froze, the streams at their ends and the worst wait for /live meanwhile."""
    streams, tasks, pid = await rig.open_streams(server, num_streams)
    frozen = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    worst_s = 0.0
    while not all(task.done() for task in tasks):
        began = time.monotonic()
        status, _ = await asyncio.to_thread(server.get, "/live")
        assert status == 200, f"/live says {status}"
        worst_s = max(worst_s, time.monotonic() - began)
        await asyncio.sleep(0.05)
    await asyncio.gather(*tasks)
    return frozen, streams, worst_s


def run(streams: int) -> list[rig.Claim]:
    with rig.tiny_server("--max-num-seqs", str(streams)) as server:
        pid = server.engine_pid
        frozen, ended, live_s = asyncio.run(_freeze(server, streams))
        unready_s = time.monotonic() - frozen
        is_replaced = not server.is_ready or server.engine_pid != pid
        again_s = unready_s + server.wait_until_ready()
        after = asyncio.run(streamed(server, rig.body(0, 8)))
    num_silent = sum(not stream.has_error for stream in ended)
    return [
        rig.Claim("streams ended and not ready after the freeze", unready_s, 10, "s"),
        rig.Claim("ready again after the freeze", again_s, 30, "s"),
        rig.Claim("longest wait for /live meanwhile", live_s, 1, "s"),
        rig.Claim("streams that ended without an error event", num_silent, 0),
        rig.Claim("frozen engines still there", int(not is_replaced), 0),
        rig.Claim("requests that failed afterwards", int(not after.is_whole), 0),
    ]


if __name__ == "__main__":
    raise SystemExit(rig.script("freeze_engine", __doc__, {"streams": 16}, run))
