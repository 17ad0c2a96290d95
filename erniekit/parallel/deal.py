"""Which rank computes which batch of a step, where batches cost more or less: by their patches.

Packed rows have about equally many tokens, but from none to a row's worth of pictures, and all
ranks wait for the slowest. All see the same batches, so each deals them out for itself and all do
it alike. The step is the same sum whoever computes what.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

from erniekit.parallel.ranks import Ranks

T = TypeVar("T")


def deal(costs: Sequence[int], size: int) -> list[list[int]]:
    """For each of `size` ranks the numbers of its batches: equally many, or one less for some, and
    about the same cost.

    Heaviest first, each to the rank that has the least and still has room; those of a rank are in
    the order of their cost, so that what meets in time is alike too. Of batches of one cost each
    rank gets every `size`-th, as without any.
    """
    if len(set(costs)) < 2:
        return [list(range(rank, len(costs), size)) for rank in range(size)]
    hands: list[list[int]] = [[] for _ in range(size)]
    loads = [0] * size
    most, with_most = -(-len(costs) // size), (len(costs) - 1) % size + 1
    for number in sorted(range(len(costs)), key=lambda n: (-costs[n], n)):
        num_full = sum(len(hand) == most for hand in hands)
        room = most if num_full < with_most else most - 1
        rank = min(
            (r for r in range(size) if len(hands[r]) < room),
            key=lambda r: (loads[r], len(hands[r]), r),
        )
        hands[rank].append(number)
        loads[rank] += costs[number]
    return hands


def dealt(window: Sequence[T], costs: Sequence[int], ranks: Ranks) -> Sequence[T]:
    """This rank's share of the batches of a step."""
    if ranks.size == 1:
        return window
    return [window[number] for number in deal(costs, ranks.size)[ranks.rank]]


def shared(batches: Iterable[T], ranks: Ranks) -> Iterator[tuple[T, bool]]:
    """This rank's batches, and whether each counts: all ranks compute equally many, because the
    shards of a model are put together by all.
    """
    rest = iter(batches)
    while group := list(islice(rest, ranks.size)):
        is_own = ranks.rank < len(group)
        yield group[ranks.rank if is_own else 0], is_own
