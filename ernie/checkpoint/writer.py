"""Writing a checkpoint folder: safetensors files, their index and the small files beside them.

Tensors are written one by one as they are made, so memory holds one of them. A save that is
interrupted, by a full disk or a lost machine, never leaves a folder that loads as something else.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ernie.checkpoint.folder import INDEX

_NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_folder(
    folder: str | Path,
    planned: Sequence[Planned],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    texts: Mapping[str, str],
    copy_files: Callable[[Path], None] | None = None,
    max_shard_bytes: int,
) -> None:
    """Write tensors (in the order of `planned`, one in memory at a time) and text files.

    `copy_files` puts further files into the folder it is given. All is written to a hidden folder
    and synced first, then renamed, `config.json` last and after the old one is gone: at every
    moment the folder holds the old checkpoint, the new one, or none that could be loaded. Weight
    files of an earlier save are removed, and where a tokenizer comes along, all that travelled with
    the one before.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _assign(planned, max_shard_bytes)
    if len(shards) > 1:
        weight_map = {p.name: name for name, part in shards.items() for p in part}
        total = sum(p.num_bytes for p in planned)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        texts = {INDEX: json.dumps(index, indent=2) + "\n", **texts}
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as name:
        hidden = Path(name)
        stream = iter(tensors)
        for name, part in shards.items():
            _write_file(hidden / name, part, stream)
        if copy_files is not None:
            copy_files(hidden)
        for name, text in texts.items():
            (hidden / name).write_text(text, encoding="utf-8")
        for file in _files(hidden):
            _sync(file)
        _commit(folder, hidden)


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file; a reader of `path` sees the old file or the new one, whole.

    Writing releases Python's lock, which is what lets a training go on beside it.
    """
    hidden = path.with_name(f".{path.name}.partial")
    planned = [Planned(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    try:
        _write_file(hidden, planned, iter(tensors.items()))
        _sync(hidden)
        os.replace(hidden, path)
    except OSError:
        hidden.unlink(missing_ok=True)
        raise


def _assign(planned: Sequence[Planned], max_shard_bytes: int) -> dict[str, list[Planned]]:
    parts: list[list[Planned]] = [[]]
    size = 0
    for tensor in planned:
        if parts[-1] and size + tensor.num_bytes > max_shard_bytes:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.num_bytes
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    names = (f"model-{n:05d}-of-{len(parts):05d}.safetensors" for n in range(1, 1 + len(parts)))
    return dict(zip(names, parts))


def _write_file(path: Path, part: Sequence[Planned], stream: Iterator[tuple[str, Tensor]]) -> None:
    # Wide dtypes lie first, so that every tensor is aligned; data is written where it belongs.
    places, end = {}, 0
    for tensor in sorted(part, key=lambda p: -p.dtype.itemsize):
        places[tensor.name] = (end, end + tensor.num_bytes)
        end += tensor.num_bytes
    entries = {
        p.name: {"dtype": _NAMES[p.dtype], "shape": p.shape, "data_offsets": places[p.name]}
        for p in part
    }
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in part:
            name, value = next(stream)
            assert name == tensor.name and tuple(value.shape) == tensor.shape, (name, tensor)
            file.seek(8 + len(header) + places[name][0])
            file.write(as_bytes(value.detach().to("cpu", tensor.dtype)).numpy().data)


def as_bytes(x: Tensor) -> Tensor:
    """The elements of a tensor of any shape, in order, as uint8."""
    x = x.contiguous()
    # A single element is contiguous whatever its stride, which a view as bytes takes at its word.
    return x.as_strided((x.numel(),), (1,)).view(torch.uint8)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _commit(folder: Path, hidden: Path) -> None:
    from ernie.tokenizer import FILES

    names = [file.relative_to(hidden) for file in _files(hidden)]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    old = [*folder.glob("model*.safetensors"), folder / INDEX]
    if any(name.name in ("tokenizer.json", "tokenizer.model") for name in names):
        old += [path for pattern in FILES for path in folder.glob(pattern)]  # of another tokenizer
    for path in old:
        path.unlink(missing_ok=True)
    for name in sorted(names, key=Path("config.json").__eq__):
        os.replace(hidden / name, folder / name)
    for name in {folder, *((folder / name).parent for name in names)}:
        _sync(name)  # makes the renames durable
