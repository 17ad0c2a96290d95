"""Preference records: three spellings of one pair, and what cannot be used."""

from __future__ import annotations

import pytest

from erniekit.data.preference import read_pair
from erniekit.data.sources import DataError

ERNIEKIT = {"src": ["q"], "tgt": [], "response": ["bad", "good"], "sort": [0, 1]}


def test_three_formats_give_the_same_pair() -> None:
    user = {"role": "user", "content": "q"}
    good, bad = ({"role": "assistant", "content": text} for text in ("good", "bad"))
    alpaca = {"question": "q", "chosen": "good", "rejected": "bad"}
    messages = {"prompt": [user], "chosen": [good], "rejected": [bad]}
    pair = read_pair(ERNIEKIT, "erniekit")
    assert (pair.chosen, pair.rejected) == ([user, good], [user, bad])
    assert read_pair(alpaca, "alpaca") == read_pair(messages, "messages") == pair


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sort": [1, 1]}, "expected the larger"),
        ({"response": ["a"]}, "list of two"),
        ({"response": ["a", ["b", "c"]]}, "an odd number"),
        ({"response": ["a", "a"]}, "the same"),
        ({"response": ["a", ""]}, "expected text"),
        ({"src": ["q", "r"]}, "2 src and 0 tgt"),
    ],
)
def test_a_record_that_cannot_be_used_is_one_sentence(change: dict, told: str) -> None:
    with pytest.raises(DataError, match=told) as caught:
        read_pair(ERNIEKIT | change, "erniekit")
    assert "\n" not in str(caught.value)
