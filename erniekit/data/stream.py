"""From files to batches: the stream of records, and its faults.

    sources -> mix -> dialogues -> samples -> rows -> batches of flat tokens

Records that cannot be used are never silent: each is logged (the first few in full), all are
counted by reason, each once however often it is read, and more of them than `max_bad_data_share` of
all records end the run with `DataError`.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

from ernie.checkpoint.hub import resolve
from ernie.settings import ConfigError
from ernie.tokenizer import Tokenizer
from erniekit.config import Data, Run
from erniekit.data import tasks
from erniekit.data.batch import Batch, batch_of
from erniekit.data.dialogue import Encoder, Sample
from erniekit.data.encoders import encoder_of, template_of
from erniekit.data.indexed import Indexed, share
from erniekit.data.judged import NEIGHBOURS, JudgedEncoder
from erniekit.data.mix import Mix
from erniekit.data.pack import START, Cursor, Drawn, Row, pack
from erniekit.data.pictures import Beside
from erniekit.data.sources import DataError, Source, open_source
from erniekit.data.text import TextEncoder
from erniekit.rewards import judged

log = logging.getLogger("erniekit")

_SHOWN = 5  # faults logged in full
_ENOUGH = 200  # records after which the number of faults is judged, so that it says something


@dataclass
class Faults:
    """What could not be used of `size` records, by reason."""

    max_share: float
    size: int
    is_silent: bool = False
    read: int = 0
    by_reason: Counter[str] = field(default_factory=Counter)
    _known: set[str] = field(default_factory=set)

    @property
    def total(self) -> int:
        return sum(self.by_reason.values())

    def add(self, where: str, error: DataError) -> None:
        """Count a record, unless it has been met before: ahead of training, or an epoch ago."""
        if where in self._known:
            return
        self._known.add(where)
        reason = str(error)
        self.by_reason[kind_of(error)] += 1
        if self.is_silent:
            return
        if self.total <= _SHOWN:
            log.warning("left out %s: %s", where, reason)
        elif self.total == _SHOWN + 1:
            log.warning("more records are left out; they are counted and reported at the end")

    def judge(self, *, at_end: bool = False) -> None:
        """Raises DataError when too large a share of all records cannot be used."""
        is_enough = at_end or self.read >= min(_ENOUGH, self.size)
        if is_enough and self.total > self.max_share * self.size:
            raise DataError(
                f"{self.total} of {self.size} records cannot be used{'' if at_end else ' so far'} "
                f"({self.worst}); raise max_bad_data_share={self.max_share}, or repair the data, "
                "with which a run that has begun goes on by ignore_changed_inputs=true"
            )

    @property
    def worst(self) -> str:
        return ", ".join(f"{reason} ({n})" for reason, n in self.by_reason.most_common(3))


def kind_of(error: DataError) -> str:
    """What is wrong with a record, in words that other records share."""
    return re.sub(r"\[\d+\]|\d+(?= tokens)", "#", str(error).split(";")[0])


class Stream:
    """The records of a split as samples and rows. One per split; iterating starts anew."""

    def __init__(self, data: Data, split: str, encoder: Encoder, *, seed: int) -> None:
        kinds, paths, weights = zip(*data.files(split))
        self.data, self.encoder = data, encoder
        self.kinds = kinds
        self.sources = [_opened(data, split, kind, path) for kind, path in zip(kinds, paths)]
        if encoder.reader is not None:
            self.sources = [Beside(source) for source in self.sources]
        training = split == "train"
        self.way = "separate" if not data.packing else "sequential"
        if training and data.packing and data.greedy_intokens:
            self.way = "greedy"
        if isinstance(encoder, TextEncoder):
            # Weights are shares of the text: a file of long documents is drawn from less often.
            weights = tuple(w * len(s) / max(s.size, 1) for w, s in zip(weights, self.sources))
            if data.packing and data.truncate_packing:
                self.way = "full"
        self.mix = Mix(
            [len(source) for source in self.sources],
            weights,
            strategy=data.mix_strategy if training else "concat",
            shuffle=data.random_shuffle and training,
            limit=data.num_samples_each_epoch,
            seed=seed,
        )
        num_records = sum(len(self.sources[number]) for number in self.mix.drawn)
        self.faults = Faults(data.max_bad_data_share, num_records)
        self.rewards: tuple[str, ...] = ()  # that must be able to judge each record
        self.on_read: Callable[[Sample], None] | None = None  # is given each sample, before rows

    @cached_property
    def epoch_size(self) -> int:
        return self.mix.epoch_size

    def again(self) -> Stream:
        """The same records for another reader, with counts and faults of its own; these are not
        logged.
        """
        other = copy.copy(self)
        other.encoder, other.on_read = copy.copy(self.encoder), None
        other.encoder.counts = Counter()
        other.faults = Faults(self.faults.max_share, self.faults.size, is_silent=True)
        return other

    def shuffled(self) -> Stream:
        """The same records in an order of chance, with the same counts and faults."""
        other = copy.copy(self)
        other.mix = copy.copy(self.mix)
        other.mix.shuffle = True
        return other

    def samples(self, start: Cursor, end: int | None = None) -> Iterator[Drawn]:
        """Samples of the records from `start` on, up to position `end` (without end if None).

        Raises DataError where an epoch has none, and the search for one would not end.
        """
        length = None if end is None else max(end - start.position, 0)
        draws, num_idle = islice(self.mix.draws(start.position), length), 0
        for position, (source, index) in enumerate(draws, start.position):
            skipped = start.part if position == start.position else 0
            found = self._read(source, index)
            num_idle = 0 if found else num_idle + 1
            if end is None:
                self.check_use(num_idle)
            for part, sample in enumerate(found):
                if part < skipped:
                    continue
                if self.on_read is not None:
                    self.on_read(sample)
                drawn = Drawn(position, part, sample)
                is_first = position == start.position and part == start.part
                yield drawn.piece(start.offset, len(drawn)) if is_first else drawn

    def _read(self, source: int, index: int) -> list[Sample]:
        self.faults.read += 1
        try:
            samples = self.read(source, index)
        except DataError as error:
            self.faults.add(self.sources[source].where(index), error)
            samples = []
        self.faults.judge()
        return samples

    def check_use(self, num_idle: int) -> None:
        """Raises DataError after a whole epoch of records in a row that gave no sample."""
        if num_idle >= self.epoch_size:
            raise DataError(
                f"none of {num_idle} records can be used ({self.faults.worst}); repair the data"
            )

    def read(self, source: int, index: int) -> list[Sample]:
        """The samples of a record of a file; raises DataError for one that cannot be used."""
        record, kind = self.sources[source][index], self.kinds[source]
        if self.rewards:
            dialogue = self.encoder.dialogue(record, kind)
            samples = self.encoder.samples(dialogue)
            judged(record, dialogue.messages, self.rewards)
            return samples
        samples = self.encoder.read(record, kind)
        if isinstance(self.encoder, JudgedEncoder):
            samples = self.encoder.completed(samples, self._following(source, index))
        return samples

    def _following(self, source: int, index: int) -> Iterator[tuple[Any, str]]:
        """The records after one in its file, with their format; after the last comes the first."""
        records, kind = self.sources[source], self.kinds[source]
        for step in range(1, min(len(records), NEIGHBOURS + 1)):
            with contextlib.suppress(DataError):  # told where it is read for itself
                yield records[(index + step) % len(records)], kind

    def drawn_rows(self, start: Cursor = START, end: int | None = None) -> Iterator[Row]:
        """(row with its places, cursor after it) from a cursor on."""
        return islice(self.packed(self.samples(start._replace(rows=0), end)), start.rows, None)

    def packed(self, samples: Iterable[Drawn]) -> Iterator[Row]:
        """Samples in rows, as training packs them."""
        data, seed = self.data, self.mix.seed if self.mix.shuffle else None
        return pack(
            samples, data.max_seq_len, way=self.way, buffer_size=data.buffer_size, seed=seed
        )

    def rows(self, start: Cursor = START, end: int | None = None) -> Iterator[Any]:
        """(row, cursor after it) from a cursor on."""
        for row, cursor in self.drawn_rows(start, end):
            yield [drawn.sample for drawn in row], cursor

    def batches(
        self, batch_size: int, start: Cursor = START, end: int | None = None
    ) -> Iterator[Batch]:
        """Batches of `batch_size` rows; the last of a bounded stream may have fewer."""
        fixed_size = batch_size * self.data.max_seq_len if self.data.padding else 0
        rows = self.rows(start, end)
        while group := list(islice(rows, batch_size)):
            yield batch_of([row for row, _ in group], group[-1][1], fixed_size=fixed_size)


def _opened(data: Data, split: str, kind: str, path: str) -> Source:
    """A file of records, tasks that are made, or a split's share of the documents of a prefix."""
    if kind == tasks.KIND:
        return tasks.Tasks(path)
    if kind != "indexed":
        return open_source(path)
    source = Indexed(path)
    source.first, source.last = share(
        source.num_documents, data.split, ("train", "eval").index(split)
    )
    if not len(source):
        raise ConfigError(
            f"split={','.join(f'{s:g}' for s in data.split)} leaves none of the "
            f"{source.num_documents} documents of {path} for {split}; give other shares"
        )
    return source


def stream(run: Run, split: str, tokenizer: Tokenizer | None = None) -> Stream:
    """The records of a split, encoded with the `tokenizer` of the run's model, which is read where
    none is given, and its template where they are dialogues.
    """
    folder = resolve(run.model.model_name_or_path)
    tokenizer = tokenizer or Tokenizer.from_folder(folder)
    encoder: Encoder
    if run.stage.sample == "document":
        encoder = TextEncoder(tokenizer, run.data.max_seq_len)
    else:
        encoder = encoder_of(run, tokenizer, template_of(run, folder, tokenizer))
    found = Stream(run.data, split, encoder, seed=run.training.seed)
    found.rewards = run.policy.reward if run.stage.has_rollouts else ()
    return found
