"""What share of a GPU's memory bandwidth and tensor cores do the kernels reach at 21B-A3B's shapes?

    python benchmarks/kernels_gpu.py [--only WORD]

One row for each operation and number of tokens: decoding 1 and 64, a prompt of 8192. The ideal time
is the larger of bytes / bandwidth and operations / rate, both measured in the same run; the share
is that over ours. Ratio: torch's own call for the same result (F.linear in bfloat16, attention of
torch over keys that lie in one piece), where there is one, over ours. Weights and caches are taken
in turn from pools larger than the cache of the chip.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import gpu
import torch
import torch.nn.functional as F
from harness import write_record

from ernie import kernels
from ernie.kernels.reference import route

QUESTION = __doc__.splitlines()[0]
HIDDEN, HEADS, GROUPS, WIDTH, VOCAB = 2560, 20, 4, 128, 103424
EXPERTS, SIZE, TOP, SHARED = 64, 1536, 6, 2
PRODUCTS = {
    "qkv": ((HEADS + 2 * GROUPS) * WIDTH, HIDDEN),
    "o": (HIDDEN, HEADS * WIDTH),
    "head": (VOCAB, HIDDEN),
}
TOKENS = (1, 64, 8192)
FORMATS = {"bf16": None, "wint8": 8, "wint4": 4}
POOL_BYTES = 256 << 20
POSITIONS = 64  # of a block of the cache

Call = Callable[[], object]


@dataclass
class Case:
    name: str
    ours: list[Call]
    num_bytes: float
    flop: float = 0.0
    peer: list[Call] = field(default_factory=list)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def weights(shape: tuple[int, ...], bits: int | None, parts: int = 1) -> list:
    """A pool of packed weights."""
    made: list = []
    while not made or len(made) * made[0].num_bytes < POOL_BYTES:
        weight = rand(*shape) / shape[-1] ** 0.5
        kept = kernels.quantize(weight, bits) if bits else weight
        made.append(kernels.pack(kept, parts=parts))
    return made


def product_cases() -> Iterator[Case]:
    for name, (outputs, width) in PRODUCTS.items():
        plain = [rand(outputs, width) for _ in range(1 + POOL_BYTES // (2 * outputs * width))]
        for form, bits in FORMATS.items():
            pool = weights((outputs, width), bits)
            for tokens in TOKENS:
                if name == "head" and tokens > 64:
                    continue
                x = rand(tokens, width)
                yield Case(
                    f"project {name} {form}, {tokens} tokens",
                    [lambda x=x, w=w: kernels.project(x, w) for w in pool],
                    pool[0].num_bytes + 2 * tokens * (width + outputs),
                    2 * tokens * width * outputs,
                    [lambda x=x, w=w: F.linear(x, w) for w in plain],
                )


def moe_cases() -> Iterator[Case]:
    router = torch.randn(EXPERTS, HIDDEN, device="cuda") / HIDDEN**0.5
    bias, norm = torch.zeros(EXPERTS, device="cuda"), (rand(HIDDEN), 1e-5)
    for form, bits in FORMATS.items():
        gate_up = weights((EXPERTS, 2 * SIZE, HIDDEN), bits, parts=2)[0]
        down = weights((EXPERTS, HIDDEN, SIZE), bits)[0]
        shared_bits = 8 if bits else None
        shared = (
            weights((2 * SHARED * SIZE, HIDDEN), shared_bits, parts=2)[0],
            weights((HIDDEN, SHARED * SIZE), shared_bits)[0],
        )
        for tokens in TOKENS:
            inputs = [rand(tokens, HIDDEN) for _ in range(1 if tokens > 64 else 8)]
            chosen = [route(kernels.rms_norm(x, *norm), router, bias, TOP, 1e-12) for x in inputs]
            touched = sum(len(experts.unique()) for experts, _ in chosen) / len(chosen)
            read = (gate_up.num_bytes + down.num_bytes) * touched / EXPERTS
            read += shared[0].num_bytes + shared[1].num_bytes

            def call(x: torch.Tensor, gate_up=gate_up, down=down, shared=shared) -> object:
                return kernels.moe(
                    x, router, bias, gate_up, down, shared, top_k=TOP, norm_min=1e-12, norm=norm,
                    residual_TD=x,
                )  # fmt: skip

            yield Case(
                f"moe {form}, {tokens} tokens",
                [lambda x=x, call=call: call(x) for x in inputs],
                read + 4 * tokens * HIDDEN,
                2 * tokens * 3 * HIDDEN * SIZE * (TOP + SHARED),
            )


def attention_cases() -> Iterator[Case]:
    for texts, length, new in ((1, 8192, 1), (64, 2048, 1), (1, 8192, 8192)):
        blocks = texts * length // POSITIONS
        tables = torch.randperm(blocks, device="cuda").int().view(texts, -1)
        bounds = torch.arange(texts + 1, device="cuda", dtype=torch.int32) * new
        lens = torch.full((texts,), length, device="cuda", dtype=torch.int32)
        q, peer_q = rand(texts * new, HEADS, WIDTH), rand(texts, HEADS, new, WIDTH)
        for dtype in (torch.bfloat16, torch.int8):
            row = kernels.cache_width(WIDTH, dtype)
            size = 2 * blocks * POSITIONS * GROUPS * row * dtype.itemsize
            shape = (blocks, POSITIONS, GROUPS, row)
            pool = [
                torch.zeros(2, *shape, dtype=dtype, device="cuda")
                for _ in range(1 if new > 1 else 1 + POOL_BYTES // size)
            ]
            peers = [rand(2, texts, GROUPS, length, WIDTH) for _ in pool]
            seen = (length + 1) / 2 if new > 1 else length
            yield Case(
                f"attend_paged {str(dtype)[6:]} cache, {texts} x {new} new of {length}",
                [
                    lambda q=q, c=c, a=(tables, bounds, lens): kernels.attend_paged(
                        q, c[0], c[1], *a, WIDTH**-0.5
                    )
                    for c in pool
                ],
                size + 4 * q.numel(),
                4 * texts * new * seen * HEADS * WIDTH,
                [
                    lambda q=peer_q, c=c, causal=new > 1: F.scaled_dot_product_attention(
                        q, c[0], c[1], is_causal=causal, enable_gqa=True
                    )
                    for c in peers
                ],
            )


def pointwise_cases() -> Iterator[Case]:
    for tokens in TOKENS:
        x, weight = rand(tokens, HIDDEN), rand(HIDDEN)
        both, heads = rand(tokens, 2 * SIZE), rand(tokens, HEADS + GROUPS, WIDTH)
        angle = torch.randn(tokens, WIDTH // 2, device="cuda")
        for name, call, elements in (
            ("rms_norm", lambda x=x, w=weight: kernels.rms_norm(x, w, 1e-5), 2 * x.numel()),
            ("swiglu", lambda b=both: kernels.swiglu(*b.chunk(2, -1)), 1.5 * both.numel()),
            ("rotate_", lambda h=heads, a=angle: kernels.rotate_(h, a, a), 2 * heads.numel()),
        ):
            yield Case(f"{name}, {tokens} tokens", [call], 2 * elements)


def measure(case: Case, where: dict) -> dict[str, float | str]:
    ours = gpu.seconds(case.ours)
    memory_s = case.num_bytes / (where["copied_gb_per_s"] * 1e9)
    ideal = max(memory_s, case.flop / (where["bfloat16_tflop_per_s"] * 1e12))
    row: dict[str, float | str] = {
        "name": case.name,
        "ratio": round(gpu.seconds(case.peer) / ours, 2) if case.peer else "",
        "of_ceiling": f"{ideal / ours:.0%}",
        "us": round(ours * 1e6, 1),
        "gb_per_s": round(case.num_bytes / ours / 1e9),
        "tflop_per_s": round(case.flop / ours / 1e12, 1),
    }
    print(*row.values(), sep="  ", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--only", default="", help="the cases whose name contains this")
    parser.add_argument("--reading", default="", help="what the numbers say, for the record")
    arguments = parser.parse_args()
    gpu.need_gpu()
    torch.manual_seed(0)
    where = gpu.device()
    rows = []
    for group in (pointwise_cases, attention_cases, product_cases, moe_cases):
        rows += [measure(case, where) for case in group() if arguments.only in case.name]
    header = ["what", "ratio", "of ceiling", "µs", "GB/s", "TFLOP/s"]
    table = [header, *([str(value) for value in row.values()] for row in rows)]
    write_record(
        "gpu_kernels", QUESTION, "python benchmarks/kernels_gpu.py",
        {"implementations": kernels.report("cuda")}, {"rows": rows}, table, arguments.reading,
        where=where,
    )  # fmt: skip


if __name__ == "__main__":
    main()
