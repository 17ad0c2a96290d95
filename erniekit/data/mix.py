"""Which record comes next: the mixing of several files, and shuffling, as one endless stream.

    random            draw a file by weight; an epoch is min(limit, number of records) draws
    concat            every record of every file once; weights are ignored
    interleave_under  draw a file by weight until the first one is used up
    interleave_over   draw a file by weight until every one has been used up once

Within a file records come without repetition, in a new order on every pass. The stream is a
function of the seed alone and can be entered at any position at the price of drawing (not reading)
what comes before, which is how training resumes. Memory is one permutation per file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np

_BLOCK = 4096  # draws made at once


class Mix:
    """An endless stream of (source, index) pairs over files of the given sizes.

    Sources of weight 0 are never drawn. `limit` bounds an epoch of `random`.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        *,
        strategy: str = "random",
        shuffle: bool = True,
        limit: int = 6_000_000,
        seed: int = 0,
    ) -> None:
        total = sum(weights)
        self.sizes = tuple(sizes)
        self.weights = tuple(weights)
        self.probs = np.array([w / total for w in weights])
        self.drawn = [s for s, w in enumerate(weights) if w > 0]
        self.strategy, self.shuffle, self.seed = strategy, shuffle, seed
        self.limit = min(limit, sum(self.sizes[s] for s in self.drawn))

    @property
    def epoch_size(self) -> int:
        """Draws of the first epoch (those of a later one may differ when interleaving)."""
        return sum(len(block) for block in self._epoch(0))

    def draws(self, start: int = 0) -> Iterator[tuple[int, int]]:
        """(source, index) from position `start` on, epoch after epoch, without end."""
        position, begun = 0, dict.fromkeys(self.drawn, 0)
        for epoch in count():
            for block in self._epoch(epoch, begun):
                skipped = min(max(start - position, 0), len(block))
                position += len(block)
                yield from ((int(s), int(i)) for s, i in block[skipped:])

    def _epoch(self, epoch: int, begun: dict[int, int] | None = None) -> Iterator[np.ndarray]:
        """Blocks of int64 `(n, 2)`: source and index.

        In files that are not shuffled an epoch of draws goes on where the one before has ended, so
        that one of fewer draws than records does not read the same ones again: `begun` has these
        places, and gets the new ones.
        """
        if self.strategy == "concat":
            pairs = [np.stack((np.full(self.sizes[s], s), np.arange(self.sizes[s])), 1)
                     for s in self.drawn]  # fmt: skip
            everything = np.concatenate(pairs)
            yield everything[self._order(len(everything), epoch, 0, 0)]
            return
        goes_on = self.strategy == "random" and not self.shuffle
        starts = begun if begun and goes_on else dict.fromkeys(self.drawn, 0)
        passes = {s: _Passes(self, s, epoch, starts[s]) for s in self.drawn}
        rng, left = np.random.default_rng((self.seed, epoch)), self.limit
        while left > 0:
            sources = rng.choice(len(self.sizes), size=_BLOCK, p=self.probs)
            if self.strategy == "random":
                sources = sources[:left]
                left -= len(sources)
            else:
                end = self._end_of_interleaving(sources, passes)
                sources, left = sources[:end], 0 if end <= _BLOCK else left
            block = np.stack((sources, np.empty_like(sources)), 1)
            for s, stream in passes.items():
                mine = sources == s
                block[mine, 1] = stream.take(int(mine.sum()))
                starts[s] = stream.place
            yield block

    def _end_of_interleaving(self, sources: np.ndarray, passes: dict[int, _Passes]) -> int:
        """How many of these draws belong to the epoch: up to the one that uses up the file which
        decides, the first or the last to be used up; more than there are where none does.
        """
        ends = []
        for s, stream in passes.items():
            uses = np.flatnonzero(sources == s)
            missing = self.sizes[s] - stream.taken
            if missing <= 0:
                ends.append(0)
            else:
                ends.append(int(uses[missing - 1]) + 1 if len(uses) >= missing else _BLOCK + 1)
        return min(ends) if self.strategy == "interleave_under" else max(ends)

    def _order(self, size: int, epoch: int, source: int, number: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(size)
        return np.random.default_rng((self.seed, epoch, source, number, 1)).permutation(size)


class _Passes:
    """The records of one file, pass after pass, within one epoch, from the place `start` on."""

    def __init__(self, mix: Mix, source: int, epoch: int, start: int) -> None:
        self.mix, self.source, self.epoch = mix, source, epoch
        self.start, self.taken, self.number = start, 0, 0
        self.order = mix._order(mix.sizes[source], epoch, source, 0)

    @property
    def place(self) -> int:
        """The next record, in the order of the pass that it belongs to."""
        return (self.start + self.taken) % len(self.order)

    def take(self, n: int) -> np.ndarray:
        size, parts = len(self.order), []
        while n > 0:
            offset = self.start + self.taken - self.number * size
            if offset == size:
                self.number += 1
                self.order = self.mix._order(size, self.epoch, self.source, self.number)
                continue
            part = self.order[offset : offset + n]
            parts.append(part)
            self.taken += len(part)
            n -= len(part)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)
