"""Attention on a GPU: paged by kernels of our own, packed rows by torch's.

    sequences with few new tokens     (sequence, key/value head, piece of its keys), then combined
    sequences with many               (tile of queries, key/value head), flash style

A step may hold both kinds, and only the device knows who is which: with enough tokens for both,
both kernels are started and each passes over the other's sequences. The query heads of a group
stand in one tile, so a key is read once for all of them. How a sequence is cut into pieces depends
on its own length alone, so a decoded token's bits do not depend on its neighbours.

Legend: T tokens, H query heads, G key/value heads, d head width, S sequences, M blocks of the
longest table, B blocks of the cache, P positions of a block, r elements of a cached row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ernie.kernels.dispatch import is_batch_invariant
from ernie.kernels.gpu.language import converted, dot, overlapped, rows_of, wait
from ernie.kernels.gpu.pointwise import scales_of, write_cache

FEW_ROWS = 16  # of a tile (tokens x heads of a group) in which new tokens count as few
MANY_ROWS = 128  # of a tile of a sequence with many
FIXED_ROWS = 64  # of every tile with `batch_invariant`
MIN_PIECE = tl.constexpr(128)  # keys of a piece at least
MAX_PIECES = tl.constexpr(32)  # pieces of a sequence at most
KEYS = tl.constexpr(64)  # keys of one step
LONG = 2048  # tokens of a segment, from which on its shape is worth a plan of its own
LONG_STEP = 1024  # multiples of this are such shapes


def attend_paged(
    q_THd: Tensor,
    k_cache_BPGr: Tensor,
    v_cache_BPGr: Tensor,
    tables_SM: Tensor,
    cu_seqlens_S1: Tensor,
    lens_S: Tensor,
    scale: float,
    new: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    if new is not None:
        write_cache(new[0], new[1], k_cache_BPGr, v_cache_BPGr, new[2])
    caches = (k_cache_BPGr, v_cache_BPGr, scales_of(k_cache_BPGr), scales_of(v_cache_BPGr))
    q, num_sequences = rows_of(q_THd), len(lens_S)
    out = q.new_empty(q.shape)
    if not len(q):
        return out
    group = q.shape[1] // k_cache_BPGr.shape[2]
    few_tokens = max(1, FEW_ROWS // group)
    args = (q, caches, tables_SM.contiguous(), cu_seqlens_S1, lens_S, scale)
    if is_batch_invariant():
        _attend_many(*args, out, 1, FIXED_ROWS)
    elif len(q) <= few_tokens * num_sequences:
        _attend_few(*args, out, None)
    else:
        _attend_few(*args, out, few_tokens)
        _attend_many(*args, out, few_tokens + 1, MANY_ROWS)
    return out


def attend_packed(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    cu_seqlens_S1: Tensor,
    scale: float,
    lengths: Sequence[int] | None = None,
    *,
    causal: bool = True,
) -> Tensor:
    """torch's attention: for long segments that are all alike, over segments of any lengths where
    it has one, else one call for each segment, which waits for the device."""
    lengths = (len(q_THd),) if len(cu_seqlens_S1) == 2 else lengths
    if lengths and lengths[0] >= LONG and len(set(lengths)) == 1:
        return _attend_alike(q_THd, k_TGd, v_TGd, len(lengths), scale, causal)
    attend = _varlen()
    if attend is None or q_THd.dtype == torch.float32 or q_THd.device.type != "cuda":
        return _attend_segments(q_THd, k_TGd, v_TGd, cu_seqlens_S1, scale, causal)
    longest = max(lengths) if lengths else len(q_THd)
    return attend(q_THd, k_TGd, v_TGd, cu_seqlens_S1, longest, scale, causal)


@cache
def _varlen() -> Callable[..., Tensor] | None:
    """torch's varlen_attn in our terms; None where it is missing or cannot do what we need."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return adapted_varlen(varlen_attn)


def adapted_varlen(varlen_attn: Callable) -> Callable[..., Tensor] | None:
    known = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= set(known):
        return None
    # Versions without the switch take fewer key/value heads as they are.
    settings = {"enable_gqa": True} if "enable_gqa" in known else {}

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        longest: int,
        scale: float,
        causal: bool,
    ) -> Tensor:
        return varlen_attn(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest,
            scale=scale, window_size=(-1, 0 if causal else -1), **settings,
        )  # fmt: skip

    return attend


def _attend_segments(
    q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, cu_seqlens_S1: Tensor, scale: float, causal: bool
) -> Tensor:
    sizes = cu_seqlens_S1.diff().tolist()
    parts = zip(q_THd.split(sizes), k_TGd.split(sizes), v_TGd.split(sizes))
    return torch.cat([_attend_alike(q, k, v, 1, scale, causal) for q, k, v in parts])


def _attend_alike(
    q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, num_segments: int, scale: float, causal: bool
) -> Tensor:
    """Segments of one length, as the batch of torch's attention: cuDNN's, where that is fastest.

    It makes a plan for each length that it meets, so long ones are filled up to few different ones,
    where no token looks at what comes after it.
    """
    length = len(q_THd) // num_segments
    missing = -length % LONG_STEP if causal and length >= LONG else 0
    q, k, v = (
        x.unflatten(0, (num_segments, length)).transpose(1, 2) for x in (q_THd, k_TGd, v_TGd)
    )
    if missing:  # by nothing, `pad` copies
        q, k, v = (F.pad(x, (0, 0, 0, missing)) for x in (q, k, v))
    is_grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=scale, enable_gqa=is_grouped
    )
    return out[:, :, :length].transpose(1, 2).flatten(0, 1)


def _attend_few(
    q: Tensor, caches: tuple, tables: Tensor, cu_seqlens: Tensor, lens: Tensor,
    scale: float, out: Tensor, most_tokens: int | None,
) -> None:  # fmt: skip
    num_tokens, num_heads, width = q.shape
    positions, num_groups = caches[0].shape[1:3]
    group, longest = num_heads // num_groups, tables.shape[1] * positions
    num_pieces = min(MAX_PIECES.value, max(1, triton.cdiv(longest, MIN_PIECE.value)))
    # Partial results stand in the order of tokens, or, where most tokens are not ours, by sequence.
    num_rows = num_tokens if most_tokens is None else len(lens) * most_tokens
    partial = (num_rows, num_heads, num_pieces)
    sums = q.new_empty(*partial, width, dtype=torch.float32)
    tops = q.new_empty(*partial, dtype=torch.float32)
    weights = torch.empty_like(tops)
    _pieces[(len(lens), num_groups, num_pieces)](
        q, *caches, tables, cu_seqlens, lens, sums, tops, weights,
        scale, q.stride(0), tables.shape[1], positions, num_heads, num_groups, width,
        MOST_TOKENS=most_tokens, GROUP=group, ROWS=max(FEW_ROWS, _power_of_2(group)),
        WIDTH=max(16, _power_of_2(width)), num_warps=4, num_stages=3,
    )  # fmt: skip
    _combine[(len(lens), num_heads)](
        sums, tops, weights, cu_seqlens, lens, out, num_heads, width, num_pieces,
        MOST_TOKENS=most_tokens, WIDTH=_power_of_2(width), PIECES=_power_of_2(num_pieces),
        num_warps=4,
    )  # fmt: skip


def _attend_many(
    q: Tensor, caches: tuple, tables: Tensor, cu_seqlens: Tensor, lens: Tensor,
    scale: float, out: Tensor, least_tokens: int, tile_rows: int,
) -> None:  # fmt: skip
    num_tokens, num_heads, width = q.shape
    positions, num_groups = caches[0].shape[1:3]
    group, num_sequences = num_heads // num_groups, len(lens)
    rows = max(tile_rows, _power_of_2(group))
    # Each sequence begins a tile of its own: no more tiles than this, and the rest stop at once.
    most_tiles = num_tokens // (rows // group) + num_sequences
    _tiles[(most_tiles, num_groups)](
        q, *caches, tables, cu_seqlens, lens, out,
        num_sequences, least_tokens, scale, q.stride(0), tables.shape[1], positions, num_heads,
        num_groups, width,
        GROUP=group, ROWS=rows, WIDTH=max(16, _power_of_2(width)), num_warps=rows // 16,
        # Fused, a product would be rounded in steps with a mask and not in those without.
        num_stages=3, enable_fp_fusion=not is_batch_invariant(),
    )  # fmt: skip


_power_of_2 = triton.next_power_of_2


@triton.jit
def _piece_size(length):
    """Keys of one piece of a sequence: whole steps, and pieces enough for its length."""
    return tl.maximum(MIN_PIECE, tl.cdiv(tl.cdiv(length, MAX_PIECES), KEYS) * KEYS)


@triton.jit
def _look(
    q, limit, first, seen_by_all, end, k_cache, v_cache, k_scales, v_scales, table, scale, group,
    positions: tl.constexpr, num_groups: tl.constexpr, width: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Softmax attention of a tile of queries over keys first .. end - 1, row r below `limit[r]`.

    No limit is below `seen_by_all`: steps up to there need no mask. Returns the weighted sum of
    values, the largest score (to base 2) and the sum of weights.
    """
    top = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    to_base_2 = scale * 1.4426950408889634
    whole = tl.maximum(first, tl.minimum(seen_by_all, end) // KEYS * KEYS)
    for begin in range(first, whole, KEYS):
        total, top, weight = _look_step(
            q, limit, begin, end, total, top, weight, k_cache, v_cache, k_scales, v_scales, table,
            to_base_2, group, positions, num_groups, width, WIDTH, False,
        )  # fmt: skip
    for begin in range(whole, end, KEYS):
        total, top, weight = _look_step(
            q, limit, begin, end, total, top, weight, k_cache, v_cache, k_scales, v_scales, table,
            to_base_2, group, positions, num_groups, width, WIDTH, True,
        )  # fmt: skip
    return total, top, weight


@triton.jit
def _look_step(
    q, limit, begin, end, total, top, weight, k_cache, v_cache, k_scales, v_scales, table,
    to_base_2, group, positions: tl.constexpr, num_groups: tl.constexpr, width: tl.constexpr,
    WIDTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The next KEYS keys, from `begin` on, which is a multiple of KEYS."""
    # A row of an int8 cache ends with its scale; the products are with the integers themselves.
    size: tl.constexpr = width if k_scales is None else width + 4
    at = tl.arange(0, WIDTH)
    step = tl.arange(0, KEYS)
    key = begin + step
    there = key < end if MASKED else step >= 0
    if (
        tl.constexpr(positions) % KEYS == 0
    ):  # one block holds them all, and its address is one number
        block = tl.load(table + begin // positions).to(tl.int64)
        row = (block * positions + begin % positions + step) * num_groups + group
    else:
        block = tl.load(table + key // positions, there, 0).to(tl.int64)
        row = (block * positions + key % positions) * num_groups + group
    k_at = k_cache + row[None, :] * size + at[:, None]
    v_at = v_cache + row[:, None] * size + at[None, :]
    if MASKED or width != WIDTH:
        k = tl.load(k_at, there[None, :] & (at[:, None] < width), 0.0)
        v = tl.load(v_at, there[:, None] & (at[None, :] < width), 0.0)
    else:
        k = tl.load(k_at)
        v = tl.load(v_at)
    none = tl.zeros([q.shape[0], KEYS], tl.float32)
    scores = dot(q, converted(k, q.dtype), none) * to_base_2
    if k_scales is not None:
        scores *= tl.load(k_scales + (row + 1) * (size // 4) - 1, there, 0.0)[None, :]
    if MASKED:
        scores = tl.where(key[None, :] < limit[:, None], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    base = new_top
    if MASKED:  # a row that has seen no key yet has no largest score; 0 gives weights of 0
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
    shrink = tl.exp2(top - base)
    weights = tl.exp2(scores - base[:, None])
    weight = weight * shrink + tl.sum(weights, 1)
    if v_scales is not None:
        weights *= tl.load(v_scales + (row + 1) * (size // 4) - 1, there, 0.0)[None, :]
    total = dot(weights.to(q.dtype), converted(v, q.dtype), total * shrink[:, None])
    return total, new_top, weight


@overlapped
@triton.jit
def _pieces(
    q, k_cache, v_cache, k_scales, v_scales, tables, cu_seqlens, lens, sums, tops, weights,
    scale, q_stride, table_stride, positions: tl.constexpr, num_heads: tl.constexpr,
    num_groups: tl.constexpr, width: tl.constexpr,
    MOST_TOKENS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One piece of the keys of one sequence, for the heads of one group; unnormalised."""
    wait()
    sequence, group, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(cu_seqlens + sequence)
    num_tokens = tl.load(cu_seqlens + sequence + 1) - begin
    length = tl.load(lens + sequence)
    size = _piece_size(length)
    first = piece * size
    if first >= length:
        return
    place_0 = begin
    if MOST_TOKENS is not None:
        if num_tokens > MOST_TOKENS:
            return
        place_0 = sequence * MOST_TOKENS
    end, before = tl.minimum(first + size, length), length - num_tokens
    lane, at = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    table = tables + sequence.to(tl.int64) * table_stride
    for token in range(0, num_tokens, ROWS // GROUP):
        own = token + lane // GROUP
        head = group * GROUP + lane % GROUP
        there = (own < num_tokens) & (lane < (ROWS // GROUP) * GROUP)
        here = there[:, None] & (at[None, :] < width)
        row = (begin + own).to(tl.int64)
        q_rows = tl.load(
            q + row[:, None] * q_stride + head[:, None] * width + at[None, :], here, 0.0
        )
        total, top, weight = _look(
            q_rows, before + own + 1, first, before + token + 1, end, k_cache, v_cache,
            k_scales, v_scales, table, scale, group, positions, num_groups, width, ROWS, WIDTH,
        )  # fmt: skip
        place = ((place_0 + own).to(tl.int64) * num_heads + head) * tl.num_programs(2) + piece
        tl.store(sums + place[:, None] * width + at[None, :], total, here)
        tl.store(tops + place, top, there)
        tl.store(weights + place, weight, there)


@overlapped
@triton.jit
def _combine(
    sums, tops, weights, cu_seqlens, lens, out,
    num_heads: tl.constexpr, width: tl.constexpr, num_pieces,
    MOST_TOKENS: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """The pieces of one head of a sequence's tokens put together; zeros where there are no keys."""
    wait()
    sequence, head = tl.program_id(0), tl.program_id(1)
    begin = tl.load(cu_seqlens + sequence)
    num_tokens = tl.load(cu_seqlens + sequence + 1) - begin
    place_0 = begin
    if MOST_TOKENS is not None:
        if num_tokens > MOST_TOKENS:
            return
        place_0 = sequence * MOST_TOKENS
    length = tl.load(lens + sequence)
    used = tl.cdiv(length, _piece_size(length))
    piece, at = tl.arange(0, PIECES), tl.arange(0, WIDTH)
    for token in range(0, num_tokens):
        place = (tl.cast(place_0 + token, tl.int64) * num_heads + head) * num_pieces + piece
        top = tl.load(tops + place, piece < used, float("-inf"))
        largest = tl.max(top, 0)
        share = tl.exp2(top - tl.where(largest == float("-inf"), 0.0, largest))
        weight = tl.sum(share * tl.load(weights + place, piece < used, 0.0), 0)
        here = (piece[:, None] < used) & (at[None, :] < width)
        total = tl.load(sums + place[:, None] * width + at[None, :], here, 0.0)
        mean = tl.sum(total * share[:, None], 0) / tl.where(weight == 0.0, 1.0, weight)
        row = tl.cast(begin + token, tl.int64) * num_heads + head
        tl.store(out + row * width + at, mean, at < width)


@triton.jit(do_not_specialize=["num_sequences", "table_stride"])
def _tiles(
    q, k_cache, v_cache, k_scales, v_scales, tables, cu_seqlens, lens, out,
    num_sequences, least_tokens, scale, q_stride, table_stride, positions: tl.constexpr,
    num_heads: tl.constexpr, num_groups: tl.constexpr, width: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one sequence, for the heads of one group."""
    TOKENS: tl.constexpr = ROWS // GROUP
    tile, group = tl.program_id(0), tl.program_id(1)
    # Sequence s begins at tile `cu_seqlens[s] // TOKENS + s`: the last one that is not past ours.
    low, high = 0, num_sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(cu_seqlens + middle) // TOKENS + middle <= tile:
            low = middle
        else:
            high = middle - 1
    sequence = low
    begin = tl.load(cu_seqlens + sequence)
    num_tokens = tl.load(cu_seqlens + sequence + 1) - begin
    token = (tile - (begin // TOKENS + sequence)) * TOKENS
    if (num_tokens < least_tokens) | (token >= num_tokens):
        return
    length = tl.load(lens + sequence)
    lane, at = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    own = token + lane // GROUP
    head = group * GROUP + lane % GROUP
    there = (own < num_tokens) & (lane < TOKENS * GROUP)
    here = there[:, None] & (at[None, :] < width)
    row = (begin + own).to(tl.int64)
    q_rows = tl.load(q + row[:, None] * q_stride + head[:, None] * width + at[None, :], here, 0.0)
    before = length - num_tokens
    end = tl.minimum(before + token + TOKENS, length)
    total, _, weight = _look(
        q_rows, before + own + 1, 0, before + token + 1, end, k_cache, v_cache,
        k_scales, v_scales, tables + tl.cast(sequence, tl.int64) * table_stride, scale, group,
        positions, num_groups, width, ROWS, WIDTH,
    )  # fmt: skip
    mean = total / tl.where(weight == 0.0, 1.0, weight)[:, None]
    tl.store(out + (row * num_heads + head)[:, None] * width + at[None, :], mean, here)
