"""How near an answer is to its reference, from the words alone; calls, from their JSON.

Both are compared without case, punctuation and the width of spaces. Scores are between 0 and 1; an
answer in other words scores low though it may be right, so they compare runs, not models.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ernie.chat.calls import Call

SCORES = ("exact", "contains", "f1")
CALL_SCORES = ("call_name", "call_arguments", "no_call")  # where there are tools
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


def call_scores(ours: Sequence[Call], theirs: Sequence[Call]) -> dict[str, float]:
    """Of an answer that shall call: call_name, the same tools are called, as often each, and
    call_arguments, with equal arguments too. Of one that shall not: no_call, none is.

    Arguments are compared as JSON: the order of keys and 1 for 1.0 make no difference. Nor does the
    order of parallel calls.
    """
    if not theirs:
        return {"no_call": float(not ours)}
    names, wanted = (Counter(call.name for call in calls) for calls in (ours, theirs))
    whole, wanted_whole = (Counter(map(_canonical, calls)) for calls in (ours, theirs))
    return {
        "call_name": float(names == wanted),
        "call_arguments": float(whole == wanted_whole),
    }


def _canonical(call: Call) -> tuple[str, str]:
    arguments = json.loads(call.arguments, parse_float=_number)
    return call.name, json.dumps(arguments, sort_keys=True)


def _number(text: str) -> Any:
    value = float(text)
    return int(value) if value.is_integer() else value


def mean_scores(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean of each score over the records that have it; {} for none."""
    values = {k: [r[k] for r in records if k in r] for k in (*SCORES, *CALL_SCORES)}
    return {k: sum(found) / len(found) for k, found in values.items() if found}
