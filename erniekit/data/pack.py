"""Samples to rows: several dialogues in one row of at most `capacity` tokens, none cut, none lost.

Three ways: `sequential` keeps the order and opens a new row when a sample does not fit; `greedy`
holds a buffer of samples and puts each into the open row with the most room; `separate` is one
sample a row. All work on a stream and say with every row how to go on after it (`Cursor`), which is
what a checkpoint stores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from erniekit.data.dialogue import Sample


class Cursor(NamedTuple):
    """Where the stream goes on: at sample `part` of record `position`, after dropping `rows` rows
    that are packed again from there.
    """

    position: int = 0
    part: int = 0
    rows: int = 0

    @property
    def num_records(self) -> int:
        """How many records have been begun before this place."""
        return self.position + (self.part > 0)


START = Cursor()


@dataclass(frozen=True)
class Drawn:
    """A sample with its place in the stream of records."""

    position: int
    part: int
    sample: Sample

    @property
    def here(self) -> Cursor:
        return Cursor(self.position, self.part)

    @property
    def after(self) -> Cursor:
        return Cursor(self.position, self.part + 1)


Row = tuple[list[Sample], Cursor]


def pack(stream: Iterable[Drawn], capacity: int, *, way: str, buffer_size: int) -> Iterator[Row]:
    """Rows of samples, each with the cursor that leads to the next row; `way` as in the module."""
    if way == "separate":
        return (([drawn.sample], drawn.after) for drawn in stream)
    if way == "sequential":
        return _sequential(stream, capacity)
    assert way == "greedy", way
    return _greedy(stream, capacity, buffer_size)


def _sequential(stream: Iterable[Drawn], capacity: int) -> Iterator[Row]:
    row: list[Sample] = []
    used, end = 0, Cursor()
    for drawn in stream:
        if row and used + len(drawn.sample) > capacity:
            yield row, drawn.here
            row, used = [], 0
        row.append(drawn.sample)
        used += len(drawn.sample)
        end = drawn.after
    if row:
        yield row, end


def _greedy(stream: Iterable[Drawn], capacity: int, buffer_size: int) -> Iterator[Row]:
    buffer: list[Drawn] = []
    for drawn in stream:
        buffer.append(drawn)
        if len(buffer) == buffer_size:
            yield from _emptied(buffer, capacity)
            buffer = []
    if buffer:
        yield from _emptied(buffer, capacity)


def _emptied(buffer: list[Drawn], capacity: int) -> Iterator[Row]:
    rows = fill_rows([drawn.sample for drawn in buffer], capacity)
    for number, row in enumerate(rows, start=1):
        last = number == len(rows)
        yield row, buffer[-1].after if last else buffer[0].here._replace(rows=number)


def fill_rows(samples: list[Sample], capacity: int) -> list[list[Sample]]:
    """Each sample goes to the open row with the most room, else opens one.

    Source: ERNIEKit's greedy packing.
    """
    import heapq

    rows: list[list[Sample]] = []
    rooms: list[tuple[int, int]] = []  # (minus the room, row)
    for sample in samples:
        if rooms and -rooms[0][0] >= len(sample):
            room, number = rooms[0]
            rows[number].append(sample)
            heapq.heapreplace(rooms, (room + len(sample), number))
        else:
            rows.append([sample])
            heapq.heappush(rooms, (len(sample) - capacity, len(rows) - 1))
    return rows
