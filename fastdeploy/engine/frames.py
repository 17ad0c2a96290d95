"""What rank 0 sends to the others, as bytes: batches, and their slices of adapters.

Legend: T tokens of the flat batch, L rows of pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from ernie.adapters import ActiveAdapters, Adapter, LayerPairs, Pair
from ernie.model import Embeds
from fastdeploy.engine.batch import OPTIONAL, TENSORS, Batch

INT32 = ("cu_seqlens_S1", "lens_S", "tables_SM")
PACKED = (*TENSORS, *OPTIONAL, "places_L", "serials_T")


def packed(batch: Batch) -> bytes:
    """One run of int64: for each tensor of a batch its number of dimensions (-1: there is none) and
    its sizes, then the values of all. Adapters go by their numbers, rows of pictures do not go.
    """
    places_L = None if batch.embeds is None else batch.embeds.places_L.cpu()
    tensors = [getattr(batch, name) for name in (*TENSORS, *OPTIONAL)]
    tensors += [places_L, serials(batch)]
    arrays = [None if tensor is None else tensor.numpy() for tensor in tensors]
    headers = [(-1,) if array is None else (array.ndim, *array.shape) for array in arrays]
    flat = [np.concatenate([np.array(header, np.int64) for header in headers])]
    flat += [array.ravel() for array in arrays if array is not None]
    return np.concatenate(flat, dtype=np.int64, casting="safe").tobytes()


def serials(batch: Batch) -> Tensor | None:
    """The serial of the adapter that changes each token, int64 `(T,)`, 0 where none does."""
    if batch.adapters is None:
        return None
    serials_T = torch.zeros_like(batch.token_ids_T)
    for adapter, rows_N in batch.adapters.groups:
        serials_T[rows_N] = adapter.serial
    return serials_T


def unpacked(data: bytes, adapter_by_serial: Mapping[int, Adapter]) -> Batch:
    """The batch that `packed` was given, in the host's memory; rows of pictures are `(L, 0)`."""
    values = np.frombuffer(data, np.int64)
    shapes, at = [], 0
    for _ in PACKED:
        num_dims = int(values[at])
        is_there = num_dims >= 0
        at += 1 + max(num_dims, 0)
        shapes.append(tuple(values[at - num_dims : at].tolist()) if is_there else None)
    tensors: dict[str, Any] = {}
    for name, shape in zip(PACKED, shapes):
        size = 0 if shape is None else int(np.prod(shape))
        array, at = values[at : at + size], at + size
        dtype = np.int32 if name in INT32 else np.int64
        found = None if shape is None else torch.from_numpy(array.reshape(shape).astype(dtype))
        tensors[name] = found
    assert at == len(values), f"a batch of {at} numbers came in {len(values)}"
    places_L, serials_T = tensors.pop("places_L"), tensors.pop("serials_T")
    embeds = None if places_L is None else Embeds(torch.empty(len(places_L), 0), places_L)
    adapters = None if serials_T is None else _active(serials_T, adapter_by_serial)
    return Batch(**tensors, adapters=adapters, embeds=embeds)


def _active(serials_T: Tensor, adapter_by_serial: Mapping[int, Adapter]) -> ActiveAdapters:
    found = [serial for serial in serials_T.unique().tolist() if serial]
    return ActiveAdapters(
        tuple((adapter_by_serial[s], (serials_T == s).nonzero()[:, 0]) for s in found)
    )


# --- adapters ---


def packed_adapter(adapter: Adapter) -> bytes:
    """The pairs in the format of safetensors, by layer, product and half."""
    tensors = {}
    for layer, pairs in enumerate(adapter.layers):
        for product, pair in pairs.items():
            tensors[f"{layer} {product} a"] = pair.a_RI.cpu().contiguous()
            tensors[f"{layer} {product} b"] = pair.b_OR.cpu().contiguous()
    return save(tensors)


def unpacked_adapter(data: bytes, num_layers: int, rank: int, serial: int) -> Adapter:
    """The adapter that `packed_adapter` was given, in the host's memory. Raises SafetensorError."""
    tensors = load(data)
    layers: list[LayerPairs] = [{} for _ in range(num_layers)]
    for name in tensors:
        layer, product, half = name.split()
        if half == "a":
            pair = Pair(tensors[name], tensors[f"{layer} {product} b"])
            layers[int(layer)][product] = pair
    return Adapter(tuple(layers), rank, serial)
