"""How near an answer is to its reference, from the words alone.

Both are compared without case, punctuation and the width of spaces. Scores are between 0 and 1; an
answer in other words scores low though it may be right, so they compare runs, not models.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

SCORES = ("exact", "contains", "f1")
# A word of letters and digits; scripts without spaces count by character.
_WORDS = re.compile(r"[぀-ヿ㐀-䶿一-鿿가-힯]|[^\W_぀-ヿ㐀-䶿一-鿿가-힯]+")


def words(text: str) -> list[str]:
    return _WORDS.findall(unicodedata.normalize("NFKC", text).casefold())


def scores(answer: str, reference: str) -> dict[str, float]:
    """exact: the same words; contains: the reference's words stand in the answer in one piece;
    f1: harmonic mean of the shares of common words.

    Source: the F1 of SQuAD (Rajpurkar et al., 2016), without its dropping of articles.
    """
    ours, theirs = words(answer), words(reference)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return {
        "exact": float(ours == theirs),
        "contains": float(f" {' '.join(theirs)} " in f" {' '.join(ours)} "),
        "f1": 2 * common / (len(ours) + len(theirs)) if common else float(ours == theirs),
    }


def mean_scores(all_scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each score; {} for none."""
    if not all_scores:
        return {}
    return {k: sum(s[k] for s in all_scores) / len(all_scores) for k in all_scores[0]}
