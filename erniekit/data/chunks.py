"""Records of files checked and encoded in stretches, by several processes where there are many.

A stretch is a function of the file and its bounds alone, and stretches are handed out in the order
of the file: the number of processes changes nothing but the time.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from erniekit.data.columns import column_of
from erniekit.data.dialogue import CutAway
from erniekit.data.ledger import Samples
from erniekit.data.sources import DataError
from erniekit.data.stream import Stream, kind_of
from erniekit.data.unread import unread
from erniekit.data.wholes import num_left_out, num_tokens

SIZE = 1000  # records

T = TypeVar("T")


@dataclass(frozen=True)
class Fault:
    """An unusable record of a file; `kind` is the reason in words that other records share."""

    index: int
    column: int | None
    reason: str
    kind: str
    is_cut_away: bool


@dataclass
class Chunk:
    """What a stretch of records gave."""

    samples: Samples = field(default_factory=Samples)
    faults: list[Fault] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)  # keys that records have for nothing
    num_truncated: int = 0
    num_dropped: int = 0


def read_chunk(stream: Stream, number: int, start: int) -> Chunk:
    """The `SIZE` records of a file from `start` on. Those of a file that is never drawn (weight 0)
    are checked, and dropped.
    """
    source, kind, chunk = stream.sources[number], stream.kinds[number], Chunk()
    is_drawn = number in stream.mix.drawn
    for index in range(start, min(start + SIZE, len(source))):
        try:
            record = source[index]
            samples = stream.read(number, index)
            chunk.num_dropped += num_left_out(stream.encoder, record, kind)
        except DataError as error:
            chunk.num_dropped += num_tokens(stream.encoder, source, index, kind)
            column = error.column or column_of(source.text(index), error.at)
            is_cut_away = isinstance(error, CutAway)
            chunk.faults.append(Fault(index, column, str(error), kind_of(error), is_cut_away))
            continue
        chunk.unread.update(unread(stream.encoder, record, kind))
        for sample in samples:
            if is_drawn:
                chunk.num_truncated += sample.num_cut
                chunk.samples.add(number, index, sample)
            else:
                chunk.num_dropped += len(sample) + 1 + sample.num_cut
    return chunk


class Chunks:
    """Stretches of the files of some streams; a context, because it may hold processes.

    `num_workers` None: one for each processor, none for small files and where processes cannot be
    forked.
    """

    def __init__(self, streams: Mapping[str, Stream], num_workers: int | None) -> None:
        self.streams = streams
        longest = max(len(source) for stream in streams.values() for source in stream.sources)
        can_fork = "fork" in multiprocessing.get_all_start_methods()
        wanted = len(os.sched_getaffinity(0)) if can_fork and num_workers is None else num_workers
        self.num_workers = min(wanted or 1, longest // SIZE)
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Chunks:
        if self.num_workers > 1:
            _forked.update(self.streams)
            self.pool = ProcessPoolExecutor(
                self.num_workers,
                multiprocessing.get_context("fork"),
                initializer=partial(signal.signal, signal.SIGINT, signal.SIG_IGN),
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
            _forked.clear()

    def of(self, split: str, number: int, read: Callable[[Stream, int, int], T]) -> Iterator[T]:
        """What `read(stream, number, start)` makes of the stretches of a file, in its order."""
        stream = self.streams[split]
        starts = range(0, len(stream.sources[number]), SIZE)
        if self.pool is None:
            return (read(stream, number, start) for start in starts)
        return self.pool.map(partial(_read_forked, read, split, number), starts)


# What forked processes find here is what the one that forked them had put here.
_forked: dict[str, Stream] = {}


def _read_forked(read: Callable[[Stream, int, int], T], split: str, number: int, start: int) -> T:
    return read(_forked[split], number, start)
