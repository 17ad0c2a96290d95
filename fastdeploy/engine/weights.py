"""New weights for a running engine, and weights that leave the device for a while.

`read_weights` makes a plain model from a folder or from tensors in memory. Whatever does not fit
the engine's model to the last tensor is refused before anything of the engine is touched; the
engine then gives the plain model the form in which it runs (see `loading.served`) and swaps. Old
and new weights are in memory together unless the old ones were freed (`Engine.sleep(level=2)`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ernie
from ernie.checkpoint import convert
from ernie.checkpoint.folder import CHUNK_BYTES, CheckpointError, Stored
from ernie.config import ErnieConfig
from ernie.model import ErnieModel

Source = str | Path | Mapping[str, Tensor]
GIVEN = Path("the given mapping")  # stands in error messages for a folder and its files


def read_weights(
    source: Source, config: ErnieConfig, dtype: torch.dtype, device: torch.device
) -> ErnieModel:
    """A plain model of the same `config`, with weights of `dtype`.

    `source` is a folder, whose tensors are converted to `dtype` as when an engine starts, or a
    mapping of published names (of any known layout) to tensors, which must have the dtypes of the
    model already. Raises CheckpointError for the first thing that is missing, unknown or different.
    """
    if isinstance(source, Mapping):
        return _from_tensors(source, config, dtype, device)
    model = ernie.load(source, dtype=dtype, device=device, keep_integers=True)
    check_same_network(source, model.config, config)
    return model


def check_same_network(source: str | Path, found: ErnieConfig, config: ErnieConfig) -> None:
    """Raise CheckpointError where a folder's config is not that of the running model, or where one
    of the two was quantised when it was saved and the other was not."""
    check_same_format(str(source), found, config)
    for field in dataclasses.fields(config):
        new, old = getattr(found, field.name), getattr(config, field.name)
        if field.compare and new != old:
            raise CheckpointError(
                f"{source} has {field.name}={new} and the running model {old}; weights can be "
                "updated with those of the same network only"
            )


def check_same_format(source: str, found: ErnieConfig, config: ErnieConfig) -> None:
    """Raise CheckpointError unless both were saved in the same form."""
    new, old = (c.extra.get("quantization_config") for c in (found, config))
    if new != old:
        forms = [
            "plain" if given is None else given.get("name", "quantised") for given in (new, old)
        ]
        raise CheckpointError(
            f"{source} has {forms[0]} weights and the running model was read from {forms[1]} ones; "
            "give such, or start from a plain folder with quantization=..., which brings new "
            "weights into that form"
        )


@dataclass(frozen=True)
class _Given(Stored):
    """A tensor in memory in the place of one in a file."""

    tensor: Tensor

    def rows(self, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, Tensor]]:
        yield 0, self.tensor


def _from_tensors(
    tensors: Mapping[str, Tensor], config: ErnieConfig, dtype: torch.dtype, device: torch.device
) -> ErnieModel:
    plain = dataclasses.replace(config, extra={})
    check_same_format("the given mapping", plain, config)
    model = ErnieModel(config, dtype=dtype, device="meta")
    template = dict(model.named_parameters())
    given = {name: _given(name, tensor) for name, tensor in tensors.items()}
    _, units = convert.detect(GIVEN, given, template)
    for planned in convert.planned(units, template):
        if given[planned.name].dtype != planned.dtype:
            raise CheckpointError(
                f"tensor {planned.name} is {given[planned.name].dtype} and the running model's "
                f"{planned.dtype}; convert it first"
            )
    model.load_state_dict(dict(convert.native_tensors(units, given, template, device)), assign=True)
    return model


def _given(name: str, tensor: Tensor) -> _Given:
    if not isinstance(tensor, Tensor):
        raise CheckpointError(f"{name} is a {type(tensor).__name__}; give tensors by their names")
    tensor = tensor.detach()
    return _Given(name, GIVEN, tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes, tensor)


def without_weights(model: ErnieModel) -> ErnieModel:
    """What stands in for a model whose weights are dropped: its config and dtype, no memory."""
    dtype = model.model.embed_tokens.weight.dtype
    return ErnieModel(model.config, dtype=dtype, device="meta")


class HostCopy:
    """The weights of a model in the host's memory, while the device has none of them.

    Works on storages, not on tensors: whatever shares memory (tied weights, slices) still does when
    it is back.
    """

    def __init__(self, model: ErnieModel) -> None:
        self.saved: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []
        for storage in storages(model):
            self.saved.append((storage, storage.cpu() if storage.is_cuda else storage.clone()))
            storage.resize_(0)

    def restore(self) -> None:
        for storage, copy in self.saved:
            storage.resize_(copy.nbytes())
            storage.copy_(copy)
        self.saved.clear()


def storages(model: nn.Module) -> list[torch.UntypedStorage]:
    """The memory of every tensor of a model, each once, those in packed weights included."""
    found: dict[int, torch.UntypedStorage] = {}
    seen: set[int] = set()
    todo: list[Any] = [model]
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage
        elif isinstance(item, (list, tuple)):
            todo += item
        elif isinstance(item, dict):
            todo += item.values()
        elif dataclasses.is_dataclass(item) and not isinstance(item, type):
            todo += (getattr(item, field.name) for field in dataclasses.fields(item))
        elif type(item).__module__.split(".")[0] in ("ernie", "torch") and hasattr(
            item, "__dict__"
        ):
            todo += vars(item).values()
    return list(found.values())
