"""Samples to rows: several in one row of at most `capacity` tokens, none lost.

Four ways: `sequential` keeps the order and opens a new row when a sample does not fit; `greedy`
holds a buffer of samples and puts each into the open row with the most room; `separate` is one
sample a row; `full` lays samples end to end and cuts them where a row is full, so that no place is
free. Dialogues fit a row and are only cut by `full`, which is for plain text; a longer sample is
cut into pieces of a row in every way. A piece goes on where the one before it ended, so each token
is trained once.

All work on a stream and say with every row how to go on after it (`Cursor`), which is what a
checkpoint stores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import numpy as np

from erniekit.data.dialogue import Sample


class Cursor(NamedTuple):
    """Where the stream goes on: `offset` tokens into sample `part` of record `position`, after
    dropping `rows` rows that are packed again from there.
    """

    position: int = 0
    part: int = 0
    rows: int = 0
    offset: int = 0

    @property
    def num_records(self) -> int:
        """How many records have been begun before this place."""
        return self.position + (self.part > 0 or self.offset > 0)


START = Cursor()
_MOST_BYTES = 1 << 29  # of pictures in the buffer of greedy packing


@dataclass(frozen=True)
class Drawn:
    """A sample, or a piece of one, with its place in the stream of records."""

    position: int
    part: int
    sample: Sample
    offset: int = 0  # tokens of the sample before this piece
    is_last: bool = True  # nothing of the sample comes after this piece

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def here(self) -> Cursor:
        return Cursor(self.position, self.part, offset=self.offset)

    @property
    def after(self) -> Cursor:
        if self.is_last:
            return Cursor(self.position, self.part + 1)
        return Cursor(self.position, self.part, offset=self.offset + len(self))

    def piece(self, start: int, stop: int) -> Drawn:
        """Tokens `start` to `stop` of this one, or to its end where that comes before."""
        stop = min(stop, len(self))
        if start == 0 and stop == len(self):
            return self
        ids, labels = self.sample.token_ids[start:stop], self.sample.labels[start:stop]
        sample = replace(self.sample, token_ids=ids, labels=labels)
        is_last = self.is_last and stop == len(self)
        return Drawn(self.position, self.part, sample, self.offset + start, is_last)


Row = tuple[list[Drawn], Cursor]


def pack(
    stream: Iterable[Drawn], capacity: int, *, way: str, buffer_size: int, seed: int | None = None
) -> Iterator[Row]:
    """Rows of samples, each with the cursor that leads to the next row; `way` as in the module.

    With a `seed` the rows of `full` come out of order, `buffer_size` at a time: neighbours are
    often of one document, and would be one batch.
    """
    if way == "full":
        rows = _full(stream, capacity)
        return rows if seed is None else _shuffled(rows, buffer_size, seed)
    pieces = _pieces(stream, capacity)
    if way == "separate":
        return (([drawn], drawn.after) for drawn in pieces)
    if way == "sequential":
        return _sequential(pieces, capacity)
    assert way == "greedy", way
    return _greedy(pieces, capacity, buffer_size)


def _pieces(stream: Iterable[Drawn], capacity: int) -> Iterator[Drawn]:
    for drawn in stream:
        for start in range(0, len(drawn), capacity):
            yield drawn.piece(start, start + capacity)


def _full(stream: Iterable[Drawn], capacity: int) -> Iterator[Row]:
    row: list[Drawn] = []
    used = 0
    for drawn in stream:
        done = 0
        while done < len(drawn):
            piece = drawn.piece(done, done + capacity - used)
            row.append(piece)
            done, used = done + len(piece), used + len(piece)
            if used == capacity:
                yield row, piece.after
                row, used = [], 0
    if row:
        yield row, row[-1].after


def _shuffled(rows: Iterator[Row], buffer_size: int, seed: int) -> Iterator[Row]:
    while buffer := list(islice(rows, buffer_size)):
        start, after = buffer[0][0][0].here, buffer[-1][1]
        order = np.random.default_rng((seed, *start)).permutation(len(buffer))
        for number, i in enumerate(order.tolist(), start=1):
            is_last = number == len(buffer)
            yield buffer[i][0], after if is_last else start._replace(rows=number)


def _sequential(stream: Iterable[Drawn], capacity: int) -> Iterator[Row]:
    row: list[Drawn] = []
    used = 0
    for drawn in stream:
        if row and used + len(drawn) > capacity:
            yield row, drawn.here
            row, used = [], 0
        row.append(drawn)
        used += len(drawn)
    if row:
        yield row, row[-1].after


def _greedy(stream: Iterable[Drawn], capacity: int, buffer_size: int) -> Iterator[Row]:
    buffered = iter(stream)
    while buffer := _buffer(buffered, buffer_size):
        rows = fill_rows(buffer, capacity)
        for number, row in enumerate(rows, start=1):
            last = number == len(rows)
            yield row, buffer[-1].after if last else buffer[0].here._replace(rows=number)


def _buffer(stream: Iterator[Drawn], size: int) -> list[Drawn]:
    """The next `size` samples, or fewer where their pictures fill `_MOST_BYTES`."""
    buffer, num_bytes = [], 0
    for drawn in islice(stream, size):
        buffer.append(drawn)
        num_bytes += drawn.sample.num_bytes
        if num_bytes >= _MOST_BYTES:
            break
    return buffer


def fill_rows(samples: list[Drawn], capacity: int) -> list[list[Drawn]]:
    """Each sample goes to the open row with the most room, else opens one.

    Source: ERNIEKit's greedy packing.
    """
    import heapq

    rows: list[list[Drawn]] = []
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
