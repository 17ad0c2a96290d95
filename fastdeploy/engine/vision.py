"""Pictures in the engine: where the tokens of a prompt with pictures stand, and the rows that take
the places of its placeholder tokens.

    Layout         of one prompt: positions and experts of its tokens, names of its pictures
    PictureRows    what vision tower and resampler made of pictures, found by their digests

A picture is computed whole, before the step that first needs a row of it; a step takes the rows
whose tokens it has. So a prompt may be cut anywhere, also within a picture, and a picture whose
tokens are all found in the prefix cache is never computed.

Legend: T tokens of a prompt, N of a part of it, L rows, D hidden size.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ernie.config import ErnieConfig
from ernie.model import TEXT_ONLY, Embeds, ErnieModel
from ernie.vision.grids import grids_of
from ernie.vision.positions import is_placeholder, modality_of, positions_of
from ernie.vision.prompt import Inputs, Span
from fastdeploy.errors import RequestError

if TYPE_CHECKING:
    from fastdeploy.engine.scheduler import ScheduledRequest

Prompt = Sequence[int] | Inputs


@dataclass(frozen=True, eq=False, slots=True)
class Layout:
    """Of a prompt that has tokens of vision; what is generated behind it is text."""

    positions_3T: np.ndarray  # int64: time, height, width
    modality_T: np.ndarray  # int64: 0 text, 1 vision
    shift: int  # token number i behind the prompt stands at position i + shift
    key_ids: list[int]  # the token ids, with the name of the picture in place of each placeholder
    pictures: tuple[Span, ...]
    pixel_values: np.ndarray | None

    @classmethod
    def of(cls, prompt: Prompt, config: ErnieConfig) -> Layout | None:
        """None for a prompt that is text and nothing else. Raises RequestError where tokens and
        pictures do not belong together, or the model reads text only.
        """
        inputs = prompt if isinstance(prompt, Inputs) else None
        spans = inputs.pictures if inputs else ()
        if config.vision_config is None:
            if spans:
                raise RequestError(TEXT_ONLY, param="prompt")
            return None
        token_ids = np.array(token_ids_of(prompt), np.int64)
        modality_T = modality_of(token_ids, config)
        if not spans and not modality_T.any():
            return None
        try:
            grids = grids_of([span.grid for span in spans], config.vision_config.spatial_merge_size)
            positions_3T = positions_of(token_ids, grids, config)
        except ValueError as error:
            raise RequestError(f"the prompt: {error}", param="prompt") from None
        if inputs:
            _check_spans(inputs, is_placeholder(token_ids, config), config)
        key_ids = token_ids.tolist()
        for span in spans:
            key_ids[span.start : span.stop] = [_name_of(span)] * (span.stop - span.start)
        shift = int(positions_3T.max()) + 1 - len(token_ids)
        pixels = inputs.pixel_values if inputs else None
        return cls(positions_3T, modality_T, shift, key_ids, spans, pixels)

    def at(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions `(3, N)` and modality `(N,)` of tokens of the text, prompt and answer."""
        length = len(self.modality_T)
        behind = np.arange(max(start, length), max(stop, length)) + self.shift
        positions_3N = np.concatenate(
            (self.positions_3T[:, start:stop], np.tile(behind, (3, 1))), axis=1
        )
        return positions_3N, np.concatenate(
            (self.modality_T[start:stop], np.zeros(len(behind), np.int64))
        )


def token_ids_of(prompt: Prompt) -> Sequence[int]:
    return prompt.token_ids if isinstance(prompt, Inputs) else prompt


def _check_spans(inputs: Inputs, is_place_T: np.ndarray, config: ErnieConfig) -> None:
    assert config.vision_config is not None
    told_T = np.zeros(len(is_place_T), bool)
    num_patches = 0
    for span in inputs.pictures:
        told_T[span.start : span.stop] = True
        if span.first_row != num_patches:
            raise RequestError(
                f"a picture begins at patch {span.first_row}; those before it end at {num_patches}",
                param="prompt",
            )
        num_patches += int(np.prod(span.grid))
    if (told_T != is_place_T).any():
        raise RequestError(
            f"the spans of {len(inputs.pictures)} pictures are not where the placeholder tokens "
            "stand; give the inputs as ernie.vision.prompt makes them",
            param="prompt",
        )
    wanted = (num_patches, config.vision_config.patch_elements)
    if inputs.pixel_values.shape != wanted:
        raise RequestError(
            f"pixel_values are {inputs.pixel_values.shape}; the grids ask for {wanted}",
            param="prompt",
        )


def _name_of(span: Span) -> int:
    """A number for a picture that no token has: in a block's key it stands for its pixels."""
    digest = hashlib.blake2b(span.digest.encode(), digest_size=16).digest()
    return -1 - int.from_bytes(digest, "little")


Key = tuple[str | None, str]  # the salt of a request, and the digest of a picture


class PictureRows:
    """Rows of pictures, the least recently used dropped first where they exceed `max_bytes`.

    They are found, like cached blocks, only by requests of the salt that they were made for. Those
    of a picture that is partly read stay in any case, until the rest of it is.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.rows_by_key: OrderedDict[Key, Tensor] = OrderedDict()
        self.num_bytes = 0
        self.num_computed = 0  # pictures that went through the tower
        self.num_hits = 0  # pictures of requests that did not have to

    def embeds(self, parts: Sequence[ScheduledRequest], model: ErnieModel) -> Embeds | None:
        """What takes the places of placeholder tokens in the batch of `parts`, None for nothing."""
        rows, places, first = [], [], 0
        half_read: set[Key] = set()
        for part in parts:
            layout, end = part.request.layout, part.start + part.num_tokens
            first, at = first + part.num_tokens, first
            if layout is None or part.start >= part.request.num_prompt:
                continue
            for span in layout.pictures:
                begin, stop = max(span.start, part.start), min(span.stop, end)
                if begin >= stop:
                    continue
                key = part.request.cache_salt, span.digest
                is_first = begin == span.start or part.start == part.request.num_cached
                self.num_hits += is_first and key in self.rows_by_key
                rows_LD = self._rows(key, span, layout, model)
                rows.append(rows_LD[begin - span.start : stop - span.start])
                places.append(np.arange(begin, stop) - part.start + at)
                if stop < span.stop:
                    half_read.add(key)
        self._shrink(half_read)
        if not rows:
            return None
        rows_LD = torch.cat(rows).to(model.activation_dtype)
        return Embeds(rows_LD, torch.from_numpy(np.concatenate(places)).to(model.device))

    def forget(self) -> None:
        """Drop all rows: those of other weights are others."""
        self.rows_by_key.clear()
        self.num_bytes = 0

    def _rows(self, key: Key, span: Span, layout: Layout, model: ErnieModel) -> Tensor:
        rows_LD = self.rows_by_key.get(key)
        if rows_LD is None:
            assert layout.pixel_values is not None
            end = span.first_row + int(np.prod(span.grid))
            patches_PC = torch.as_tensor(layout.pixel_values[span.first_row : end])
            rows_LD = model.picture_rows(patches_PC.to(model.device), [span.grid])
            self.rows_by_key[key] = rows_LD
            self.num_bytes += rows_LD.nbytes
            self.num_computed += 1
        self.rows_by_key.move_to_end(key)
        return rows_LD

    def _shrink(self, kept: set[Key]) -> None:
        for key in [*self.rows_by_key]:
            if self.num_bytes <= self.max_bytes:
                return
            if key not in kept:
                self.num_bytes -= self.rows_by_key.pop(key).nbytes
