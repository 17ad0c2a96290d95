"""The fault scripts in small: what they count has to hold; their times are for records."""

from __future__ import annotations

import disconnects
import held_requests
import kill_engine
import pytest
import rig
import slow_readers


@pytest.mark.parametrize(
    ("run", "sizes"),
    [
        (kill_engine.run, {"streams": 6, "kills": 1}),
        (held_requests.run, {"streams": 60, "overflow": 12}),
        (disconnects.run, {"clients": 40}),
        (slow_readers.run, {"slow": 4, "normal": 2}),
    ],
    ids=lambda value: value.__module__ if callable(value) else "",
)
def test_a_broken_part_breaks_nothing_else(run, sizes: dict[str, int]) -> None:
    claims: list[rig.Claim] = run(**sizes)
    counts = [claim for claim in claims if claim.limit == 0]
    assert counts
    assert not [claim.row() for claim in counts if not claim.holds]
