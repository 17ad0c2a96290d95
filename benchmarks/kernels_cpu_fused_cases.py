"""The cases of kernels_cpu.py for the fused operations of serving: packed weights, at the shapes of
ERNIE-4.5-0.3B and of a small mixture of experts.

Bytes are those of the packed weights that are read, so "GB/s" compares with the read bandwidth and
says how near to free everything but reading is. Packed weights come from pools larger than the
last-level cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle

import torch
import torch.nn.functional as F
from kernels_cpu_cases import FFN, HIDDEN, POOL_BYTES, PRODUCTS, Case

from ernie.kernels import PackedWeight
from ernie.kernels.cpu import ops

FORMATS = ("bfloat16", "int8", "int4")
EXPERTS, INNER, TOP = 64, 256, 6
EPS = 1e-5


def pool(weight: torch.Tensor, name: str, parts: int = 1) -> list[PackedWeight]:
    """The same weight again and again, each time elsewhere in memory."""
    if name.startswith("int"):
        source = ops.quantize(weight, int(name.removeprefix("int")))
    else:
        source = weight.to(getattr(torch, name))
    first = ops.pack(source, parts=parts)
    more = POOL_BYTES // first.num_bytes
    return [first, *(ops.pack(source, parts=parts) for _ in range(more))]


def project_cases() -> Iterator[Case]:
    for product, (width, outputs) in PRODUCTS.items():
        weight = torch.randn(outputs, width) / width**0.5
        floats = [weight.clone() for _ in range(max(1, POOL_BYTES // (4 * weight.numel())))]
        for name in FORMATS:
            weights = pool(weight, name)
            for rows in (1, 4, 16) if product == "head" else (1, 4, 16, 512):
                x, own, peer = torch.randn(rows, width), cycle(weights), cycle(floats)
                yield Case(
                    f"project {product} {name}, {rows} rows",
                    lambda x=x, own=own: ops.project(x, next(own)),
                    lambda x=x, peer=peer: F.linear(x, next(peer)),
                    "F.linear, float32 weight",
                    weights[0].num_bytes,
                    2 * rows * width * outputs,
                )


def mlp_cases() -> Iterator[Case]:
    gate_up, down = torch.randn(2 * FFN, HIDDEN) / 32, torch.randn(HIDDEN, FFN) / 55
    norm = torch.ones(HIDDEN)

    def plain(x: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(F.rms_norm(x, (HIDDEN,), norm, EPS), gate_up).chunk(2, 1)
        return x + F.linear(F.silu(gate) * up, down)

    for name in FORMATS:
        pools = list(zip(pool(gate_up, name, 2), pool(down, name)))
        for rows in (1, 4, 16, 512):
            x, own = torch.randn(rows, HIDDEN), cycle(pools)
            yield Case(
                f"mlp {name}, norm and residual, {rows} rows",
                lambda x=x, own=own: ops.mlp(x, *next(own), norm=(norm, EPS), residual_TD=x),
                lambda x=x: plain(x),
                "the same in F.linear, float32 weights",
                sum(w.num_bytes for w in pools[0]),
                2 * rows * 3 * HIDDEN * FFN,
            )


def moe_cases() -> Iterator[Case]:
    """64 experts of 256, six chosen, two shared: the peer multiplies with one expert at a time."""
    gate_up = torch.randn(EXPERTS, 2 * INNER, HIDDEN) / 32
    down = torch.randn(EXPERTS, HIDDEN, INNER) / 16
    shared = torch.randn(4 * INNER, HIDDEN) / 32, torch.randn(HIDDEN, 2 * INNER) / 23
    router, bias, norm = torch.randn(EXPERTS, HIDDEN) / 32, torch.zeros(EXPERTS), torch.ones(HIDDEN)

    def expert(y: torch.Tensor, wide: torch.Tensor, narrow: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(y, wide).chunk(2, 1)
        return F.linear(F.silu(gate) * up, narrow)

    def plain(x: torch.Tensor) -> torch.Tensor:
        y = F.rms_norm(x, (HIDDEN,), norm, EPS)
        weights, chosen = F.linear(y, router).softmax(-1).topk(TOP)
        weights /= weights.sum(-1, keepdim=True)
        out = x + expert(y, *shared)
        for e in chosen.unique().tolist():
            token, choice = (chosen == e).nonzero(as_tuple=True)
            share = expert(y[token], gate_up[e], down[e]) * weights[token, choice, None]
            out.index_add_(0, token, share)
        return out

    def ours(x: torch.Tensor, *weights) -> torch.Tensor:
        options = {"top_k": TOP, "norm_min": 1e-12, "norm": (norm, EPS), "residual_TD": x}
        return ops.moe(x, router, bias, *weights, **options)

    for name in FORMATS:
        banks = list(zip(pool(gate_up, name, 2), pool(down, name)))
        both = pool(shared[0], name, 2)[0], pool(shared[1], name)[0]
        for rows in (1, 4, 16, 512):
            # Other rows each time, or the chosen experts would stay in the cache.
            inputs = [torch.randn(rows, HIDDEN) for _ in range(17)]
            own, xs, peer_xs = cycle(banks), cycle(inputs), cycle(inputs)
            logits = [F.rms_norm(x, (HIDDEN,)) @ router.T for x in inputs]
            used = sum(len(one.topk(TOP).indices.unique()) for one in logits) / len(inputs)
            expert_bytes = sum(w.num_bytes for w in banks[0]) / EXPERTS
            yield Case(
                f"moe {name}, norm and residual, {rows} rows",
                lambda xs=xs, own=own, both=both: ours(next(xs), *next(own), both),
                lambda xs=peer_xs: plain(next(xs)),
                "the same in F.linear, float32 weights",
                used * expert_bytes + sum(w.num_bytes for w in both) + 4 * router.numel(),
                2 * rows * HIDDEN * (3 * INNER * (TOP + 2) + EXPERTS),
            )


FUSED_CASES = (project_cases, mlp_cases, moe_cases)
