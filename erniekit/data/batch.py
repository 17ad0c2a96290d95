"""Rows of samples as the flat arrays of a step: tokens, bounds of segments, and what goes beside.

Legend: T tokens of the flat batch, S segments (samples), P patches of pictures (of `pairs_P4`:
pairs), C elements of a patch, L tokens that stand for rows of pictures.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ernie.chat import UNTRAINED
from erniekit.data.dialogue import Sample
from erniekit.data.judged import JudgedSample
from erniekit.data.multimodal import PictureReader
from erniekit.data.pack import Cursor
from erniekit.data.preference import PairSample


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
    """Rows laid one after the other. Arrays here; `erniekit.device_batch` makes tensors."""

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
