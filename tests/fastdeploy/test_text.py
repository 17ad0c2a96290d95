"""Stop strings: the cut is exact, and does not depend on how the text was cut into pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.engine.text import StopStrings


def streamed(
    pieces: list[str], stops: list[str], *, include: bool = False
) -> tuple[str, str | None]:
    """What is shown, piece after piece, and which string stopped it."""
    matcher, shown = StopStrings(stops, include=include), ""
    for piece in pieces:
        shown += matcher.push(piece)
        if matcher.matched is not None:
            return shown, matcher.matched
    return shown + matcher.flush(), None


def by_definition(text: str, stops: list[str], *, include: bool = False) -> tuple[str, str | None]:
    """Read character by character; stop where a string is complete, the longest if several are."""
    for end in range(1, len(text) + 1):
        complete = [s for s in stops if text[:end].endswith(s)]
        if complete:
            stop = max(complete, key=len)
            return (text[:end] if include else text[: end - len(stop)]), stop
    return text, None


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("text", ["Hello END of it", "ENENDEND", "no stop E", "aab EN"])
def test_every_way_to_cut_a_text_in_three_gives_the_same(text: str, include: bool) -> None:
    stops = ["END", "ND o"]
    expected = by_definition(text, stops, include=include)
    for i in range(len(text) + 1):
        for j in range(i, len(text) + 1):
            pieces = [text[:i], text[i:j], text[j:]]
            assert streamed(pieces, stops, include=include) == expected, pieces


@given(
    text=st.text("ab", max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 12), max_size=6),
    include=st.booleans(),
)
def test_random_texts_stops_and_cuts(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    borders = [0, *sorted(cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(borders)]
    assert streamed(pieces, stops, include=include) == by_definition(text, stops, include=include)


def test_only_what_could_begin_a_stop_string_is_held_back() -> None:
    matcher = StopStrings(["END"])
    assert [matcher.push(c) for c in "xEyEN"] == ["x", "", "Ey", "", ""]
    assert matcher.flush() == "EN"
