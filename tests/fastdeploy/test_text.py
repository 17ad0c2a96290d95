"""Stop strings: the cut is exact, and does not depend on how the text was cut into pieces."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie.tokenizer import Tokenizer
from fastdeploy.engine.request import TokenOutput
from fastdeploy.engine.text import Sample, StopStrings
from fastdeploy.outputs import CompletionOutput, RequestMetrics
from fastdeploy.sampling import SamplingParams


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


@pytest.mark.parametrize(
    ("stop", "settings", "text", "reason"),
    [
        ([], {}, "see the fox jumps", None),
        (["<mask:1>"], {}, "see the fox", "<mask:1>"),
        (["<mask:1>"], {"include_stop_str_in_output": True}, "see the fox<mask:1>", "<mask:1>"),
        (["<mask:1>"], {"min_tokens": 99}, "see the fox jumps", None),
        (["fox jumps", "<mask:1>"], {}, "see the fox", "<mask:1>"),
        (["fox jumps"], {}, "see the ", "fox jumps"),
        (["mask"], {}, "see the fox jumps", None),  # the token is not its letters
    ],
)
def test_a_hidden_token_stops_where_it_is_the_whole_stop_string(
    folder: Path, stop: list[str], settings: dict, text: str, reason: str | None
) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    sample = Sample(0, SamplingParams(stop=stop, **settings), tokenizer)
    ids = tokenizer.encode("see the fox<mask:1> jumps", allow_special=True)
    pieces = []
    for token in ids:
        ended = "length" if len(pieces) == len(ids) - 1 else None
        pieces.append(
            sample.push(TokenOutput("r", token, None, None, ended, RequestMetrics(0.0), 0))
        )
        if sample.finished:
            break
    whole = CompletionOutput.joined(pieces)
    assert (whole.text, whole.stop_reason) == (text, reason)
    assert whole.finish_reason == ("length" if reason is None else "stop")
