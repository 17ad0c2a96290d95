"""What `engine` measured, as a record: ratios against targets first, then every side's numbers."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Mapping
from statistics import median

from engine import (
    BATCH,
    BATCH_NEW,
    BATCH_PROMPT,
    FIRST_PROMPT,
    NEW,
    PROMPT,
    QUESTION,
    SHAPES,
    Found,
)
from harness import machine, write_record

from ernie.config import ErnieConfig

# What is compared: number, shape, our sides, their sides (the best of each counts), target ratio.
RATIOS = (
    ("decode", "dense", "ours wint4", "llama.cpp Q4_0", 1.5),
    ("decode", "dense", "ours wint8", "llama.cpp Q8_0", 1.4),
    ("decode", "dense", "ours bf16", "llama.cpp F16", 1.2),
    ("decode", "moe", "ours wint4", "llama.cpp Q4_0", 1.5),
    ("decode", "moe", "ours wint4_all", "llama.cpp Q4_0", 1.5),
    ("decode", "moe", "ours wint8", "llama.cpp Q8_0", 1.4),
    ("decode", "moe", "ours bf16", "llama.cpp F16", None),
    ("prefill", "dense", "ours", "llama.cpp", 1.2),
    ("prefill", "moe", "ours", "llama.cpp", None),
    ("batch", "dense", "ours", "llama.cpp", 1.4),
    ("batch", "dense", "ours", "transformers", 2.5),
    ("batch", "moe", "ours", "llama.cpp", None),
    ("batch", "moe", "ours", "transformers", None),
)
STARTUP_TARGET_S = 4.0
BUSY_CPUS = 0.15  # llama.cpp's threads wait by spinning: it loses most where it must share
TITLES = {"prefill": "prefill tok/s", "decode": "decode tok/s", "batch": "16 requests tok/s"}


def report(found: Found, configs: Mapping[str, ErnieConfig], args: Namespace) -> None:
    medians = {
        shape: {side: {k: median(v) for k, v in numbers.items()} for side, numbers in sides.items()}
        for shape, sides in found.items()
    }
    ratios = [["measured", "shape", "ours", "theirs", "ratio", "target", "result"]]
    ratios += [row for rule in RATIOS if (row := _ratio(medians, *rule))]
    ratios += _startup(medians)
    met = sum(row[-1] == "met" for row in ratios)
    missed = [f"{row[0]} {row[1]} ({row[4]} of {row[5]})" for row in ratios if "missed" in row[-1]]
    busy = max(
        cpus for sides in found.values() for n in sides.values() for cpus in n["others_cpus"]
    )
    reading = f"{met} of {met + len(missed)} targets are met" + (
        f"; missed: {', '.join(missed)}." if missed else "."
    )
    reading += _ceilings(medians, [row for row in ratios if "missed" in row[-1]])
    if busy > BUSY_CPUS:
        reading += f" Other programs used up to {busy:.1f} processors meanwhile: measure again."
    command = f"python benchmarks/engine.py --rounds {args.rounds}"
    command += "" if args.shapes == list(SHAPES) else f" --shapes {','.join(args.shapes)}"
    command += f" --sides '{','.join(args.sides)}'" if args.sides != [""] else ""
    settings = {
        "rounds": args.rounds, "prompt": PROMPT, "new": NEW, "first_prompt": FIRST_PROMPT,
        "batch": [BATCH, BATCH_PROMPT, BATCH_NEW], "parts": args.parts,
        "others_cpus_at_most": round(busy, 2), **_builds(found),
    }  # fmt: skip
    write_record(
        "engine", QUESTION, command, settings, {"sides": found, "medians": medians}, ratios,
        reading, _details(found, medians, configs),
    )  # fmt: skip


def _builds(found: Found) -> dict[str, str]:
    """The instruction sets that both sides were built for."""
    from ernie.kernels.cpu import build

    builds = {"ours_isa": build.isa()}
    if any("llama.cpp" in side for sides in found.values() for side in sides):
        from llama_cpp_peer import system_info

        builds["llama_cpp"] = system_info()
    return builds


def _best(sides: Mapping[str, Mapping[str, float]], prefix: str, number: str):
    """(value, side) of the side of that name, or else of the fastest whose name begins so."""
    names = [prefix] if prefix in sides else [side for side in sides if side.startswith(prefix)]
    values = [(sides[side][number], side) for side in names if number in sides[side]]
    return max(values, default=None)


def _ratio(medians, number: str, shape: str, ours: str, theirs: str, target: float | None):
    sides = medians.get(shape, {})
    mine, peer = _best(sides, ours, number), _best(sides, theirs, number)
    if mine is None or peer is None:
        return None
    ratio = mine[0] / peer[0]
    named = [f"{value:.1f} ({side})" for value, side in (mine, peer)]
    row = [TITLES[number], shape, *named, f"{ratio:.2f}x"]
    if target is None:
        return [*row, "", ""]
    return [*row, f"{target}x", "met" if ratio >= target else f"missed by {1 - ratio / target:.0%}"]


def _ceilings(medians, missed: Iterable[list[str]]) -> str:
    """What reading the weights leaves room for, of each decode that misses its target."""
    told = ""
    for title, shape, ours, theirs, ratio, *_ in missed:
        if title != TITLES["decode"]:
            continue
        read = machine()["read_gb_per_s"]
        parts, shares = [], []
        for side in (ours, theirs):
            name = side[side.index("(") + 1 : -1]
            numbers = medians[shape][name]
            shares.append(numbers["decode"] * numbers["bytes_per_token"] / read / 1e9)
            megabytes = numbers["bytes_per_token"] / 1e6
            parts.append(f"{name} reads {megabytes:.0f} MB a token at {shares[-1]:.0%}")
        most = float(ratio.removesuffix("x")) / shares[0]
        told += (
            f" {' and '.join(parts)} of the {read:.0f} GB/s that the machine reads: at all of them "
            f"it would be {most:.2f}x."
        )
    return told


def _startup(medians) -> Iterable[list[str]]:
    sides = {s: n["startup"] for s, n in medians.get("dense", {}).items() if "startup" in n}
    if (mine := sides.get("ours bf16")) is None:
        return
    peers = {s: v for s, v in sides.items() if not s.startswith("ours")}
    theirs = ", ".join(f"{value:.2f} s ({side})" for side, value in peers.items())
    result = "met" if mine < STARTUP_TARGET_S else f"missed by {mine / STARTUP_TARGET_S - 1:.0%}"
    target = f"under {STARTUP_TARGET_S:g} s"
    yield ["import to first token", "dense", f"{mine:.2f} s (bf16)", theirs, "", target, result]


def _details(found: Found, medians, configs: Mapping[str, ErnieConfig]) -> list[list[str]]:
    """Median (least-most) of every number, and the shares of the ceilings."""
    here = machine()
    read, rate = here["read_gb_per_s"] * 1e9, here["float32_gflop_per_s"] * 1e9
    header = ["shape", "side", *TITLES.values(), "start-up s", "peak memory GB"]
    rows = [[*header, "decode, of read bandwidth", "prefill, of float32 products"]]
    for shape, sides in found.items():
        config = configs[shape]
        # The head is applied to one position of a prompt only.
        head = 2 * config.vocab_size * config.hidden_size
        flops = config.flops_per_token(PROMPT // 2) - head
        for side, numbers in sides.items():
            middle = medians[shape][side]
            decode = prefill = ""
            if "decode" in middle:
                decode = f"{middle['decode'] * middle['bytes_per_token'] / read:.0%}"
            if "prefill" in middle:
                prefill = f"{middle['prefill'] * flops / rate:.0%}"
            cells = (_spread(numbers.get(name)) for name in (*TITLES, "startup", "memory_gb"))
            rows.append([shape, side, *cells, decode, prefill])
    return rows


def _spread(values: list[float] | None) -> str:
    if not values:
        return ""
    digits = 1 if median(values) >= 10 else 2
    low, middle, high = (f"{v:.{digits}f}" for v in (min(values), median(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low}-{high})"
