"""From files to batches: the stream of records, its faults, and the flat tensors of a step.

    sources -> mix -> dialogues -> samples -> rows -> batches of flat tokens

Legend: T tokens of the flat batch, S segments (samples), P patches of pictures, C elements of a
patch, L tokens that stand for rows of pictures.

Records that cannot be used are never silent: each is logged (the first few in full), all are
counted by reason, and a share of them above `max_bad_data_share` ends the run with `DataError`.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import queue
import re
import threading
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ernie.chat import UNTRAINED, VL, VL_THINKING, ChatTemplate
from ernie.checkpoint.hub import resolve
from ernie.config import ErnieConfig
from ernie.settings import ConfigError
from ernie.tokenizer import Tokenizer
from ernie.vision.prompt import Processor
from ernie.vision.settings import VisionSettings, font_of
from ernie.vision.sources import MediaError, Sources
from erniekit.config import Data, Run, changed
from erniekit.config.checks import check_every_weight_is_used
from erniekit.data import tasks
from erniekit.data.dialogue import Encoder, Sample
from erniekit.data.indexed import Indexed, share
from erniekit.data.judged import NEIGHBOURS, JudgedEncoder, JudgedSample
from erniekit.data.mix import Mix
from erniekit.data.multimodal import PictureReader
from erniekit.data.pack import START, Cursor, Drawn, Row, pack
from erniekit.data.pictures import Beside
from erniekit.data.preference import PairEncoder, PairSample
from erniekit.data.sources import DataError, Source, open_source
from erniekit.data.text import TextEncoder

log = logging.getLogger("erniekit")

_SHOWN = 5  # faults logged in full
_ENOUGH = 200  # records after which the share of faults is judged


@dataclass(frozen=True)
class Pictures:
    """The pictures of a batch, in order of appearance, and which tokens are about them."""

    pixel_values_PC: np.ndarray  # uint8
    grids: list[tuple[int, int, int]]
    places_L: np.ndarray  # int64, of the tokens that stand for their rows
    modality_T: np.ndarray  # int64, as in `ernie.vision.positions`

    @classmethod
    def of(cls, samples: list[Sample], missing: int) -> Pictures | None:
        """Those of samples with `missing` tokens of padding behind; None for a text model's."""
        parts = [sample.media for sample in samples if sample.media is not None]
        if not parts:
            return None
        media = PictureReader.joined(parts)
        rows = [picture.rows for picture in media.pictures]
        return cls(
            np.concatenate(rows) if rows else np.empty((0, 0), np.uint8),
            [picture.grid for picture in media.pictures],
            media.is_place_T.nonzero()[0],
            np.pad(media.modality_T, (0, missing)),
        )


@dataclass
class Batch:
    """Rows laid one after the other. Arrays here; `erniekit.loop` makes tensors of them."""

    token_ids_T: np.ndarray  # int64
    labels_T: np.ndarray  # int64, the token that follows, UNTRAINED where there is no loss
    positions_T: np.ndarray  # int64, from 0 in every segment; (3, T) of a multimodal model
    cu_seqlens_S1: np.ndarray  # int32, bounds of the segments
    cursor: Cursor  # how the stream goes on after this batch
    num_tokens: int  # without padding
    num_trained: int
    pairs_P4: np.ndarray | None = None  # int64, bounds as in `ernie.attention.shared_prompt`
    keys: tuple[bytes, ...] = ()  # of the pairs, or of the judged answers
    is_desirable_S: np.ndarray | None = None  # bool, of judged answers
    others: Batch | None = None  # the same prompts with answers to other ones
    numbers: dict[str, np.ndarray] = field(default_factory=dict)  # what a method has of its own
    pictures: Pictures | None = None  # of a batch of a multimodal model, be it without any

    @property
    def num_samples(self) -> int:
        """Segments without that of padding."""
        return int((self.cu_seqlens_S1[1:] <= self.num_tokens).sum())

    @property
    def num_patches(self) -> int:
        return 0 if self.pictures is None else len(self.pictures.pixel_values_PC)

    @property
    def weight(self) -> int:
        """What its loss is a sum over: pairs or judged answers, else trained tokens."""
        return len(self.keys) or self.num_trained

    @property
    def unit(self) -> str:
        """What `keys` name: pairs or answers."""
        return "pairs" if self.is_desirable_S is None else "answers"


def batch_of(rows: list[list[Sample]], cursor: Cursor, *, fixed_size: int = 0) -> Batch:
    """Flat arrays of some rows; with `fixed_size` filled up to that many tokens by one segment of
    untrained zeros.
    """
    samples = [sample for row in rows for sample in row]
    ids = np.concatenate([np.asarray(s.token_ids, np.int64) for s in samples])
    labels = np.concatenate([np.asarray(s.labels, np.int64) for s in samples])
    lengths = [len(s) for s in samples]
    num_tokens, missing = len(ids), max(fixed_size - len(ids), 0)
    if missing:
        ids = np.pad(ids, (0, missing))
        labels = np.pad(labels, (0, missing), constant_values=UNTRAINED)
        lengths.append(missing)
    bounds_S1 = np.concatenate(([0], np.cumsum(lengths)))
    pairs = [
        (start, start + sample.chosen, start + sample.rejected, start + len(sample))
        for start, sample in zip(bounds_S1, samples)
        if isinstance(sample, PairSample)
    ]
    return Batch(
        ids,
        labels,
        _positions(samples, missing),
        bounds_S1.astype(np.int32),
        cursor,
        num_tokens,
        int((labels != UNTRAINED).sum()),
        np.array(pairs, np.int64) if pairs else None,
        tuple(s.key for s in samples if isinstance(s, (PairSample, JudgedSample))),
        *_judged(samples, cursor),
        pictures=Pictures.of(samples, missing),
    )


def _positions(samples: list[Sample], missing: int) -> np.ndarray:
    """`(T,)`, or `(3, T)` of a multimodal model, with those of a segment of padding."""
    parts = [sample.positions for sample in samples]
    padding = np.broadcast_to(np.arange(missing), (*parts[0].shape[:-1], missing))
    return np.concatenate([*parts, padding], axis=-1)


def _judged(samples: list[Sample], cursor: Cursor) -> tuple[np.ndarray | None, Batch | None]:
    """Which samples are desirable, and what they are compared with; None of other samples."""
    judged = [sample for sample in samples if isinstance(sample, JudgedSample)]
    others = [sample.other for sample in judged if sample.other is not None]
    if not judged:
        return None, None
    return np.array([s.is_desirable for s in judged]), batch_of([others], cursor)


@dataclass
class Faults:
    """What could not be used, by reason."""

    max_share: float
    is_silent: bool = False
    read: int = 0
    by_reason: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return sum(self.by_reason.values())

    def add(self, where: str, error: DataError) -> None:
        reason = str(error)
        self.by_reason[kind_of(error)] += 1
        if self.is_silent:
            return
        if self.total <= _SHOWN:
            log.warning("left out %s: %s", where, reason)
        elif self.total == _SHOWN + 1:
            log.warning("more records are left out; they are counted and reported at the end")

    def judge(self, *, at_end: bool) -> None:
        """Raises DataError when too large a share of the records cannot be used."""
        judged = at_end or self.read >= _ENOUGH
        if judged and self.total > self.max_share * self.read:
            worst = ", ".join(f"{reason} ({n})" for reason, n in self.by_reason.most_common(3))
            raise DataError(
                f"{self.total} of {self.read} records cannot be used ({worst}); repair the data or "
                f"raise max_bad_data_share={self.max_share}"
            )


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
        self.faults = Faults(data.max_bad_data_share)

    @property
    def epoch_size(self) -> int:
        return self.mix.epoch_size

    def again(self) -> Stream:
        """The same records for another reader, with faults of its own that are not logged."""
        other = copy.copy(self)
        other.faults = Faults(self.data.max_bad_data_share, is_silent=True)
        return other

    def samples(self, start: Cursor, end: int | None = None) -> Iterator[Drawn]:
        """Samples of the records from `start` on, up to position `end` (without end if None)."""
        length = None if end is None else max(end - start.position, 0)
        draws = islice(self.mix.draws(start.position), length)
        for position, (source, index) in enumerate(draws, start.position):
            skipped = start.part if position == start.position else 0
            for part, sample in enumerate(self._read(source, index)):
                if part < skipped:
                    continue
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
        self.faults.judge(at_end=False)
        return samples

    def read(self, source: int, index: int) -> list[Sample]:
        """The samples of a record of a file; raises DataError for one that cannot be used."""
        samples = self.encoder.read(self.sources[source][index], self.kinds[source])
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


def kind_of(error: DataError) -> str:
    """What is wrong with a record, in words that other records share."""
    return re.sub(r"\[\d+\]|\d+(?= tokens)", "#", str(error).split(";")[0])


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
        encoder = encoder_of(run, tokenizer, _template(run, folder, tokenizer))
    return Stream(run.data, split, encoder, seed=run.training.seed)


def _template(run: Run, folder: Path, tokenizer: Tokenizer) -> ChatTemplate:
    """The one that the run names, else that of the model folder."""
    named = {"ernie_vl": VL, "ernie_vl_thinking": VL_THINKING}
    if run.data.chat_template in named:
        return named[run.data.chat_template]
    return ChatTemplate.for_folder(folder, tokenizer)


def processor_of(run: Run, folder: Path) -> Processor:
    """How pictures of training records are read: the limits of the model folder, with those that
    the run gives. Any file and public URL that a record names is read.
    """
    p, settings = run.pictures, VisionSettings.from_folder(folder)
    given: dict[str, Any] = {
        "image_min_pixels": p.min_pixels,
        "image_max_pixels": p.max_pixels,
        "video_min_pixels": p.video_min_pixels,
        "video_max_pixels": p.video_max_pixels,
        "video_fps": p.video_fps,
        "video_min_frames": p.video_min_frames,
        "video_max_frames": p.video_max_frames,
        "video_target_frames": p.video_target_frames,
        "video_frames_sample": p.video_frames_sample,
        "render_timestamp": p.render_timestamp,
    }
    try:
        settings = replace(settings, **{k: v for k, v in given.items() if v is not None})
    except MediaError as error:
        raise ConfigError(f"the limits of pictures do not fit: {error}") from None
    return Processor(settings=settings, sources=Sources(folder=Path("/")), font=font_of(folder))


def encoder_of(run: Run, tokenizer: Tokenizer, template: ChatTemplate) -> Encoder:
    """What reads the records of a stage with a template: pairs, judged answers, or dialogues."""
    data, p = run.data, run.preferences
    reader = _reader_of(run)
    if run.stage.sample == "pair":
        is_scored = run.stage.has_reward_head
        return PairEncoder(
            tokenizer,
            template,
            data.max_seq_len,
            max_prompt_tokens=min(p.max_prompt_len, data.max_seq_len - 10),
            masks_end=p.mask_out_eos_token and not is_scored,
            reads_end=is_scored,
            reader=reader,
        )
    if run.stage.sample == "answer":
        masks_end = p.mask_out_eos_token
        return JudgedEncoder(
            tokenizer, template, data.max_seq_len, masks_end=masks_end, reader=reader
        )
    return Encoder(
        tokenizer,
        template,
        data.max_seq_len,
        # The templates of multimodal models write an answer differently once a dialogue goes on.
        one_answer_per_sample=data.split_multi_turn or reader is not None,
        reader=reader,
    )


def _reader_of(run: Run) -> PictureReader | None:
    """What reads the pictures of a run's records; None where the stage or the model has none."""
    stage, folder = run.model.stage, resolve(run.model.model_name_or_path)
    config = ErnieConfig.from_folder(folder)
    if config.vision_config is not None:
        if not run.stage.reads_pictures:
            raise ConfigError(
                f"stage={stage} trains models of text, and {folder} reads pictures too; use "
                "stage: VL-SFT, which takes records of text as well"
            )
        check_every_weight_is_used(run)
        return PictureReader(config, processor_of(run, folder))
    if run.stage.needs_pictures:
        raise ConfigError(
            f"stage={stage} trains a model that reads pictures, which {folder} does not; use a VL "
            "model, or stage: SFT"
        )
    if given := [key for key in changed(run) if hasattr(run.pictures, key)]:
        raise ConfigError(
            f"{', '.join(given)} are about pictures, which {folder} does not "
            "read; leave them out, or use a VL model"
        )
    return None


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


def survey(stream: Stream, max_records: int) -> Survey:
    """Read and pack one epoch (at most `max_records` of it) without training on it.

    Raises DataError when too many records cannot be used, or none can.
    """
    epoch_size = stream.epoch_size
    num_read = min(epoch_size, max_records)
    digests, num_samples, num_rows, num_tokens, num_trained = set(), 0, 0, 0, 0
    for row, _ in stream.rows(end=num_read):
        num_rows += 1
        num_samples += len(row)
        for sample in row:
            num_tokens += len(sample)
            num_trained += sample.num_trained
            digests.add(digest(sample))
    stream.faults.judge(at_end=True)
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


def digest(sample: Sample) -> bytes:
    return hashlib.blake2b(sample.content, digest_size=8).digest()


def prefetched(batches: Iterable[Batch], depth: int) -> Generator[Batch, None, None]:
    """The same batches, prepared ahead by a background thread; errors are raised where they are
    met.
    """
    if not depth:
        yield from batches
        return
    done, stop = object(), threading.Event()
    ready: queue.Queue[Any] = queue.Queue(maxsize=depth)

    def put(item: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for batch in batches:
                if not put((batch, None)):
                    return
            put((done, None))
        except Exception as error:  # raised again by the consumer
            put((done, error))

    thread = threading.Thread(target=work, daemon=True, name="erniekit-data")
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is done:
                return
            yield item
    finally:
        stop.set()
        thread.join()
