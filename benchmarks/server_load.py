"""What does the server add to the engine, and how long is the wait for a first token under load?

    python benchmarks/server_load.py [--shapes tiny,dense] [--folder DIR]

Random weights under SmolLM2's tokenizer; client and server share the machine. Two shapes:

    tiny    4 layers 128 wide: the engine costs next to nothing, what is left is HTTP and the client
    dense   the layers of ERNIE-4.5-0.3B

The same chats (64 meaningless words, 64 tokens of answer) go through the engine in a process of its
own (`LLM.chat`, 16 at once) and through `fastdeploy serve`, by the client of `fastdeploy bench`:

    c1, c4, c16   so many conversations at the same time, as fast as they are answered
    turns         8 at the same time, of 3 turns each: later turns find their past in the cache
    rate          passages of prose, 16 conversations that come at random, at half of what c16 takes
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import ROOT, Numbers, machine, smollm2_gguf, take_turns, write_record

QUESTION = __doc__.splitlines()[0]
AT_ONCE, WORDS, NEW = 16, 64, 64
NUM_CHATS = 48  # enough for the 16 slots to be full most of the time
LOADS = ("c1", "c4", "c16", "turns", "rate")
ENGINE = {"dtype": "bfloat16", "max_model_len": 1024, "max_num_seqs": AT_ONCE}
KEPT = ("output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_itl_ms", "p99_itl_ms")


def make_model(folder: Path, shape: str) -> Path:
    """A folder with random weights; what is there is kept."""
    import dataclasses

    import ernie
    from ernie.checkpoint.gguf import import_gguf
    from ernie.models import MODELS, TINY

    target = folder / shape
    if (target / "config.json").is_file():
        return target
    if not (folder / "smollm2").is_dir():
        import_gguf(smollm2_gguf(), folder / "smollm2")
    tokenizer = ernie.Tokenizer.from_folder(folder / "smollm2")
    config = TINY["tiny-dense"] if shape == "tiny" else MODELS["ERNIE-4.5-0.3B"].config
    config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    if shape == "tiny":
        config = dataclasses.replace(config, max_position_embeddings=1024)
    model = ernie.ErnieModel(config)
    model.init_weights(seed=0)
    model.tokenizer = tokenizer
    ernie.save(model, target)
    return target


def chats() -> list[Any]:
    from fastdeploy.client.loads import Lengths, random_talks

    return random_talks(NUM_CHATS, 1, Lengths(input=WORDS, output=NEW), seed=0)


# --- one side, in its process ---


def engine_side(model: Path) -> Numbers:
    from fastdeploy import LLM, SamplingParams

    llm = LLM(str(model), **ENGINE)
    params = SamplingParams(max_tokens=NEW, ignore_eos=True)
    asked = [[{"role": "user", "content": talk[0].text}] for talk in chats()]
    llm.chat(asked[:AT_ONCE], params)
    start = time.perf_counter()
    llm.chat(asked, params)
    return {"output_throughput": len(asked) * NEW / (time.perf_counter() - start)}


def server_side(model: Path) -> Numbers:
    from fastdeploy.client.batch import started_server

    os.environ["PYTHONPATH"] = str(ROOT)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items()]
    numbers: Numbers = {}
    with started_server(str(model), flags) as address:
        for load in LOADS:
            half = numbers.get("c16 request_throughput", 2.0) / 2
            found = asyncio.run(one_load(address, load, half))
            kept = (*KEPT, "failed", "request_throughput", "client_busy", "client_lag_p99_ms")
            numbers |= {f"{load} {name}": found[name] for name in kept}
    return numbers


async def one_load(address: str, load: str, rate: float) -> dict[str, Any]:
    from fastdeploy.client.bench import ServeBench, measure

    common = {"base_url": address, "random_input_len": WORDS, "random_output_len": NEW}
    if load == "turns":
        bench = ServeBench(**common, num_prompts=8, num_turns=3)
    elif load == "rate":
        bench = ServeBench(**common, dataset_name="text", num_prompts=16, request_rate=rate)
    else:
        at_once = int(load[1:])
        count = NUM_CHATS if at_once == AT_ONCE else 4 * at_once
        bench = ServeBench(**common, num_prompts=count, max_concurrency=at_once)
    return await measure(bench)


# --- both of them ---


def main() -> None:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--shapes", default="tiny,dense")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "server_load")
    parser.add_argument("--side")
    given = parser.parse_args()
    if given.side is not None:
        shape, _, side = given.side.partition(" ")
        run = engine_side if side == "engine" else server_side
        print(json.dumps(run(given.folder / shape)))
        return
    shapes = given.shapes.split(",")
    given.folder.mkdir(exist_ok=True)
    for shape in shapes:
        make_model(given.folder, shape)
    sides = [f"{shape} {side}" for shape in shapes for side in ("engine", "server")]
    found = take_turns(__file__, sides, given.rounds, ["--folder", str(given.folder)])
    command = f"python benchmarks/server_load.py --shapes {given.shapes} --rounds {given.rounds}"
    settings = {**ENGINE, "words": WORDS, "new": NEW, "chats": NUM_CHATS, "at_once": AT_ONCE}
    write_record(
        "server_load", QUESTION, command, settings, found, table_of(found, shapes),
        reading_of(found, shapes), where=machine(),
    )  # fmt: skip


def table_of(found: dict[str, Numbers], shapes: list[str]) -> list[list[str]]:
    names = ["tok/s", "first token ms", "p99", "between tokens ms", "p99", "client busy"]
    rows = [["shape", "load", *names]]
    for shape in shapes:
        engine, server = found[f"{shape} engine"], found[f"{shape} server"]
        rows.append([shape, "engine alone", f"{engine['output_throughput']:.1f}", *[""] * 5])
        for load in LOADS:
            values = [f"{server[f'{load} {name}']:.1f}" for name in KEPT]
            rows.append([shape, load, *values, f"{server[f'{load} client_busy']:.0%}"])
    return rows


def reading_of(found: dict[str, Numbers], shapes: list[str]) -> str:
    sentences = []
    for shape in shapes:
        engine, server = found[f"{shape} engine"], found[f"{shape} server"]
        share = server["c16 output_throughput"] / engine["output_throughput"]
        p99 = server["c16 p99_ttft_ms"]
        sentences.append(
            f"{shape}: with {AT_ONCE} at once the server gives {share:.1%} of the engine's own "
            f"tokens a second, and 99 % of first tokens come within {p99:.0f} ms."
        )
    failed = sum(value for side in found.values() for key, value in side.items() if "failed" in key)
    others = max(side["others_cpus"] for side in found.values())
    sentences.append(f"{failed:.0f} requests failed; other programs used {others:.1f} processors.")
    return " ".join(sentences)


if __name__ == "__main__":
    sys.exit(main())
