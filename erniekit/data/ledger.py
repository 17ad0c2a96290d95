"""Where the tokens of files go: trained, masked, truncated, dropped or duplicate, adding up to all.

    trained    the model is to say it          masked     it is read, and not to be said
    truncated  in turns cut off the front      dropped    in a record that cannot be used
    duplicate  in a sample that has been seen before, token for token and label for label

The input are the tokens of every sample before it is cut; of a record that cannot be used those of
its dialogue, or of its raw text where there is none. A duplicate is trained again like any sample;
it is told apart because nothing new is in it. A sample of n tokens fills n - 1 places of a row, the
last being only a label, so rows are counted by themselves (`Epoch`).

Of each sample 40 bytes are kept, whatever its length, so that files of any size go through.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from erniekit.data.dialogue import Sample
from erniekit.data.pack import Drawn
from erniekit.data.stream import Stream

KINDS = ("trained", "masked", "truncated", "dropped", "duplicate")
NEAR_EMPTY = 2  # trained tokens: the end, and at most one before it


@dataclass
class Account:
    """One file's records, samples and tokens by kind."""

    path: str
    num_records: int = 0
    num_unusable: int = 0
    num_samples: int = 0
    num_duplicates: int = 0
    num_near_empty: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    @property
    def num_tokens(self) -> int:
        return sum(self.tokens.values())

    def row(self) -> tuple[int, ...]:
        return (
            self.num_records,
            self.num_unusable,
            self.num_samples,
            self.num_tokens,
            *self.tokens.values(),
        )

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "num_tokens": self.num_tokens}


def total(accounts: Sequence[Account]) -> Account:
    """The sum of some accounts."""
    names = ("num_records", "num_unusable", "num_samples", "num_duplicates", "num_near_empty")
    sums = {name: sum(getattr(a, name) for a in accounts) for name in names}
    return Account("all", **sums, tokens={k: sum(a.tokens[k] for a in accounts) for k in KINDS})


class Samples:
    """Sizes and digests of the samples of a split, in the order of files and lines."""

    def __init__(self) -> None:
        self._columns = {name: array("q") for name in ("source", "record", "size", "trained")}
        self._digests = {name: array("Q") for name in ("text", "exact")}

    def add(self, source: int, record: int, sample: Sample) -> None:
        values = (source, record, len(sample) + 1, sample.num_trained)
        for column, value in zip(self._columns.values(), values):
            column.append(value)
        digest = hashlib.blake2b(sample.content, digest_size=8)
        self._digests["text"].append(int.from_bytes(digest.digest(), "little"))
        digest.update(np.asarray(sample.labels, np.int32).tobytes())
        self._digests["exact"].append(int.from_bytes(digest.digest(), "little"))

    def extend(self, others: Samples) -> None:
        for mine, theirs in ((self._columns, others._columns), (self._digests, others._digests)):
            for name, values in theirs.items():
                mine[name].extend(values)

    def column(self, name: str) -> np.ndarray:
        """One number a sample: source, record, size (tokens), trained; digests text and exact."""
        if name in self._digests:
            return np.frombuffer(self._digests[name], np.uint64)
        return np.frombuffer(self._columns[name], np.int64)

    def __len__(self) -> int:
        return len(self._columns["size"])

    def first_alike(self) -> np.ndarray:
        """For each sample the first one with the same tokens and labels: itself if it is new."""
        _, first, group = np.unique(self.column("exact"), return_index=True, return_inverse=True)
        return first[group]


def close(accounts: Sequence[Account], samples: Samples) -> None:
    """Enter the samples of a split into the accounts of its files."""
    source, size, trained = (samples.column(name) for name in ("source", "size", "trained"))
    is_duplicate = samples.first_alike() != np.arange(len(samples))
    for number, account in enumerate(accounts):
        mine = source == number
        new = mine & ~is_duplicate
        account.num_samples = int(mine.sum())
        account.num_duplicates = int((mine & is_duplicate).sum())
        account.num_near_empty = int((mine & (trained <= NEAR_EMPTY)).sum())
        account.tokens["trained"] = int(trained[new].sum())
        account.tokens["masked"] = int((size - trained)[new].sum())
        account.tokens["duplicate"] = int(size[mine & is_duplicate].sum())


@dataclass(frozen=True)
class Epoch:
    """Rows of the first epoch. `num_padding` places are computed for nothing; where rows are not
    padded, what is free in them costs nothing.
    """

    num_drawn: int  # records, those drawn again included
    num_never_drawn: int  # records of files with a weight
    num_rows: int
    num_tokens: int  # in the rows, without padding
    num_free: int  # places of rows that no sample fills
    num_padding: int


def first_epoch(stream: Stream, samples: Samples, batch_size: int) -> Epoch:
    """Pack the first epoch as training does, by the lengths of the samples alone."""
    bounds = [
        np.searchsorted(samples.column("source"), (s, s + 1)) for s in range(len(stream.sources))
    ]
    record, size = samples.column("record"), samples.column("size")
    starts = [
        low + np.searchsorted(record[low:high], np.arange(len(source) + 1))
        for (low, high), source in zip(bounds, stream.sources)
    ]
    seen = [np.zeros(len(source), bool) for source in stream.sources]

    def drawn() -> Iterator[Drawn]:
        for position, (s, i) in enumerate(islice(stream.mix.draws(), stream.epoch_size)):
            seen[s][i] = True
            for part, n in enumerate(size[starts[s][i] : starts[s][i + 1]].tolist()):
                yield Drawn(position, part, Sample(range(n - 1), range(n - 1)))

    capacity, num_rows, num_tokens = stream.data.max_seq_len, 0, 0
    for row, _ in stream.packed(drawn()):
        num_rows += 1
        num_tokens += sum(map(len, row))
    num_places = -(-num_rows // batch_size) * batch_size * capacity
    return Epoch(
        stream.epoch_size,
        sum(int((~seen[s]).sum()) for s in stream.mix.drawn),
        num_rows,
        num_tokens,
        num_rows * capacity - num_tokens,
        num_places - num_tokens if stream.data.padding else 0,
    )


def in_both(train: Samples, held_out: Samples) -> list[tuple[int, int]]:
    """(sample of evaluation, first sample of training with the same tokens), each once."""
    theirs, first = np.unique(train.column("text"), return_index=True)
    if not len(theirs):
        return []
    mine = held_out.column("text")
    at = np.minimum(np.searchsorted(theirs, mine), len(theirs) - 1)
    found = np.flatnonzero(theirs[at] == mine)
    return [(int(i), int(first[at[i]])) for i in found]
