"""A dry pass over an epoch of the records: how many rows it fills, and what is in them; and which
of another split's samples are met while training reads.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

from erniekit.data.dialogue import Sample
from erniekit.data.pack import START, Drawn
from erniekit.data.sources import DataError
from erniekit.data.stream import Stream

log = logging.getLogger("erniekit")


@dataclass(frozen=True)
class Survey:
    """What a dry pass over the first epoch found."""

    epoch_size: int  # records of an epoch
    num_records: int  # records read
    num_samples: int
    num_rows: int  # of the whole epoch; extrapolated when not all was read
    num_tokens: int
    num_trained: int
    num_bad: int
    digests: frozenset[bytes]  # of samples, to compare with another split

    @property
    def fill(self) -> float:
        return self.num_tokens / max(self.num_rows, 1)


@dataclass
class Overlap:
    """The held-out samples, by digest, that are among those it is called with."""

    held_out: frozenset[bytes]
    met: set[bytes] = field(default_factory=set)

    def __call__(self, sample: Sample) -> None:
        digest = _digest(sample)
        if digest not in self.held_out:
            return
        if not self.met:
            log.warning(
                "a sample of the evaluation data is also in the training data: eval_loss will look "
                "too good; the number of them follows at the end"
            )
        self.met.add(digest)


def survey(stream: Stream, max_records: int) -> Survey:
    """Read and pack one epoch (at most `max_records` of it) without training on it.

    Raises DataError when too many records cannot be used, or none can.
    """
    epoch_size = stream.epoch_size
    num_read = min(epoch_size, max_records)
    if num_read < epoch_size:  # records of everywhere, whatever the order of training is
        stream = stream.shuffled()
    digests: set[bytes] = set()
    num_samples = num_tokens = num_trained = 0

    def counted() -> Iterator[Drawn]:  # whole, before a row cuts a document
        nonlocal num_samples, num_tokens, num_trained
        for drawn in stream.samples(START, num_read):
            num_samples += 1
            num_tokens += len(drawn)
            num_trained += drawn.sample.num_trained
            digests.add(_digest(drawn.sample))
            yield drawn

    num_rows = sum(1 for _ in stream.packed(counted()))
    if not num_rows:
        raise DataError(f"none of the {num_read} records can be trained on; see the warnings above")
    scale = epoch_size / num_read
    return Survey(
        epoch_size,
        num_read,
        num_samples,
        round(num_rows * scale),
        round(num_tokens * scale),
        round(num_trained * scale),
        stream.faults.total,
        frozenset(digests),
    )


def _digest(sample: Sample) -> bytes:
    return hashlib.blake2b(sample.content, digest_size=8).digest()
