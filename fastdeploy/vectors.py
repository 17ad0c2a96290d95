"""Arithmetic on the vectors that stand for texts. Plain lists: imports no torch.

The models of the family are made to write text; nobody trained them to embed it. Their pooled
hidden states are vectors all the same, good for clustering and coarse search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastdeploy.errors import RequestError


def shaped(vector: Sequence[float], dimensions: int | None, normalize: bool) -> list[float]:
    """The first `dimensions` numbers, then (if wanted) divided by their length.

    Raises RequestError for more dimensions than there are.
    """
    if dimensions is not None and not 1 <= dimensions <= len(vector):
        raise RequestError(
            f"dimensions={dimensions} is out of range; this model's vectors have {len(vector)}",
            param="dimensions",
        )
    cut = list(vector[:dimensions])
    length = math.sqrt(sum(x * x for x in cut))
    return [x / length for x in cut] if normalize and length else cut


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """The cosine of the angle between two vectors, from -1 to 1; 0 where one is all zeros."""
    return sum(x * y for x, y in zip(shaped(a, None, True), shaped(b, None, True), strict=True))
