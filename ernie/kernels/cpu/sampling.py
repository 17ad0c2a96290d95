"""Draws on a CPU: of a vocabulary, only the likeliest tokens are sorted, in plain torch. The
likeliest one by itself is found by our library.

Legend: R rows of logits, r those of them that are restricted, V vocabulary, K candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ernie.kernels import reference
from ernie.kernels.cpu.build import library
from ernie.kernels.reference import (
    MOST_TOKENS,
    draw_distances,
    draw_masses,
    draw_ranks,
    invert,
    kept_masses,
)

# What is kept is looked for among so many of the likeliest tokens, and among 16 times as many where
# it does not end with these: sorting a whole vocabulary takes milliseconds.
NUM_CANDIDATES = 256


def argmax(logits_RV: Tensor) -> Tensor:
    if logits_RV.dtype != torch.float32 or not logits_RV.is_contiguous() or not logits_RV.numel():
        return reference.argmax(logits_RV)
    tokens_R = torch.empty(len(logits_RV), dtype=torch.int64)
    library().ernie_argmax(
        logits_RV.data_ptr(), *logits_RV.shape, tokens_R.data_ptr(), torch.get_num_threads()
    )
    return tokens_R


def draw(
    logits_RV: Tensor,
    temperature_R: Tensor,
    min_p_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    uniform_R: Tensor,
) -> Tensor:
    distance_RV, is_row_R = draw_distances(logits_RV, temperature_R, min_p_R)
    return _drawn(distance_RV, top_k_R, top_p_R, uniform_R).where(is_row_R, 0)


def _drawn(distance_RV: Tensor, top_k_R: Tensor, top_p_R: Tensor, uniform_R: Tensor) -> Tensor:
    is_restricted_R = (top_k_R > 0) | (top_p_R < 1)
    kept, free = is_restricted_R.nonzero()[:, 0], (~is_restricted_R).nonzero()[:, 0]
    if not len(kept):
        return _free(distance_RV, uniform_R)
    settings = (top_k_R[kept], top_p_R[kept], uniform_R[kept])
    few = max(NUM_CANDIDATES, int(top_k_R.max()) + 1)
    if not len(free):
        return _restricted(distance_RV, *settings, few)
    tokens_R = torch.empty(len(distance_RV), dtype=torch.int64)
    tokens_R[free] = _free(distance_RV[free], uniform_R[free])
    tokens_R[kept] = _restricted(distance_RV[kept], *settings, few)
    return tokens_R


def _free(distance_rV: Tensor, uniform_r: Tensor) -> Tensor:
    # One by one: memory for all rows at once is given back to the system and taken anew each time.
    rows = zip(distance_rV.split(1), uniform_r.split(1))
    return torch.cat([invert(draw_masses(row_1V), uniform_1) for row_1V, uniform_1 in rows])


def _restricted(
    distance_rV: Tensor,
    top_k_r: Tensor,
    top_p_r: Tensor,
    uniform_r: Tensor,
    num_candidates: int,
) -> Tensor:
    num_tokens = distance_rV.shape[-1]
    num_candidates = min(num_candidates, num_tokens)
    total_r = _total(distance_rV, top_k_r)
    nearest_rK, ids_rK = distance_rV.topk(num_candidates, largest=False)
    # One number that has both the rank and, among equals, the id.
    order_rK, by_rank_rK = (draw_ranks(nearest_rK) * MOST_TOKENS + ids_rK).sort(-1)
    sorted_rK = draw_masses(nearest_rK.gather(-1, by_rank_rK))
    kept_rK = kept_masses(sorted_rK, total_r, top_k_r, top_p_r)
    ids_rK, by_id_rK = (order_rK % MOST_TOKENS).sort(-1)
    places_r = invert(kept_rK.gather(-1, by_id_rK), uniform_r)
    tokens_r = ids_rK.gather(-1, places_r[:, None])[:, 0]
    # Whoever keeps tokens of the last rank may have to keep others of it, or of ranks behind.
    is_last_rK = order_rK // MOST_TOKENS == order_rK[:, -1:] // MOST_TOKENS
    short_r = (is_last_rK & (kept_rK > 0)).any(-1)
    if num_candidates < num_tokens and bool(short_r.any()):
        settings = (top_k_r[short_r], top_p_r[short_r], uniform_r[short_r])
        tokens_r[short_r] = _restricted(distance_rV[short_r], *settings, 16 * num_candidates)
    return tokens_r


def _total(distance_rV: Tensor, top_k_r: Tensor) -> Tensor:
    """The mass of each row; rows with `top_k` do without."""
    if bool((top_k_r > 0).all()):
        return torch.zeros_like(top_k_r)
    return torch.stack([draw_masses(distance_V).sum() for distance_V in distance_rV])
