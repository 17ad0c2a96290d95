"""Cross-entropy and its gradient on a GPU: two passes over a row of logits, the second from cache.

Legend: N rows, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096  # of a row in registers at once


def cross_entropy_(logits_NV: Tensor, targets_N: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    assert logits_NV.is_contiguous()
    num_rows, vocabulary = logits_NV.shape
    loss_N = logits_NV.new_empty(num_rows, dtype=torch.float32)
    right_N = logits_NV.new_empty(num_rows, dtype=torch.bool)
    if num_rows:
        _cross_entropy[(num_rows,)](
            logits_NV, targets_N, loss_N, right_N, scale, vocabulary, COLUMNS, num_warps=8
        )
    return loss_N, right_N


@triton.jit
def _cross_entropy(logits, targets, losses, right, scale, vocabulary, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    target = tl.load(targets + row)
    at = tl.arange(0, BLOCK)
    # A largest value and a sum for each lane; lanes come together once, at the end.
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, vocabulary, BLOCK):
        inside = begin + at < vocabulary
        x = tl.load(logits + begin + at, inside, float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, x)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - base) + tl.exp(x - base)
        top = new_top
    largest = tl.max(top, 0)
    weight = tl.sum(total * tl.exp(top - largest), 0)
    chosen = tl.load(logits + target).to(tl.float32) - largest
    tl.store(losses + row, tl.log(weight) - chosen)
    tl.store(right + row, chosen == 0.0)
    share = scale / weight
    # Every lane must have read the target's logit before any writes.
    tl.debug_barrier()
    for begin in range(0, vocabulary, BLOCK):
        place = begin + at
        x = tl.load(logits + place, place < vocabulary, float("-inf")).to(tl.float32)
        gradient = tl.exp(x - largest) * share - tl.where(place == target, scale, 0.0)
        tl.store(logits + place, gradient, place < vocabulary)
