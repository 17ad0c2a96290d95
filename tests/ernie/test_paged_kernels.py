"""Attention over the paged cache, its formats and its writes, against their definition in
`ernie.kernels.reference` and against themselves in other company, on each instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ernie import kernels
from ernie.kernels import reference
from ernie.kernels.cpu import ops
from tests.ernie.test_kernels import angles, bounds, rand

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


def random_caches(
    dtype: torch.dtype, num_blocks: int, block_size: int, groups: int, width: int
) -> tuple[Tensor, Tensor]:
    """Keys and values of random rows."""
    row = kernels.cache_width(width, dtype)
    caches = tuple(torch.empty(num_blocks, block_size, groups, row, dtype=dtype) for _ in range(2))
    slots = torch.arange(num_blocks * block_size)
    reference.write_cache(*(rand(len(slots), groups, width) for _ in range(2)), *caches, slots)
    return caches


def some_tables(lens: Tensor, num_blocks: int, block_size: int) -> Tensor:
    tables = torch.randint(0, num_blocks, (len(lens), -(-int(lens.max()) // block_size) + 1))
    for s, length in enumerate(lens.tolist()):
        tables[s, -(-length // block_size) :] = 2**30  # never read
    return tables.int()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads, groups, width, positions",
    [(8, 2, 64, 16), (3, 1, 16, 5), (4, 4, 128, 1), (16, 1, 32, 4)],
)
def test_paged_attention_equals_its_definition(dtype, heads, groups, width, positions, isa):
    torch.manual_seed(0)
    lens = torch.tensor([1, 17, 700, 40, 300, 5, 257], dtype=torch.int32)
    cu_seqlens = bounds(1, 17, 1, 40, 16, 0, 3)
    q = rand(int(cu_seqlens[-1]), heads, width)
    caches = random_caches(dtype, 300, positions, groups, width)
    args = (*caches, some_tables(lens, 300, positions), cu_seqlens, lens, 0.2)
    ours = ops.attend_paged(q, *args)
    torch.testing.assert_close(ours, reference.attend_paged(q, *args), rtol=1e-5, atol=1e-5)
    assert torch.equal(ours, ops.attend_paged(q, *args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, groups", [(8, 1), (5, 1), (3, 3)])
def test_a_querys_bits_depend_on_its_own_sequence_only(dtype, heads, groups, isa):
    torch.manual_seed(0)
    length, width, new = 419, 32, 190
    k, v = random_caches(dtype, 1, length, groups, width)
    q = rand(new, heads, width)

    def attended(queries: slice, block_size: int, neighbours: int) -> Tensor:
        """The sequence in scattered blocks, between others, up to the last of `queries`."""
        num_blocks = -(-length // block_size)
        order = torch.randperm(num_blocks)
        caches = [torch.zeros(num_blocks, block_size, *c.shape[2:], dtype=dtype) for c in (k, v)]
        for blocks, cache in zip(caches, (k, v)):
            rows = torch.nn.functional.pad(cache[0], (0, 0, 0, 0, 0, -length % block_size))
            blocks[order] = rows.unflatten(0, (num_blocks, block_size))
        tables = order.expand(1 + 2 * neighbours, -1).int()
        end = length - new + queries.stop
        lens = torch.tensor([9] * neighbours + [end] + [33] * neighbours, dtype=torch.int32)
        counts = [1] * neighbours + [queries.stop - queries.start] + [33] * neighbours
        beside = rand(neighbours, heads, width), rand(33 * neighbours, heads, width)
        out = ops.attend_paged(
            torch.cat((beside[0], q[queries], beside[1])), *caches, tables, bounds(*counts), lens, 1
        )
        return out[neighbours : neighbours + counts[neighbours]]

    whole = attended(slice(0, new), 64, 0)
    for size, block_size, neighbours in ((1, 16, 0), (8, 64, 2), (13, 1, 0), (70, 6, 5)):
        parts = [
            attended(slice(i, min(i + size, new)), block_size, neighbours)
            for i in range(0, new, size)
        ]
        differs = (torch.cat(parts) != whole).sum()
        assert differs == 0, f"{size} at a time, blocks of {block_size}: {differs} values differ"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 20])
def test_cache_write_equals_its_definition(dtype, width, isa):
    torch.manual_seed(0)
    wide = rand(300, 2 * 2 * width) * torch.logspace(-9, 4.5, 300)[:, None]
    wide[3] = 0
    k, v = (part.unflatten(1, (2, width)) for part in wide.chunk(2, 1))
    slots = torch.randperm(400)[:300]
    slots[::7] = -1
    row = kernels.cache_width(width, dtype)
    ours, theirs = ([torch.zeros(80, 5, 2, row).to(dtype) for _ in range(2)] for _ in range(2))
    ops.write_cache(k, v, *ours, slots)
    reference.write_cache(k, v, *theirs, slots)
    for own, other in zip(ours, theirs):
        assert torch.equal(own.view(torch.uint8), other.view(torch.uint8))


def test_float16_rows_round_to_even_and_overflow_to_infinity(isa):
    halves = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).float()
    between = (halves[:-1] + halves[1:]) / 2
    x = torch.cat((halves, between, torch.tensor([65519.0, 65520.0, 1e9, float("inf")])))
    x = torch.cat((x, -x, torch.zeros(-2 * len(x) % 16)))
    caches = [torch.zeros(1, len(x) // 16, 1, 16, dtype=torch.float16) for _ in range(2)]
    rows = x.view(-1, 1, 16)
    ops.write_cache(rows, rows, *caches, torch.arange(len(rows)))
    assert torch.equal(caches[0].flatten(), x.half())


def test_int8_rows_are_within_half_a_step(isa):
    torch.manual_seed(0)
    x = rand(50, 3, 48)
    k, v = (torch.zeros(5, 10, 3, 52, dtype=torch.int8) for _ in range(2))
    ops.write_cache(x, x, k, v, torch.arange(50))
    found = reference._cached_values(k).flatten(0, 1)
    step = x.abs().amax(-1, keepdim=True) / 127
    assert float(((found - x).abs() / step).max()) <= 0.5001
    torch.testing.assert_close(found.abs().amax(-1), x.abs().amax(-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [32, 12])
def test_new_rows_are_stored_before_anything_is_read(dtype, width, isa):
    torch.manual_seed(0)
    lens, cu_seqlens = torch.tensor([40, 9], dtype=torch.int32), bounds(20, 1)
    tables = torch.arange(10).view(2, 5).int()
    q, k, v = (
        part.unflatten(1, (-1, width))
        for part in rand(21, 8 * width).split([4 * width] + 2 * [2 * width], 1)
    )
    slots = torch.cat((torch.arange(20, 40), torch.tensor([48])))
    slots[4] = -1
    one, two = random_caches(dtype, 10, 8, 2, width), random_caches(dtype, 10, 8, 2, width)
    for a, b in zip(one, two):
        b.copy_(a)
    together = ops.attend_paged(q, *one, tables, cu_seqlens, lens, 0.3, (k, v, slots))
    ops.write_cache(k, v, *two, slots)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(one, two))
    assert torch.equal(together, ops.attend_paged(q, *two, tables, cu_seqlens, lens, 0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_in_place_touches_its_own_columns(dtype, isa):
    torch.manual_seed(0)
    qkv = rand(9, 8 * 20, dtype=dtype)
    before, turn = qkv.clone(), angles(9, 20)
    ops.rotate_(qkv[:, : 6 * 20].unflatten(1, (6, 20)), *turn)
    assert torch.equal(qkv[:, 6 * 20 :], before[:, 6 * 20 :])
    expected = ops.rotate(before[:, : 6 * 20].unflatten(1, (6, 20)), *turn)
    assert torch.equal(qkv[:, : 6 * 20], expected.flatten(1))
