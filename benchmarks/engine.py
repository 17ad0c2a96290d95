"""Is our engine the fastest way to run ERNIE 4.5 on a CPU: beside llama.cpp and transformers?

    python benchmarks/engine.py [--rounds 3] [--shapes dense,moe] [--sides bf16,F16] [--folder DIR]

Random weights, the same for all; llama.cpp reads our GGUF export (F16), and its own Q8_0 and Q4_0
of that file, in which it gives the tied head of a Q4_0 file 6 bits (Q6_K). Of a mixture of experts
our wint4 keeps 8 bits outside the experts, as published; wint4_all does not, like Q4_0. Two shapes:

    dense   ERNIE-4.5-0.3B
    moe     21B-A3B in small: 12 layers, 64 experts of 256, 6 chosen, 2 shared, the first one dense

Parts (`--parts`), each greedy on all cores:

    prefill   a prompt of 512 tokens until its first token, prompt tokens per second
    decode    the 128 tokens after it, one request, tokens per second
    batch     16 requests of 128 prompt and 64 new tokens, new tokens per second of the whole run
    startup   a fresh process from the first import to the first token of a prompt of 32 tokens, the
              files being in the page cache (dense)

Shares: decode reads every weight it needs, in its own format, and the cache (read bandwidth);
prefill does the model's products (float32 peak). ERNIE_CPU_ISA=avx2 holds ours to AVX2.
"""

from __future__ import annotations

import time

START = time.perf_counter()  # before anything else is imported: `startup` counts from here

import argparse  # noqa: E402
import json  # noqa: E402
import random  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402
from statistics import median  # noqa: E402

from engine_sides import LlamaCppSide, Ours, Side, Transformers  # noqa: E402
from harness import Numbers, peak_memory_gb, runs_in_turn, seconds_of  # noqa: E402

QUESTION = __doc__.splitlines()[0]
PROMPT, NEW = 512, 128
BATCH, BATCH_PROMPT, BATCH_NEW = 16, 128, 64
FIRST_PROMPT = 32
SHAPES = ("dense", "moe")
PARTS = ("prefill", "decode", "batch", "startup")
SIDES = {
    "ours bf16": (Ours, None),
    "ours wint8": (Ours, "wint8"),
    "ours wint4": (Ours, "wint4"),
    "ours wint4_all": (Ours, "wint4_all"),
    "transformers float32": (Transformers, "float32"),
    "transformers bfloat16": (Transformers, "bfloat16"),
    "llama.cpp F16": (LlamaCppSide, "F16"),
    "llama.cpp Q8_0": (LlamaCppSide, "Q8_0"),
    "llama.cpp Q4_0": (LlamaCppSide, "Q4_0"),
}
# Five times slower than float32 in products of many rows: minutes that would tell nothing.
LEFT_OUT = {"transformers bfloat16": {"prefill", "batch"}}
ONLY_MOE = {"ours wint4_all"}  # of a dense model wint4 is the same

Found = dict[str, dict[str, dict[str, list[float]]]]  # shape -> side -> number -> each round's


def make_models(folder: Path, shapes: list[str]) -> None:
    """A model folder and three GGUF files for each shape; what is there is kept."""
    import ernie
    from ernie.checkpoint.gguf_export import export_gguf

    for shape in shapes:
        target, f16 = folder / shape, folder / f"{shape}-F16.gguf"
        if not (target / "config.json").is_file():
            model = ernie.ErnieModel(config_of(shape))
            model.init_weights(seed=0)
            ernie.save(model, target)
        if not f16.is_file():
            export_gguf(target, f16, dtype="f16")
        for kind in ("Q8_0", "Q4_0"):
            if not (file := folder / f"{shape}-{kind}.gguf").is_file():
                from llama_cpp_peer import quantized

                quantized(f16, file, kind)


def config_of(shape: str):
    from dataclasses import replace

    from ernie.models import MODELS

    dense = MODELS["ERNIE-4.5-0.3B"].config
    if shape == "dense":
        return dense
    return replace(
        dense,
        num_hidden_layers=12,
        moe_num_experts=64,
        moe_k=6,
        moe_intermediate_size=256,
        moe_num_shared_experts=2,
        moe_layer_start_index=1,
        moe_layer_end_index=11,
    )


def prompts(count: int, length: int) -> list[list[int]]:
    """The same on every side, made without torch, which llama.cpp's start-up does not pay for."""
    drawn = random.Random(count)
    return [[drawn.randrange(10, 100_000) for _ in range(length)] for _ in range(count)]


# --- one side, in its process ---


def run_side(name: str, folder: Path, parts: list[str]) -> Numbers:
    kind, form = SIDES[name]
    side: Side = kind(folder, form)
    parts = [part for part in parts if part not in LEFT_OUT.get(name, ())]
    if parts == ["startup"]:
        (first,) = side.arrivals(prompts(1, FIRST_PROMPT)[0], 1)
        return {"startup": first - START, "startup_gb": peak_memory_gb()}
    side.arrivals(prompts(1, 64)[0], 4)  # warm-up: kernels compiled, memory touched
    numbers: Numbers = {}
    one = prompts(1, PROMPT)[0]
    firsts = []
    if "prefill" in parts:
        for _ in range(2):
            start = time.perf_counter()
            firsts.append(side.arrivals(one, 1)[0] - start)
    if "decode" in parts:
        start = time.perf_counter()
        arrived = side.arrivals(one, 1 + NEW)
        firsts.append(arrived[0] - start)
        numbers["decode"] = NEW / (arrived[-1] - arrived[0])
    if "prefill" in parts:
        numbers["prefill"] = PROMPT / median(firsts)
    if "batch" in parts:
        batch = prompts(BATCH, BATCH_PROMPT)
        numbers["batch"] = BATCH * BATCH_NEW / seconds_of(lambda: side.answer_all(batch, BATCH_NEW))
    numbers["memory_gb"] = peak_memory_gb()
    numbers["bytes_per_token"] = side.bytes_per_token(PROMPT + NEW // 2)
    return numbers


# --- all of them ---


def run_all(folder: Path, args: argparse.Namespace) -> Found:
    """Every shape's and side's numbers, one of each round; sides take turns."""
    found: Found = {}
    steady = [part for part in args.parts if part != "startup"]
    for shape in args.shapes:
        sides = [s for s in chosen(args.sides) if shape == "moe" or s not in ONLY_MOE]
        found[shape] = {side: {} for side in sides}
        starts = ["startup"] if "startup" in args.parts and shape == "dense" else []
        for parts in filter(None, (steady, starts)):
            arguments = ["--folder", str(folder / shape), "--parts", ",".join(parts)]
            for side, runs in runs_in_turn(__file__, sides, args.rounds, arguments).items():
                for number in runs[0]:
                    found[shape][side].setdefault(number, []).extend(r[number] for r in runs)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", type=words, default=list(SHAPES), help="of " + ",".join(SHAPES))
    parser.add_argument("--parts", type=words, default=list(PARTS), help="of " + ",".join(PARTS))
    parser.add_argument("--sides", type=words, default=[""], help="only those with this in a name")
    parser.add_argument("--folder", type=Path, help="where models are kept; default: a new folder")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(run_side(args.side, args.folder, args.parts)))
        return
    from engine_report import report
    from llama_cpp_peer import library

    if any("llama.cpp" in side for side in chosen(args.sides)):
        library()  # or a sentence that says how to get it, before anything takes time
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        make_models(folder, args.shapes)
        report(run_all(folder, args), {shape: config_of(shape) for shape in args.shapes}, args)


def chosen(parts_of_names: list[str]) -> list[str]:
    return [side for side in SIDES if any(part in side for part in parts_of_names)]


def words(text: str) -> list[str]:
    return text.split(",")


if __name__ == "__main__":
    main()
