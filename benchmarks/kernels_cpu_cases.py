"""The cases of kernels_cpu.py: our kernel and the fastest plain torch for the same result, at the
shapes of ERNIE-4.5-0.3B. Weights and caches come from pools larger than the last-level cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, pairwise

import torch
import torch.nn.functional as F

from ernie.kernels import reference
from ernie.kernels.cpu import ops

HIDDEN, HEADS, GROUPS, WIDTH, FFN, VOCAB = 1024, 16, 2, 128, 3072, 103424
PRODUCTS = {
    "qkv": (HIDDEN, (HEADS + 2 * GROUPS) * WIDTH),
    "o": (HEADS * WIDTH, HIDDEN),
    "gate_up": (HIDDEN, 2 * FFN),
    "down": (FFN, HIDDEN),
    "head": (HIDDEN, VOCAB),
}
POOL_BYTES = 160 << 20
SCALE = WIDTH**-0.5
BF16, F32 = torch.bfloat16, torch.float32


@dataclass
class Case:
    name: str
    ours: Callable[[], object]
    peer: Callable[[], object]
    peer_name: str
    num_bytes: float  # that must be read or written at least
    flop: float = 0.0
    writes: bool = False  # much of the bytes is written


def linear_cases() -> Iterator[Case]:
    for name, (width, outputs) in PRODUCTS.items():
        num = max(1, POOL_BYTES // (width * outputs * 2))
        weights = [torch.randn(outputs, width).to(BF16) for _ in range(num)]
        floats = [w.float() for w in weights]
        for dtype, rows in [(BF16, (1, 4, 16, 64, 512)), (F32, (1, 4, 16, 512))]:
            own = cycle(weights if dtype == BF16 else floats)
            for num_rows in rows:
                if name == "head" and num_rows > 64:
                    continue
                x, peer = torch.randn(num_rows, width), cycle(floats)
                yield Case(
                    f"linear {name} {str(dtype)[6:]} weight, {num_rows} rows",
                    lambda x=x, own=own: ops.linear(x, next(own)),
                    lambda x=x, peer=peer: F.linear(x, next(peer)),
                    "F.linear, float32 weight",
                    width * outputs * dtype.itemsize,
                    2 * num_rows * width * outputs,
                )


def training_cases() -> Iterator[Case]:
    """Forward and backward of the gate and up product with 1024 rows."""
    width, outputs = PRODUCTS["gate_up"]
    x, grad = torch.randn(1024, width, requires_grad=True), torch.randn(1024, outputs)
    frozen = torch.randn(outputs, width).to(BF16)
    trained = torch.randn(outputs, width, requires_grad=True)
    for name, weight, peer_weight, inputs, products in (
        ("frozen bfloat16", frozen, frozen.float(), (x,), 2),
        ("trained float32", trained, trained, (x, trained), 3),
    ):

        def run(linear: Callable, weight=weight, inputs=inputs) -> object:
            return torch.autograd.grad(linear(x, weight), inputs, grad)

        yield Case(
            f"linear gate_up forward and backward, {name} weight, 1024 rows",
            lambda run=run: run(ops.linear),
            lambda run=run, weight=peer_weight: run(F.linear, weight),
            "F.linear, float32 weight",
            width * outputs * weight.dtype.itemsize,
            products * 2 * 1024 * width * outputs,
        )


def grouped_cases() -> Iterator[Case]:
    experts, width, outputs, top = 64, HIDDEN, 512, 6
    weights = [torch.randn(experts, outputs, width).to(BF16) for _ in range(3)]
    floats = [w.float() for w in weights]
    for tokens in (1, 16, 512):
        chosen = torch.stack([torch.randperm(experts)[:top] for _ in range(tokens)]).flatten()
        counts = chosen.bincount(minlength=experts)
        x, split = torch.randn(len(chosen), width), counts.tolist()
        own, peer = cycle(weights), cycle(floats)

        def loop(x=x, split=split, peer=peer) -> torch.Tensor:
            weight = next(peer)
            return torch.cat(
                [F.linear(r, weight[e]) for e, r in enumerate(x.split(split)) if len(r)]
            )

        yield Case(
            f"grouped_linear 64 experts 1024->512 bfloat16, {tokens} tokens top 6",
            lambda x=x, counts=counts, own=own: ops.grouped_linear(x, next(own), counts),
            loop,
            "loop of F.linear, float32 weight",
            int((counts > 0).sum()) * width * outputs * 2,
            2 * len(chosen) * width * outputs,
        )


def sdpa_loop(q, k, v, cu_seqlens, scale) -> torch.Tensor:
    out = []
    for a, b in pairwise(cu_seqlens.tolist()):
        q1, k1, v1 = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
        one = F.scaled_dot_product_attention(
            q1, k1, v1, is_causal=True, scale=scale, enable_gqa=True
        )
        out.append(one[0].transpose(0, 1))
    return torch.cat(out)


def packed_cases() -> Iterator[Case]:
    for name, lens in (
        ("20 x 100", [100] * 20),
        ("mixed 10 to 700", [10, 40, 700, 150, 90, 30, 200, 400, 60, 120]),
        ("2 x 512", [512] * 2),
        ("1 x 8192", [8192]),
    ):
        tokens, cu = sum(lens), torch.tensor([0, *lens]).cumsum(0).int()
        sizes = [HEADS * WIDTH, GROUPS * WIDTH, GROUPS * WIDTH]
        parts = torch.randn(tokens, sum(sizes)).split(sizes, 1)
        qkv = [p.unflatten(1, (-1, WIDTH)) for p in parts]
        flop = sum(4 * n * n / 2 for n in lens) * HEADS * WIDTH
        num_bytes = 4 * tokens * (sum(sizes) + HEADS * WIDTH)
        yield Case(
            f"attend_packed {name}",
            lambda qkv=qkv, cu=cu: ops.attend_packed(*qkv, cu, SCALE),
            lambda qkv=qkv, cu=cu: sdpa_loop(*qkv, cu, SCALE),
            "loop of scaled_dot_product_attention",
            num_bytes,
            flop,
        )
        if tokens > 8000:
            continue
        leaves = [t.detach().clone().requires_grad_() for t in qkv]
        grad = torch.randn(tokens, HEADS, WIDTH)

        def run(attend: Callable, leaves=leaves, cu=cu, grad=grad) -> object:
            return torch.autograd.grad(attend(*leaves, cu, SCALE), leaves, grad)

        yield Case(
            f"attend_packed forward and backward, {name}",
            lambda run=run: run(ops.attend_packed),
            lambda run=run: run(sdpa_loop),
            "loop of scaled_dot_product_attention",
            3 * num_bytes,
            3.5 * flop,
        )


def paged_cases() -> Iterator[Case]:
    """Decode of 1 and of 16 sequences, and chunks of 512 at the begin and deep in a prompt."""
    few = ((1, 600, 1), (16, 600, 1), (1, 4096, 512))
    all_sizes = [(n, length, 1) for n in (1, 16) for length in (128, 600, 4000)]
    all_sizes += [(1, 512, 512), (1, 4096, 512)]
    for dtype in (torch.float16, torch.int8, BF16, F32):
        for size in few if dtype in (BF16, F32) else all_sizes:
            yield paged_case(dtype, *size)


def paged_case(dtype: torch.dtype, sequences: int, length: int, queries: int) -> Case:
    """The newest `queries` tokens of each of `sequences` texts of `length` tokens."""
    block, row = 64, reference.cache_width(WIDTH, dtype)
    blocks = -(-length // block)
    num = max(sequences * blocks, POOL_BYTES // (block * GROUPS * row * dtype.itemsize))
    k, v = (torch.zeros(num, block, GROUPS, row, dtype=dtype) for _ in range(2))
    some = torch.randn(2, 4096, GROUPS, WIDTH)
    for slots in torch.arange(num * block).split(4096):
        ops.write_cache(*some[:, : len(slots)], k, v, slots)
    order = torch.randperm(num)[: num // blocks * blocks].view(-1, blocks).int()
    tables = cycle(t.contiguous() for t in order.split(sequences) if len(t) == sequences)
    lens = torch.full((sequences,), length, dtype=torch.int32)
    cu = torch.arange(sequences + 1, dtype=torch.int32) * queries
    q = torch.randn(sequences * queries, HEADS, WIDTH)
    mask = torch.ones(queries, length, dtype=torch.bool).tril(length - queries)

    def peer() -> torch.Tensor:
        table = next(tables).long()
        q1 = q.view(sequences, -1, HEADS, WIDTH).transpose(1, 2)
        rows = (reference._cached_values(c[table].flatten(1, 2)[:, :length]) for c in (k, v))
        k1, v1 = (x.transpose(1, 2) for x in rows)
        return F.scaled_dot_product_attention(
            q1, k1, v1, attn_mask=mask, scale=SCALE, enable_gqa=True
        )

    seen = length - (queries - 1) / 2
    return Case(
        f"attend_paged {sequences} x {length}, {queries} queries, {str(dtype)[6:]} cache",
        lambda: ops.attend_paged(q, k, v, next(tables), cu, lens, SCALE),
        peer,
        "gather, scaled_dot_product_attention",
        2 * sequences * length * GROUPS * row * dtype.itemsize,
        4 * sequences * queries * seen * HEADS * WIDTH,
    )


def norm_cases() -> Iterator[Case]:
    for rows in (1, 16, 1024):
        x, weight = torch.randn(rows, HIDDEN), torch.randn(HIDDEN)
        yield Case(
            f"rms_norm, {rows} rows",
            lambda x=x, weight=weight: ops.rms_norm(x, weight, 1e-5),
            lambda x=x, weight=weight: F.rms_norm(x, (HIDDEN,), weight, 1e-5),
            "F.rms_norm",
            8 * rows * HIDDEN,
            writes=True,
        )
        gate_up = torch.randn(rows, 2 * FFN)
        gate, up = gate_up.chunk(2, 1)
        yield Case(
            f"swiglu, {rows} rows",
            lambda gate=gate, up=up: ops.swiglu(gate, up),
            lambda gate=gate, up=up: F.silu(gate) * up,
            "F.silu(gate) * up",
            12 * rows * FFN,
            writes=True,
        )
        q = torch.randn(rows, HEADS, WIDTH)
        cos, sin = torch.randn(2, rows, WIDTH // 2)
        yield Case(
            f"rotate, {rows} rows",
            lambda q=q, cos=cos, sin=sin: ops.rotate(q, cos, sin),
            lambda q=q, cos=cos, sin=sin: complex_rotate(q, cos, sin),
            "complex product",
            8 * rows * HEADS * WIDTH,
            writes=True,
        )


def complex_rotate(x, cos, sin) -> torch.Tensor:
    turn = torch.complex(cos, sin)[:, None]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


def backward_cases() -> Iterator[Case]:
    rows = 1024
    x, weight = (
        torch.randn(rows, HIDDEN, requires_grad=True),
        torch.randn(HIDDEN, requires_grad=True),
    )
    gate, up = (torch.randn(rows, FFN, requires_grad=True) for _ in range(2))

    def run(call: Callable, *inputs: torch.Tensor) -> object:
        out = call()
        return torch.autograd.grad(out, inputs, torch.ones_like(out))

    yield Case(
        "rms_norm forward and backward, 1024 rows",
        lambda: run(lambda: ops.rms_norm(x, weight, 1e-5), x, weight),
        lambda: run(lambda: F.rms_norm(x, (HIDDEN,), weight, 1e-5), x, weight),
        "F.rms_norm",
        4 * 5 * rows * HIDDEN,
        writes=True,
    )
    yield Case(
        "swiglu forward and backward, 1024 rows",
        lambda: run(lambda: ops.swiglu(gate, up), gate, up),
        lambda: run(lambda: F.silu(gate) * up, gate, up),
        "F.silu(gate) * up",
        4 * 8 * rows * FFN,
        writes=True,
    )


def memory_cases() -> Iterator[Case]:
    k, v = torch.randn(2, 16, GROUPS, WIDTH)
    caches = torch.zeros(2, 512, 16, GROUPS, WIDTH, dtype=BF16)
    slots = torch.randperm(512 * 16)[:16]

    def write() -> None:
        for new, cache in zip((k, v), caches):
            cache.view(-1, GROUPS, WIDTH).index_copy_(0, slots, new.to(BF16))

    yield Case(
        "write_cache, 16 tokens, bfloat16",
        lambda: ops.write_cache(k, v, *caches, slots),
        write,
        "index_copy_",
        2 * 6 * k.numel(),
        writes=True,
    )
    rates = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    for moments in (F32, BF16):
        size = 32 << 20
        parameter = torch.nn.Parameter(torch.randn(size))
        parameter.grad = torch.randn(size)
        peer = torch.optim.AdamW([parameter], lr=1e-4, fused=True)
        state = torch.zeros(2, size, dtype=moments)
        yield Case(
            f"adamw_step, 32 Mi parameters, {str(moments)[6:]} moments",
            lambda parameter=parameter, state=state: ops.adamw_step(
                parameter.detach(), parameter.grad, *state, **rates, step=9
            ),
            peer.step,
            "torch.optim.AdamW(fused=True), float32 moments",
            size * (4 + 4 + 4 + 4 * moments.itemsize),
            writes=True,
        )


CASES = (
    linear_cases,
    training_cases,
    grouped_cases,
    packed_cases,
    paged_cases,
    norm_cases,
    backward_cases,
    memory_cases,
)
