"""What a sample of a multimodal model has beside its tokens: pictures, positions, kinds of tokens.

Pictures are read here, by the thread that makes batches, so that a file that is missing, broken or
too large is told with its record. They stay bytes (`ernie.vision.processor.Picture`) until the
model normalises them. Every encoder takes a `PictureReader`; what it makes of dialogues, pairs and
judged answers is otherwise the same.

Legend: T tokens of a sample.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ernie.chat import ChatError, Encoded
from ernie.chat.messages import MEDIA, pictures_of
from ernie.config import ErnieConfig
from ernie.vision.positions import is_placeholder, modality_of, positions_of
from ernie.vision.processor import Picture
from ernie.vision.prompt import Processor
from ernie.vision.sources import MediaError
from erniekit.data.dialogue import Dialogue
from erniekit.data.pictures import read_pictured
from erniekit.data.sources import DataError


@dataclass(frozen=True)
class Media:
    """The pictures that the placeholders of a sample stand for, in order of appearance, and what
    the model must know of its tokens; also of a sample of text alone, without any.
    """

    pictures: tuple[Picture, ...]
    positions_3T: np.ndarray  # int64
    modality_T: np.ndarray  # int64, as in `ernie.vision.positions`
    is_place_T: np.ndarray  # bool

    @property
    def mark(self) -> bytes:
        return "".join(picture.digest for picture in self.pictures).encode()

    @property
    def num_bytes(self) -> int:
        return sum(picture.rows.nbytes for picture in self.pictures)

    def cut(self, start: int, stop: int) -> Media:
        """Of the tokens from `start` to `stop`, between which no picture is cut."""
        done = np.cumsum([0, *(picture.num_tokens for picture in self.pictures)])
        first, last = (
            int(np.searchsorted(done, self.is_place_T[:token].sum())) for token in (start, stop)
        )
        tokens = slice(start, stop)
        return Media(
            self.pictures[first:last],
            self.positions_3T[:, tokens],
            self.modality_T[tokens],
            self.is_place_T[tokens],
        )


class PictureReader:
    """Reads the pictures of messages, and says where the tokens of a sequence with them stand."""

    def __init__(self, config: ErnieConfig, processor: Processor) -> None:
        self.config, self.processor = config, processor
        self._last: tuple[str, list[Picture]] = "", []  # so that no record is decoded twice

    def read(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages with pictures in place of their sources; raises DataError."""
        sources = repr([source for _, source, _ in pictures_of(messages)])
        if sources == "[]":
            return messages
        if self._last[0] != sources:
            seed = zlib.crc32(sources.encode())
            try:
                self._last = sources, self.processor.pictures(messages, seed=seed)
            except (MediaError, ChatError) as error:
                raise DataError(str(error)) from None
        pictures = iter(self._last[1])
        return [
            {**m, "content": [_read_part(part, pictures) for part in m["content"]]}
            if isinstance(m.get("content"), list)
            else m
            for m in messages
        ]

    def dialogue(self, record: Any, kind: str) -> Dialogue:
        """The dialogue in a record, with every picture read; raises DataError."""
        found = read_pictured(record, kind)
        return replace(found, messages=self.read(found.messages))

    @staticmethod
    def joined(parts: Sequence[Media]) -> Media:
        """Of parts that stand one after the other, with the positions that each has."""
        return Media(
            tuple(picture for part in parts for picture in part.pictures),
            np.concatenate([part.positions_3T for part in parts], axis=1),
            np.concatenate([part.modality_T for part in parts]),
            np.concatenate([part.is_place_T for part in parts]),
        )

    def sizes(self, messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
        """Kind and number of tokens of the pictures of messages that were read."""
        return [(picture.kind, picture.num_tokens) for picture in _pictures(messages)]

    def media_of(
        self, token_ids: Sequence[int], encoded: Encoded, messages: Sequence[Mapping[str, Any]]
    ) -> Media:
        """What stands beside the first tokens of an encoded dialogue, which hold all its pictures;
        `messages` may begin with turns that were cut off. Raises DataError.
        """
        pictures = _pictures(messages)
        kept = pictures[len(pictures) - len(encoded.pictures) :]
        return self.media(token_ids, [kept[number] for number, *_ in encoded.pictures])

    def media(self, token_ids: Sequence[int], pictures: Sequence[Picture]) -> Media:
        """Of a sequence with these pictures in this order; raises DataError."""
        ids_T = np.asarray(token_ids, np.int64)
        try:
            positions_3T = positions_of(ids_T, [p.grid for p in pictures], self.config)
        except ValueError as error:
            raise DataError(str(error)) from None
        modality_T = modality_of(ids_T, self.config)
        return Media(tuple(pictures), positions_3T, modality_T, is_placeholder(ids_T, self.config))


def _pictures(messages: Sequence[Mapping[str, Any]]) -> list[Picture]:
    return [picture for _, picture, _ in pictures_of(messages)]


def _read_part(part: dict[str, Any], pictures: Iterator[Picture]) -> dict[str, Any]:
    kind = MEDIA.get(part["type"])
    return part if kind is None else {"type": kind, kind: next(pictures)}
