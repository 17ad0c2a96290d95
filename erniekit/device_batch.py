"""A batch of arrays as tensors on the device of the model, in the form that its loss takes."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from erniekit.data.batch import Batch, Pictures
from erniekit.losses import Flat, Seen
from erniekit.preference import Judged, Pairs


def to_device(batch: Batch, device: torch.device) -> Flat | Pairs | Judged:
    """The arrays of a batch as tensors of what its stage trains on."""
    if batch.others is not None and batch.is_desirable_S is not None:
        answers = to_device(dataclasses.replace(batch, others=None), device)
        others = to_device(batch.others, device)
        assert isinstance(answers, Flat) and isinstance(others, Flat)
        return Judged(
            answers, others, torch.from_numpy(batch.is_desirable_S).to(device), batch.keys
        )
    pairs_P4 = batch.pairs_P4
    bounds = batch.cu_seqlens_S1 if pairs_P4 is None else pairs_P4
    arrays = (batch.token_ids_T, batch.labels_T, batch.positions_T, bounds)
    tensors = [torch.from_numpy(array) for array in arrays]
    if device.type == "cuda":  # a copy from other memory waits for all work before it
        tensors = [tensor.pin_memory() for tensor in tensors]
    ids_T, labels_T, positions_T, ends = (t.to(device, non_blocking=True) for t in tensors)
    seen = None if batch.pictures is None else _seen(batch.pictures, device)
    if pairs_P4 is None:
        lengths = tuple(np.diff(batch.cu_seqlens_S1).tolist())
        numbers = {name: torch.from_numpy(n).to(device) for name, n in batch.numbers.items()}
        return Flat(ids_T, labels_T, positions_T, ends, lengths, numbers, seen)
    return Pairs(ids_T, labels_T, positions_T, ends, batch.keys, seen)


def _seen(pictures: Pictures, device: torch.device) -> Seen:
    arrays = (pictures.pixel_values_PC, pictures.places_L, pictures.modality_T)
    pixels_PC, places_L, modality_T = (torch.from_numpy(array).to(device) for array in arrays)
    return Seen(pixels_PC, pictures.grids, places_L, modality_T)
