"""Rotary position tables, one-dimensional for text and three-dimensional for text, images and
video.

The family rotates *interleaved* pairs `(x[0], x[1]), (x[2], x[3]), ...` over the whole head; see
`ernie.kernels.rotate`. Angles are computed in float32.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]  # cos and sin, float32 (T, d/2)


def rotary_tables(
    positions: Tensor, head_dim: int, theta: float, temporal_pairs: int = 0
) -> Rotary:
    """cos and sin of every pair's angle, float32 `(T, d/2)`.

    `positions` is `(T,)`, or `(3, T)` with rows time, height, width. In the second case the last
    `temporal_pairs` frequencies turn by time, the others alternate: even ones by height, odd ones
    by width. Equal rows give the one-dimensional tables. Source: PaddleFormers, `ernie4_5_moe_vl`.
    """
    num_pairs = head_dim // 2
    frequencies_p = _frequencies(head_dim, theta, positions.device)
    if positions.dim() == 1:
        angles_Tp = positions.float()[:, None] * frequencies_p
    else:
        pair = torch.arange(num_pairs, device=positions.device)
        source_p = torch.where(pair >= num_pairs - temporal_pairs, 0, 1 + pair % 2)
        angles_Tp = positions.float()[source_p].T * frequencies_p
    return angles_Tp.cos(), angles_Tp.sin()


@cache
def _frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """The turn of each pair from one position to the next, float32 `(d/2,)`."""
    with torch.inference_mode(False):  # whoever asks first may train or not
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        return 1.0 / theta**exponents
