"""`fastdeploy bench latency | throughput`: the engine in this process, no server, random tokens."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie.settings import check_bounds, option
from fastdeploy.client.bench import percentile
from fastdeploy.client.command import read
from fastdeploy.config import EngineConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyBench:
    """A batch, again and again."""

    input_len: int = option(32, "Tokens of a prompt.", least=1)
    output_len: int = option(128, "Tokens of an answer.", least=1)
    batch_size: int = option(8, "Prompts of a batch.")
    num_iters: int = option(10, "Batches that count.")
    num_iters_warmup: int = option(2, "Batches before them.")
    output_json: str | None = option(None, "File for the result.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ThroughputBench:
    """Many requests at once."""

    input_len: int = option(128, "Tokens of a prompt.", least=1)
    output_len: int = option(128, "Tokens of an answer.", least=1)
    num_prompts: int = option(64, "Requests.")
    output_json: str | None = option(None, "File for the result.")


KINDS: dict[str, type] = {"latency": LatencyBench, "throughput": ThroughputBench}
ABOUT = {
    "latency": "One batch on the engine in this process: seconds from start to end.",
    "throughput": "Many requests on the engine in this process: tokens a second.",
}


def main(argv: Sequence[str]) -> int:
    name = argv[0]
    kind = KINDS[name]
    engine, bench = read(argv[1:], [EngineConfig, kind], f"fastdeploy bench {name}", ABOUT[name])
    check_bounds(bench)
    result = latency(engine, bench) if name == "latency" else throughput(engine, bench)
    for key, value in result.items():
        sys.stdout.write(f"{key:<28}{value:>12.4g}\n")
    if bench.output_json is not None:
        Path(bench.output_json).write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return 0


class _Engine:
    """The model, and batches of prompts that have nothing in common."""

    def __init__(self, config: EngineConfig, output_len: int) -> None:
        import dataclasses

        from fastdeploy import LLM, SamplingParams

        given = dataclasses.asdict(config)
        self.llm = LLM(given.pop("model"), **given)
        self.vocab_size = self.llm.engine.vocab_size
        self.drawn = random.Random(config.seed)
        self.params = SamplingParams(temperature=1.0, max_tokens=output_len, ignore_eos=True)

    def seconds(self, count: int, length: int) -> float:
        prompts = [
            [self.drawn.randrange(self.vocab_size) for _ in range(length)] for _ in range(count)
        ]
        start = time.perf_counter()
        self.llm.generate(prompts, self.params)
        return time.perf_counter() - start


def latency(config: EngineConfig, bench: LatencyBench) -> dict[str, Any]:
    """Seconds of a batch from start to end."""
    engine = _Engine(config, bench.output_len)
    for _ in range(bench.num_iters_warmup):
        engine.seconds(bench.batch_size, bench.input_len)
    seen = sorted(engine.seconds(bench.batch_size, bench.input_len) for _ in range(bench.num_iters))
    found = {f"p{p}_latency_s": percentile(seen, p) for p in (10, 25, 50, 75, 90, 99)}
    return {"avg_latency_s": sum(seen) / len(seen), **found}


def throughput(config: EngineConfig, bench: ThroughputBench) -> dict[str, Any]:
    """Requests and tokens a second of a run, after a short one to warm up."""
    engine = _Engine(config, bench.output_len)
    engine.seconds(min(8, bench.num_prompts), bench.input_len)
    elapsed_s = engine.seconds(bench.num_prompts, bench.input_len)
    new = bench.num_prompts * bench.output_len
    return {
        "elapsed_s": elapsed_s,
        "requests_per_second": bench.num_prompts / elapsed_s,
        "output_tokens_per_second": new / elapsed_s,
        "tokens_per_second": (new + bench.num_prompts * bench.input_len) / elapsed_s,
    }
