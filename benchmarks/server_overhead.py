"""What does serving cost: tokens through the HTTP server beside the engine's own, on this machine?

    python benchmarks/server_overhead.py [--rounds 3] [--folder DIR]

SmolLM2-135M, 16 texts of 64 prompt and 128 new tokens, greedy, all at once. The sides:

    engine   `LLM.generate` in a process of its own: no server, no client, no streaming
    server   the published command; 16 clients in one other process read a stream of events each, a
             token an event

The clients run on the same processors, so their work counts as the server's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import tempfile
import time
from functools import partial
from pathlib import Path

from harness import Numbers, seconds_of, smollm2_gguf, take_turns, write_record

QUESTION = __doc__.splitlines()[0]
STREAMS, PROMPT, NEW = 16, 64, 128
GATE = 0.95  # of the engine's own tokens per second
SETTINGS = {"max_model_len": 512, "max_num_seqs": STREAMS}


def prompts(seed: int) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[numbers.randrange(100, 40_000) for _ in range(PROMPT)] for _ in range(STREAMS)]


def run_engine(folder: str) -> Numbers:
    from fastdeploy import LLM, SamplingParams

    llm = LLM(folder, enable_prefix_caching=False, **SETTINGS)
    params = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)

    def answer(seed: int) -> None:
        llm.generate(prompts(seed), params, use_tqdm=False)

    answer(0)  # warm-up
    best_s = min(seconds_of(partial(answer, seed)) for seed in (1, 2, 3))
    return {"tokens_per_s": STREAMS * NEW / best_s}


def run_server(folder: str) -> Numbers:
    from servers import Server, serving, streamed

    async def answer(server: Server, seed: int) -> float:
        bodies = [
            {"prompt": ids, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
            for ids in prompts(seed)
        ]
        began = time.monotonic()
        streams = await asyncio.gather(*(streamed(server, body) for body in bodies))
        assert all(stream.is_whole for stream in streams), "a stream was cut"
        return time.monotonic() - began

    flags = ["--no-enable-prefix-caching"]
    flags += [w for k, v in SETTINGS.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    with serving(folder, *flags) as server:
        asyncio.run(answer(server, 0))
        best_s = min(asyncio.run(answer(server, seed)) for seed in (1, 2, 3))
        api_s, engine_s = cpu_s(server.process.pid), cpu_s(server.engine_pid)
        asyncio.run(answer(server, 4))
        tokens = STREAMS * NEW
        return {
            "tokens_per_s": tokens / best_s,
            "api_cpu_us_per_token": 1e6 * (cpu_s(server.process.pid) - api_s) / tokens,
            "engine_cpu_us_per_token": 1e6 * (cpu_s(server.engine_pid) - engine_s) / tokens,
            "api_rss_mib": server.rss_mib(),
        }


def cpu_s(pid: int | None) -> float:
    """Seconds of processors that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def report(results: dict[str, Numbers]) -> bool:
    engine, server = results["engine"], results["server"]
    ratio = server["tokens_per_s"] / engine["tokens_per_s"]
    table = [
        ["side", "tok/s", "ratio", "API CPU per token", "API memory"],
        ["engine alone", f"{engine['tokens_per_s']:.1f}", "1.00", "", ""],
        ["through the server", f"{server['tokens_per_s']:.1f}", f"{ratio:.3f}",
         f"{server['api_cpu_us_per_token']:.0f} us", f"{server['api_rss_mib']:.0f} MiB"],
    ]  # fmt: skip
    reading = (
        f"16 streams through the server get {ratio:.1%} of the engine's own tokens; the API "
        f"process spends {server['api_cpu_us_per_token']:.0f} us of a processor on each."
    )
    write_record(
        "server_overhead", QUESTION, "python benchmarks/server_overhead.py",
        {"model": "SmolLM2-135M", "streams": STREAMS, "prompt": PROMPT, "new": NEW, "gate": GATE},
        {"sides": results, "ratio": ratio}, table, reading,
    )  # fmt: skip
    return ratio >= GATE


def main() -> int:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side")
    parser.add_argument("--folder", help="SmolLM2 imported already")
    args = parser.parse_args()
    if args.side:
        run = {"engine": run_engine, "server": run_server}[args.side]
        print(json.dumps(run(args.folder)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if args.folder is None:
            from ernie.checkpoint.gguf import import_gguf

            args.folder = f"{folder}/model"
            import_gguf(smollm2_gguf(), args.folder)
        results = take_turns(__file__, ["engine", "server"], args.rounds, ["--folder", args.folder])
    return 0 if report(results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
