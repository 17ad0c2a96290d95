"""Draws on a GPU without a sort: what is kept of a vocabulary is found by its rank, digit by digit.

    tops      the largest logit of each chunk of a row
    search    where `top_k` ends, then where `top_p` does, each in 7 rounds of 16 bins:
                  rank of a token    28 bits: how far it is below the likeliest
                  bins of a round    tokens that agree with the boundary so far, by their next digit
                  boundary           the first digit with enough tokens (or enough mass) up to it
              then the last token of that very rank which is still kept, by id
    weigh     the mass of what is kept, chunk by chunk
    draw      the chunk and then the token in which the cumulated mass passes the uniform number

Every kernel takes (row, chunk), and what chunks must know of each other goes through memory from
one kernel to the next. Ranks and masses are the integers of `reference.draw_masses`, made anew in
each round: sums have no order, rounds agree, and the host waits for nothing. From the third round
on a chunk rarely has a token that is still in question, and is passed over at the price of reading
it.

Legend: R rows of logits, V vocabulary, C chunks of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ernie.kernels.gpu.language import rows_of
from ernie.kernels.reference import MOST_TOKENS, RANKS_PER_NAT, SUREST, draw_scales
from ernie.kernels.transfer import moved

CHUNK = 4096  # columns of a row that one program takes
ROUNDS = 7
BINS = tl.constexpr(16)
BITS = tl.constexpr(4)  # of a rank that a round decides
NEVER = tl.constexpr(1 << 28)  # above the rank of every token that can be drawn
PER_NAT = tl.constexpr(RANKS_PER_NAT)
LIKELIEST = tl.constexpr(SUREST)
STATE = tl.constexpr(4)  # of a search: the digits found, what lies below them, what is enough
# Rows of the settings.
SCALE, LIMIT, TOP_K, TOP_P, UNIFORM = (tl.constexpr(i) for i in range(5))


def draw(
    logits_RV: Tensor,
    temperature_R: Tensor,
    min_p_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    uniform_R: Tensor,
) -> Tensor:
    logits, (num_rows, width) = rows_of(logits_RV), logits_RV.shape
    assert width <= MOST_TOKENS, f"{width} columns; sums of more than {MOST_TOKENS} overflow"
    tokens_R = logits.new_empty(num_rows, dtype=torch.int64)
    if not num_rows:
        return tokens_R
    columns = (*draw_scales(temperature_R, min_p_R), top_k_R, top_p_R, uniform_R)
    settings_5R = moved(torch.stack([x.double() for x in columns]), logits.device)
    num_chunks = triton.cdiv(width, CHUNK)
    grid = (num_rows, num_chunks)
    tops_RC = logits.new_empty(grid, dtype=torch.float32)
    _tops[grid](logits, tops_RC, logits.stride(0), width, CHUNK, num_warps=8)
    row = (logits, tops_RC, settings_5R, logits.stride(0), width, num_chunks)
    sizes = {"CHUNKS": triton.next_power_of_2(num_chunks), "BLOCK": CHUNK, "num_warps": 8}
    cuts_R2 = None
    if bool((top_k_R > 0).any()):
        cuts_R2 = _found_cuts(row, grid, None, True, sizes)
    if bool((top_p_R < 1).any()):
        cuts_R2 = _found_cuts(row, grid, cuts_R2, False, sizes)
    masses_RC = logits.new_empty(grid, dtype=torch.int64)
    _weigh[grid](*row, cuts_R2, masses_RC, **sizes)
    _draw[(num_rows,)](*row, cuts_R2, masses_RC, tokens_R, **sizes)
    return tokens_R


def token_logprobs(logits_RV: Tensor, tokens_R: Tensor) -> Tensor:
    logits, (num_rows, width) = rows_of(logits_RV), logits_RV.shape
    logprobs_R = logits.new_empty(num_rows, dtype=torch.float32)
    if num_rows:
        _token_logprobs[(num_rows,)](
            logits, tokens_R, logprobs_R, logits.stride(0), width, CHUNK, num_warps=8
        )
    return logprobs_R


def _found_cuts(
    row: tuple, grid: tuple[int, int], cuts_R2: Tensor | None, by_count: bool, sizes: dict
) -> Tensor:
    """For each row the rank of the last tokens that are kept, and the last id of those of that very
    rank; int64. `cuts` are those of a search before."""
    logits = row[0]
    sums = logits.new_empty(2, *grid, BINS.value, dtype=torch.int64)
    states = logits.new_empty(2, grid[0], STATE.value, dtype=torch.int64)
    for i in range(ROUNDS):
        new, old = i % 2, (i + 1) % 2
        _bins[grid](
            *row, cuts_R2, sums[old], states[old], sums[new], states[new],
            BITS.value * (ROUNDS - 1 - i), FIRST=i == 0, BY_COUNT=by_count, **sizes,
        )  # fmt: skip
    found_R2 = logits.new_empty(grid[0], 2, dtype=torch.int64)
    last = (ROUNDS - 1) % 2
    _cut[(grid[0],)](*row, cuts_R2, sums[last], states[last], found_R2, BY_COUNT=by_count, **sizes)
    return found_R2


@triton.jit
def _largest(x):
    """The largest number, or none where one of them is none."""
    is_none = tl.max((x != x).to(tl.int32), 0) > 0
    return tl.where(is_none, float("nan"), tl.max(x, 0))


@triton.jit
def _tops(logits, tops, stride, width, BLOCK: tl.constexpr):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * stride + at, at < width, float("-inf")).to(tl.float32)
    tl.store(tops + row * tl.num_programs(1) + chunk, _largest(x))


@triton.jit
def _chunk(
    logits, tops, settings, stride, width, num_chunks, cuts, row, num_rows, chunk,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Ids, ranks and masses of a chunk's tokens; NEVER and 0 for those that earlier cuts drop."""
    c = tl.arange(0, CHUNKS)
    largest = _largest(tl.load(tops + row * num_chunks + c, c < num_chunks, float("-inf")))
    scale = tl.load(settings + SCALE * num_rows + row).to(tl.float32)
    limit = tl.load(settings + LIMIT * num_rows + row).to(tl.float32)
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * stride + at, at < width, float("-inf")).to(tl.float32)
    distance = (largest - x) * scale
    is_in = distance <= limit
    rank = (tl.where(is_in, distance, 0.0) * PER_NAT).to(tl.int32)
    if cuts is not None:
        last, last_id = tl.load(cuts + row * 2), tl.load(cuts + row * 2 + 1)
        is_in = is_in & ((rank < last) | ((rank == last) & (at <= last_id)))
    mass = (tl.exp(-tl.where(is_in, distance, 0.0)) * LIKELIEST).to(tl.int64)
    return at, tl.where(is_in, rank, NEVER), tl.where(is_in, mass, 0)


@triton.jit
def _takes_part(settings, row, num_rows, BY_COUNT: tl.constexpr):
    if BY_COUNT:
        return tl.load(settings + TOP_K * num_rows + row) > 0
    return tl.load(settings + TOP_P * num_rows + row) < 1


@triton.jit
def _boundary(
    settings, sums, states, num_chunks, row, num_rows, BY_COUNT: tl.constexpr, CHUNKS: tl.constexpr
):
    """After a round: the digits found, what lies below them, and what is enough."""
    digits, below = tl.load(states + row * STATE), tl.load(states + row * STATE + 1)
    enough = tl.load(states + row * STATE + 2)
    c, bin = tl.arange(0, CHUNKS), tl.arange(0, BINS)
    place = (row * num_chunks + c[:, None]) * BINS + bin[None, :]
    totals = tl.sum(tl.load(sums + place, (c < num_chunks)[:, None], 0), 0)
    if not BY_COUNT:  # the first round has the mass of all
        whole = tl.sum(totals, 0)
        share = tl.load(settings + TOP_P * num_rows + row) * whole.to(tl.float64)
        wanted = tl.maximum(tl.ceil(share).to(tl.int64), 1)
        enough = tl.where(enough < 0, tl.minimum(wanted, whole), enough)
    is_short = below + tl.cumsum(totals, 0) < enough
    digit = tl.minimum(tl.sum(is_short.to(tl.int32), 0), BINS - 1)
    below += tl.sum(tl.where(bin < digit, totals, 0), 0)
    return digits * BINS + digit, below, enough, digit


@triton.jit(do_not_specialize=["shift"])
def _bins(
    logits, tops, settings, stride, width, num_chunks, cuts, old_sums, old_states, sums, states,
    shift, FIRST: tl.constexpr, BY_COUNT: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One round: tokens, or their mass, by the digit of their rank that begins at bit `shift`."""
    row, chunk, num_rows = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(0)
    if not _takes_part(settings, row, num_rows, BY_COUNT):
        return
    digits, below, enough = tl.cast(0, tl.int64), tl.cast(0, tl.int64), tl.cast(-1, tl.int64)
    if FIRST:
        if BY_COUNT:
            enough = tl.load(settings + TOP_K * num_rows + row).to(tl.int64)
    else:
        digits, below, enough, _ = _boundary(
            settings, old_sums, old_states, num_chunks, row, num_rows, BY_COUNT, CHUNKS
        )
    if chunk == 0:
        tl.store(states + row * STATE, digits)
        tl.store(states + row * STATE + 1, below)
        tl.store(states + row * STATE + 2, enough)
    _, rank, mass = _chunk(
        logits, tops, settings, stride, width, num_chunks, cuts, row, num_rows, chunk, CHUNKS, BLOCK
    )
    is_open = (rank >> shift) // BINS == digits
    bin = tl.arange(0, BINS)
    totals = tl.zeros([BINS], tl.int64)
    if tl.max(is_open.to(tl.int32), 0) > 0:
        digit = tl.where(is_open, (rank >> shift) % BINS, BINS)
        for b in tl.static_range(BINS):
            if BY_COUNT:
                total = tl.sum((digit == b).to(tl.int32), 0).to(tl.int64)
            else:
                total = tl.sum(tl.where(digit == b, mass, 0), 0)
            totals = tl.where(bin == b, total, totals)
    tl.store(sums + (row * num_chunks + chunk) * BINS + bin, totals)


@triton.jit
def _cut(
    logits, tops, settings, stride, width, num_chunks, cuts, sums, states, found,
    BY_COUNT: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The end of a search: of the tokens of the last rank, the chunk and then the id of the last
    one before which there is not enough."""
    row, num_rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    if not _takes_part(settings, row, num_rows, BY_COUNT):
        last, last_id = tl.cast(NEVER, tl.int64), tl.cast(0, tl.int64)
        if cuts is not None:
            last, last_id = tl.load(cuts + row * 2), tl.load(cuts + row * 2 + 1)
        tl.store(found + row * 2, last)
        tl.store(found + row * 2 + 1, last_id)
        return
    last, below, enough, digit = _boundary(
        settings, sums, states, num_chunks, row, num_rows, BY_COUNT, CHUNKS
    )
    c = tl.arange(0, CHUNKS)
    ties = tl.load(sums + (row * num_chunks + c) * BINS + digit, c < num_chunks, 0)
    is_short = below + tl.cumsum(ties, 0) < enough
    chunk = tl.minimum(tl.sum(is_short.to(tl.int32), 0), num_chunks - 1)
    below += tl.sum(tl.where(c < chunk, ties, 0), 0)
    at, rank, mass = _chunk(
        logits, tops, settings, stride, width, num_chunks, cuts, row, num_rows, chunk, CHUNKS, BLOCK
    )
    own = mass
    if BY_COUNT:
        own = tl.full([BLOCK], 1, tl.int64)
    own = tl.where(rank == last, own, 0)
    is_kept = (rank == last) & (below + tl.cumsum(own, 0) - own < enough)
    tl.store(found + row * 2, last)
    tl.store(found + row * 2 + 1, tl.max(tl.where(is_kept, at, 0), 0).to(tl.int64))


@triton.jit
def _weigh(
    logits, tops, settings, stride, width, num_chunks, cuts, masses,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, chunk, num_rows = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(0)
    _, _, mass = _chunk(
        logits, tops, settings, stride, width, num_chunks, cuts, row, num_rows, chunk, CHUNKS, BLOCK
    )
    tl.store(masses + row * num_chunks + chunk, tl.sum(mass, 0))


@triton.jit
def _draw(
    logits, tops, settings, stride, width, num_chunks, cuts, masses, tokens,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, num_rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    c = tl.arange(0, CHUNKS)
    parts = tl.load(masses + row * num_chunks + c, c < num_chunks, 0)
    whole = tl.sum(parts, 0)
    share = tl.load(settings + UNIFORM * num_rows + row) * whole.to(tl.float64)
    target = tl.minimum(share.to(tl.int64), whole - 1)
    chunk = tl.sum((tl.cumsum(parts, 0) <= target).to(tl.int32), 0)
    target -= tl.sum(tl.where(c < chunk, parts, 0), 0)
    _, _, mass = _chunk(
        logits, tops, settings, stride, width, num_chunks, cuts, row, num_rows, chunk, CHUNKS, BLOCK
    )
    place = tl.sum((tl.cumsum(mass, 0) <= target).to(tl.int32), 0)
    tl.store(tokens + row, (chunk * BLOCK + place).to(tl.int64))


@triton.jit
def _token_logprobs(logits, tokens, logprobs, stride, width, BLOCK: tl.constexpr):
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    # A largest value and a sum for each lane; lanes come together once, at the end.
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, width, BLOCK):
        at = begin + lane
        x = tl.load(logits + row * stride + at, at < width, float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, x)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - base) + tl.exp(x - base)
        top = new_top
    largest = tl.max(top, 0)
    weight = tl.sum(total * tl.exp(top - largest), 0)
    own = tl.load(logits + row * stride + tl.load(tokens + row)).to(tl.float32)
    tl.store(logprobs + row, own - largest - tl.log(weight))
