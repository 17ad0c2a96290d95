"""Dialogues with pictures to samples of a multimodal model: tokens, labels, pictures, positions.

Pictures are read here, by the thread that makes batches, so that a file that is missing, broken or
too large is told with its record. They stay bytes (`ernie.vision.processor.Picture`) until the
model normalises them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ernie.chat import ChatError, ChatTemplate, Encoded
from ernie.chat.messages import MEDIA, pictures_of
from ernie.config import ErnieConfig
from ernie.tokenizer import Tokenizer, TokenizerError
from ernie.vision.positions import is_placeholder, modality_of, positions_of
from ernie.vision.processor import Picture
from ernie.vision.prompt import Processor
from ernie.vision.sources import MediaError
from erniekit.data.dialogue import Dialogue, Encoder, Sample
from erniekit.data.pictures import read_pictured
from erniekit.data.sources import DataError


@dataclass(frozen=True)
class PicturedSample(Sample):
    """A sample of a multimodal model, with the pictures that its placeholders stand for, in order
    of appearance; also one of text alone, without any.
    """

    pictures: tuple[Picture, ...] = field(default=(), compare=False)
    positions_3T: np.ndarray = field(default_factory=lambda: np.empty((3, 0)), compare=False)
    modality_T: np.ndarray = field(default_factory=lambda: np.empty(0), compare=False)
    is_place_T: np.ndarray = field(default_factory=lambda: np.empty(0), compare=False)

    @property
    def positions(self) -> np.ndarray:
        return self.positions_3T

    @property
    def mark(self) -> bytes:
        return "".join(picture.digest for picture in self.pictures).encode()

    @property
    def num_bytes(self) -> int:
        return sum(picture.rows.nbytes for picture in self.pictures)


class PictureEncoder(Encoder):
    """Turns dialogues with pictures into samples; each trained answer is one of its own, because
    the templates write an answer differently once the dialogue goes on.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        max_tokens: int,
        *,
        config: ErnieConfig,
        processor: Processor,
    ) -> None:
        super().__init__(tokenizer, template, max_tokens, one_answer_per_sample=True)
        self.config, self.processor = config, processor
        self._last: tuple[Any, Dialogue] | None = None  # so that no record is decoded twice

    def dialogue(self, record: Any, kind: str) -> Dialogue:
        """With every picture read; raises DataError."""
        if self._last is None or self._last[0] is not record:
            found = read_pictured(record, kind)
            messages = self._with_pictures(found.messages)
            self._last = record, replace(found, messages=messages)
        return self._last[1]

    def _with_pictures(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        found = pictures_of(messages)
        if not found:
            return messages
        seed = zlib.crc32(repr([source for _, source, _ in found]).encode())
        try:
            pictures = iter(self.processor.pictures(messages, seed=seed))
        except (MediaError, ChatError) as error:
            raise DataError(str(error)) from None
        return [
            {**m, "content": [_read_part(part, pictures) for part in m["content"]]}
            if isinstance(m.get("content"), list)
            else m
            for m in messages
        ]

    def encode(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> Encoded:
        sizes = [(picture.kind, picture.num_tokens) for picture in _read(messages)]
        extra = {"tools": tools} if tools else {}
        try:
            return self.template.encode(
                self.tokenizer, messages, sizes, add_generation_prompt=False, **extra
            )
        except (ChatError, TokenizerError) as error:
            raise DataError(str(error)) from None

    def sample_of(
        self, encoded: Encoded, messages: Sequence[Mapping[str, Any]], num_cut: int
    ) -> Sample:
        pictures = _read(messages)
        pictures = pictures[len(pictures) - len(encoded.pictures) :]  # the oldest turns are cut
        ordered = tuple(pictures[number] for number, *_ in encoded.pictures)
        ids = np.asarray(encoded.token_ids[:-1], np.int64)
        try:
            positions = positions_of(ids, [picture.grid for picture in ordered], self.config)
        except ValueError as error:
            raise DataError(str(error)) from None
        return PicturedSample(
            encoded.token_ids[:-1],
            encoded.labels[1:],
            num_cut,
            ordered,
            positions,
            modality_of(ids, self.config),
            is_placeholder(ids, self.config),
        )


def _read(messages: Sequence[Mapping[str, Any]]) -> list[Picture]:
    return [picture for _, picture, _ in pictures_of(messages)]


def _read_part(part: dict[str, Any], pictures: Iterator[Picture]) -> dict[str, Any]:
    kind = MEDIA.get(part["type"])
    return part if kind is None else {"type": kind, kind: next(pictures)}
