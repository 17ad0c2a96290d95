"""Compiles every GPU kernel for an H100 where there is none; run by test_gpu_compile.py.

The operations are called with tensors on the CPU and the launch is replaced by the compiler, which
gets the same arguments. Prints a line for each variant: kernel, bytes of stack, bytes of shared
memory.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from ernie import kernels
from ernie.kernels.gpu import experts as experts_of_gpu
from ernie.kernels.gpu import language, ops, products, rows
from ernie.kernels.weights import QuantTensor

BF16, I8 = torch.bfloat16, torch.int8
POINTERS = {
    BF16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32",
    torch.float64: "*fp64", torch.float8_e4m3fn: "*fp8e4nv",
    I8: "*i8", torch.uint8: "*u8", torch.bool: "*i1", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "num_ctas", "launch_pdl", "enable_fp_fusion")
seen: set[str] = set()


def compiled(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """Stands in for `JITFunction.run`."""
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    bound = inspect.signature(kernel.fn).bind(*args, **kwargs).arguments
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, bound[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        is_tensor = isinstance(value, torch.Tensor)
        scalar = "fp32" if isinstance(value, float) else "i32"
        signature[name] = POINTERS[value.dtype] if is_tensor else scalar
        is_special = isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize
        if is_tensor or is_special:
            attributes[(i,)] = [["tt.divisibility", 16]]
    key = str((kernel.fn.__name__, signature, constants, attributes, options))
    if key in seen:
        return
    seen.add(key)
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", 90, 32)
    binary = triton.compile(source, target=target, options=options)
    print(kernel.fn.__name__, stack_bytes(binary.asm["cubin"]), binary.metadata.shared, flush=True)


def stack_bytes(cubin: bytes) -> int:
    """Bytes of memory that a thread needs beside its registers: those that did not fit."""
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return sum(map(int, re.findall(r"STACK:(\d+)", done.stdout)))


def tried(kernel: Autotuner, *args: Any, **kwargs: Any) -> None:
    """Stands in for `Autotuner.run`: one of the configs for few rows, or one for many."""
    config = rows.ALL[-1]
    if "BLOCK_T" in kwargs:
        config = (products.FEW if kwargs["BLOCK_T"] <= 64 else products.MANY)[0]
    kernel.fn.run(*args, **{**kwargs, **config.all_kwargs()})


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(BF16)


def weight(bits: int, *shape: int) -> products.PackedWeight:
    if not bits:
        return products.pack(rand(*shape))
    *outer, width = shape
    data = torch.zeros(*outer, width * bits // 8, dtype=I8 if bits == 8 else torch.uint8)
    groups = torch.ones(*outer, width // 32, dtype=I8) if bits == 4 else None
    return products.pack(QuantTensor(bits, data, torch.ones(*outer), groups, width))


def main() -> None:
    """The shapes of ERNIE-4.5-21B-A3B, with fewer experts."""
    JITFunction.run, Autotuner.run = compiled, tried
    language.OVERLAPS = tl.constexpr(True)
    experts_of_gpu.grouped_mm = None  # torch's, which would take the place of kernels of ours
    hidden, heads, groups, width, size, experts = 2560, 20, 4, 128, 1536, 8
    x, norm = rand(3, hidden).requires_grad_(), rand(hidden).requires_grad_()
    ops.rms_norm(x, norm, 1e-5).sum().backward()
    ops.swiglu(rand(3, size).requires_grad_(), rand(3, size)).sum().backward()
    ops.swiglu_halves(rand(3, 2 * size).requires_grad_()).sum().backward()
    ops.rotate_(rand(3, heads + groups, width), torch.ones(3, 64), torch.ones(3, 64))
    tables, lens = torch.zeros(3, 32, dtype=torch.int32), torch.ones(3, dtype=torch.int32)
    for row, dtype in ((width, BF16), (width + 4, I8)):
        cache = torch.zeros(4, 64, groups, row, dtype=dtype)
        for tokens in (3, 300):
            bounds = torch.tensor([0, 1, 2, tokens], dtype=torch.int32)
            new = (rand(tokens, groups, width), rand(tokens, groups, width), torch.arange(tokens))
            q = rand(tokens, heads, width)
            ops.attend_paged(q, cache, cache, tables, bounds, lens, 0.1, new)
    router, bias = torch.ones(experts, hidden), torch.zeros(experts)
    for bits in (0, 8, 4):
        gate_up = weight(bits, experts, 2 * size, hidden)
        down = weight(bits, experts, hidden, size)
        for tokens in (1, 11, 400):
            x = rand(tokens, hidden)
            settings = {"top_k": 6, "norm_min": 1e-12, "residual_TD": x}
            ops.moe(x, router, bias, gate_up, down, None, **settings)
            ops.project(x, weight(bits, 3584, hidden))
        ops.project(rand(900, hidden), weight(bits, 3584, hidden))
    x = rand(800, hidden).requires_grad_()
    ops.grouped_linear(x, rand(8, 512, hidden), torch.full((8,), 100)).sum().backward()
    experts_and_back(x.detach(), experts)
    update()
    draws()
    with_fixed_tiles(heads, groups, width, hidden)
    for dtype in (BF16, torch.float32):
        ops.cross_entropy_(torch.ones(2, 103424, dtype=dtype), torch.zeros(2).long(), 0.5)


def draws() -> None:
    """Tokens of a batch that has every setting, and of one that has none."""
    logits, one = torch.ones(3, 103424), torch.ones(3, dtype=torch.float64)
    ops.draw(logits, one, one * 0, one.long(), one / 2, one / 2)
    ops.draw(logits, one, one * 0, one.long() * 0, one, one / 2)
    ops.token_logprobs(logits, torch.zeros(3, dtype=torch.int64))


def with_fixed_tiles(heads: int, groups: int, width: int, hidden: int) -> None:
    """What `batch_invariant` alone uses: a router's product, and attention of few and many."""
    kernels.batch_invariant(True, "cuda")
    ops.project(torch.ones(3, hidden), products.pack(torch.ones(64, hidden)))
    for bits in (0, 8, 4):
        ops.mlp(rand(3, hidden), weight(bits, 3072, hidden), weight(bits, hidden, 1536))
    cache, ints = rand(4, 64, groups, width), torch.ones(2, dtype=torch.int32)
    ops.attend_paged(rand(3, heads, width), cache, cache, ints.view(1, 2), ints, ints[:1], 0.1)
    kernels.batch_invariant(False)


def experts_and_back(x: torch.Tensor, experts: int) -> None:
    """Rows of pairs and their weighted sums."""
    chosen = torch.arange(len(x) * 6).view(-1, 6) % experts
    order, place = (
        torch.zeros(shape, dtype=torch.int32) for shape in (chosen.numel(), (len(x), 6))
    )
    ops.sort_pairs(chosen, experts)
    rows, weights = ops.spread(x, order, 6), torch.ones(len(x), 6)
    ops.combine(rows, place)
    ops.combine(rows, place, weights)
    ops.combine_backward(x, rows, weights, order)


def update() -> None:
    """Optimizer steps of a bfloat16 parameter."""
    step = kernels.AdamWUpdate(1e-3, 0.9, 0.95, 1e-8, 0.1, step=3, seed=5)
    weights, scales = torch.ones(4096), torch.ones(2, 16)
    for moments in (torch.ones(4096), rand(4096)):
        ops.adamw_step(weights, rand(4096), moments, moments, step, rand(4096))
    codes = torch.zeros(4096, dtype=I8), torch.zeros(4096, dtype=torch.uint8)
    for weight in (rand(64, 2048), rand(2, 64, 2048).mT):
        ops.quantize_fp8(weight)
    ops.float32_sum(rand(4096), rand(4096).bfloat16())
    ops.adamw_8bit_step(weights, rand(4096), *codes, scales, step, rand(4096))


if __name__ == "__main__":
    main()
