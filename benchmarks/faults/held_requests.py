"""Are answers lost or mixed up when very many streams are open at once?

    python benchmarks/faults/held_requests.py [--streams 1000] [--overflow 200]

Every prompt is of its own, and its greedy answer was taken alone before. `overflow` requests more
than `max_concurrency` come while all are open: each has to be told 429 and when to come back.
"""

from __future__ import annotations

import asyncio

import rig
from servers import Server, Stream, streamed

NEW, SEATS = 24, 32


async def _one_by_one(server: Server, count: int) -> list[list[int]]:
    return [(await streamed(server, rig.body(i, NEW))).token_ids for i in range(count)]


async def _at_once(server: Server, count: int, overflow: int) -> tuple[list[Stream], list[Stream]]:
    tasks = [asyncio.create_task(streamed(server, rig.body(i, NEW))) for i in range(count)]
    while server.metric("requests_number_total") < 1.5 * count:  # `count` came one by one before
        await asyncio.sleep(0.02)
    more = [asyncio.create_task(streamed(server, rig.body(-1 - i, NEW))) for i in range(overflow)]
    return await asyncio.gather(*tasks), await asyncio.gather(*more)


def run(streams: int, overflow: int) -> list[rig.Claim]:
    flags = ("--max-num-seqs", str(SEATS), "--max-concurrency", str(streams), "--batch-invariant")
    with rig.tiny_server(*flags) as server:
        expected = asyncio.run(_one_by_one(server, streams))
        free = server.metric("free_gpu_block_num")
        held, late = asyncio.run(_at_once(server, streams, overflow))
        rss_mib = server.rss_mib()
        lost_blocks = free - server.metric("free_gpu_block_num")
    assert len(set(map(tuple, expected))) > streams * 0.99, "the prompts are not told apart"
    refused = [stream for stream in late if stream.status == 429]
    answered = [stream for stream in late if stream.is_whole]
    return [
        rig.Claim("streams that were cut", sum(not stream.is_whole for stream in held), 0),
        rig.Claim(
            "answers that differ from the one taken alone",
            sum(stream.token_ids != one for stream, one in zip(held, expected)),
            0,
        ),
        rig.Claim(
            "requests too many that were neither refused by 429 nor answered",
            overflow - len(refused) - len(answered),
            0,
        ),
        rig.Claim(
            "refusals without Retry-After", sum(b"retry-after" not in s.data for s in refused), 0
        ),
        rig.Claim("blocks of the cache that were not given back", lost_blocks, 0),
        rig.Claim("memory of the API process", rss_mib, 2048, "MiB"),
    ]


if __name__ == "__main__":
    settings = {"streams": 1000, "overflow": 200}
    raise SystemExit(rig.script("held_requests", __doc__, settings, run))
