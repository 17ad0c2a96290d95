"""A batch of arrays as tensors on the device of the model, in the form that its loss takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ernie.kernels.transfer import moved
from ernie.vision.grids import Grids

if TYPE_CHECKING:
    from erniekit.data.batch import Batch, Pictures


@dataclass(frozen=True)
class Flat:
    """A batch on the device of the model."""

    token_ids_T: Tensor
    labels_T: Tensor
    positions_T: Tensor  # (3, T) of a multimodal model
    cu_seqlens_S1: Tensor
    lengths: tuple[int, ...] | None = None  # of the segments, where the host knows them
    numbers: Mapping[str, Tensor] = field(default_factory=dict)  # what a method has of its own
    pictures: Seen | None = None
    num_padding: int = 0  # of the last tokens, which are of no sample


@dataclass(frozen=True)
class Seen:
    """The pictures of a batch of a multimodal model, on its device, as `ErnieModel` takes them."""

    pixel_values_PC: Tensor
    grids: Grids
    places_L: Tensor
    modality_T: Tensor


@dataclass(frozen=True)
class Judged:
    """Judged answers on the device of the model, one segment each; `others` are segments with the
    same prompts and answers to other ones. `keys` name them, in order.
    """

    answers: Flat
    others: Flat
    is_desirable_S: Tensor
    keys: tuple[bytes, ...] = ()

    @property
    def token_ids_T(self) -> Tensor:
        return self.answers.token_ids_T


@dataclass(frozen=True)
class Pairs:
    """A row of pairs on the device of the model; `pairs_P4` is that of `shared_prompt`, int64.

    `keys` name the pairs, in order.
    """

    token_ids_T: Tensor
    labels_T: Tensor
    positions_T: Tensor
    pairs_P4: Tensor
    keys: tuple[bytes, ...] = ()
    pictures: Seen | None = None


def to_device(batch: Batch, device: torch.device) -> Flat | Pairs | Judged:
    """The arrays of a batch as tensors of what its stage trains on."""
    if batch.others is not None and batch.is_desirable_S is not None:
        answers = to_device(dataclasses.replace(batch, others=None), device)
        others = to_device(batch.others, device)
        assert isinstance(answers, Flat) and isinstance(others, Flat)
        return Judged(answers, others, _moved(batch.is_desirable_S, device), batch.keys)
    pairs_P4 = batch.pairs_P4
    bounds = batch.cu_seqlens_S1 if pairs_P4 is None else pairs_P4
    arrays = (batch.token_ids_T, batch.labels_T, batch.positions_T, bounds)
    ids_T, labels_T, positions_T, ends = (_moved(array, device) for array in arrays)
    seen = None if batch.pictures is None else _seen(batch.pictures, device)
    if pairs_P4 is None:
        lengths = tuple(np.diff(batch.cu_seqlens_S1).tolist())
        numbers = {name: _moved(n, device) for name, n in batch.numbers.items()}
        missing = len(batch.token_ids_T) - batch.num_tokens
        return Flat(ids_T, labels_T, positions_T, ends, lengths, numbers, seen, missing)
    return Pairs(ids_T, labels_T, positions_T, ends, batch.keys, seen)


def _seen(pictures: Pictures, device: torch.device) -> Seen:
    arrays = (pictures.pixel_values_PC, pictures.places_L, pictures.modality_T)
    pixels_PC, places_L, modality_T = (_moved(array, device) for array in arrays)
    return Seen(pixels_PC, pictures.grids, places_L, modality_T)


def _moved(array: np.ndarray, device: torch.device) -> Tensor:
    return moved(torch.from_numpy(array), device)
