"""Draws on a CPU: of a vocabulary, only the likeliest tokens are sorted, in plain torch.

Legend: R rows of logits, r those of them that are restricted, V vocabulary, K candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ernie.kernels.reference import MOST_TOKENS, draw_masses, enough_mass, invert, kept_masses

# A nucleus (top_p) is looked for among so many of the likeliest tokens, and among 16 times as many
# where these do not hold enough probability: sorting a whole vocabulary takes milliseconds.
NUM_CANDIDATES = 256


def draw(
    logits_RV: Tensor,
    temperature_R: Tensor,
    min_p_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    uniform_R: Tensor,
) -> Tensor:
    ranks_RV, masses_RV = draw_masses(logits_RV, temperature_R, min_p_R)
    is_restricted_R = (top_k_R > 0) | (top_p_R < 1)
    kept, free = is_restricted_R.nonzero()[:, 0], (~is_restricted_R).nonzero()[:, 0]
    if not len(kept):
        return invert(masses_RV, uniform_R)
    settings = (top_k_R[kept], top_p_R[kept], uniform_R[kept])
    few = max(NUM_CANDIDATES, int(top_k_R.max()))
    if not len(free):
        return _restricted(ranks_RV, masses_RV, *settings, few)
    tokens_R = torch.empty(len(logits_RV), dtype=torch.int64)
    tokens_R[free] = invert(masses_RV[free], uniform_R[free])
    tokens_R[kept] = _restricted(ranks_RV[kept], masses_RV[kept], *settings, few)
    return tokens_R


def _restricted(
    ranks_rV: Tensor,
    masses_rV: Tensor,
    top_k_r: Tensor,
    top_p_r: Tensor,
    uniform_r: Tensor,
    num_candidates: int,
) -> Tensor:
    num_tokens = ranks_rV.shape[-1]
    num_candidates = min(num_candidates, num_tokens)
    # One number that has both the rank and, among equals, the id.
    order_rV = ranks_rV * MOST_TOKENS + torch.arange(num_tokens)
    ids_rK = order_rV.topk(num_candidates, largest=False).values % MOST_TOKENS
    sorted_rK, total_r = masses_rV.gather(-1, ids_rK), masses_rV.sum(-1)
    kept_rK = kept_masses(sorted_rK, total_r, top_k_r, top_p_r)
    ids_rK, by_id_rK = ids_rK.sort(-1)
    places_r = invert(kept_rK.gather(-1, by_id_rK), uniform_r)
    tokens_r = ids_rK.gather(-1, places_r[:, None])[:, 0]
    short_r = (top_k_r <= 0) & (sorted_rK.sum(-1) < enough_mass(total_r, top_p_r))
    if num_candidates < num_tokens and bool(short_r.any()):
        rest = (ranks_rV, masses_rV, top_k_r, top_p_r, uniform_r)
        some = [x[short_r] for x in rest]
        tokens_r[short_r] = _restricted(*some, num_candidates=16 * num_candidates)
    return tokens_r
