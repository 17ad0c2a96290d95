"""The safetensors files of a folder: their headers read and checked, their tensors read in slices.

    8 bytes: length of the header | header, JSON: name -> dtype, shape, [start, end) | data

Files are read by plain reads of byte ranges, not mapped: memory then holds only what was asked for.
Everything that headers can tell is checked before any data is read: missing and truncated files,
overlaps and gaps, names that are given twice, unknown dtypes. Pickle files are refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ernie.checkpoint.errors import CheckpointError as CheckpointError

INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pdparams")
MAX_HEADER_BYTES = 100 * 2**20  # the limit of the safetensors format
CHUNK_BYTES = 8 * 2**20  # what is read at a time, and so the memory a load needs on top

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.bfloat16,  # old Paddle files keep the bits of bfloat16 in unsigned integers
}
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies: bytes `[start, end)` of `file`, row-major."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    def rows(self, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of the tensor from the first to the last, `chunk_bytes` at a time.

        A tensor `(R, ...)` gives slices of its first dimension; the buffer is reused.
        """
        if self.start == self.end:
            return
        row_bytes = (self.end - self.start) // self.shape[0]
        step = max(1, min(chunk_bytes // row_bytes, self.shape[0]))
        buffer = torch.empty(step * row_bytes, dtype=torch.uint8)
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.start)
            for first in range(0, self.shape[0], step):
                count = min(step, self.shape[0] - first)
                view = buffer[: count * row_bytes]
                _read_exactly(file, view.numpy().data, self)
                yield first, view.view(self.dtype).view(count, *self.shape[1:])


def _read_exactly(file: Any, target: memoryview, stored: Stored) -> None:
    done = 0
    while done < len(target):
        count = file.readinto(target[done:])
        if not count:
            raise CheckpointError(
                f"{stored.file} ended while {stored.name} was read; the file changed meanwhile"
            )
        done += count


def read_folder(folder: str | Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder by its stored name; only headers are read.

    With an index, it and the files must agree; without one, all safetensors files are taken.
    Raises CheckpointError.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    claimed = _read_index(folder / INDEX) if (folder / INDEX).is_file() else None
    if claimed is not None:
        _check_index_files(folder, files, claimed)
        files = [folder / name for name in sorted(set(claimed.values()))]
    elif not files:
        raise CheckpointError(_no_weights(folder))
    else:
        _check_shard_numbers(folder, files)
    tensors: dict[str, Stored] = {}
    for file in files:
        for stored in read_header(file):
            if stored.name in tensors:
                other = tensors[stored.name].file.name
                raise CheckpointError(
                    f"tensor {stored.name} is in both {other} and {file.name} of {folder}; "
                    "one of the files does not belong there"
                )
            tensors[stored.name] = stored
    if claimed is not None:
        _check_index_names(folder, tensors, claimed)
    return tensors


def read_header(file: Path) -> list[Stored]:
    """The tensors of one safetensors file, in the order of their bytes, which must be whole."""
    size = file.stat().st_size
    with open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{file} has {size} bytes and announces a header of {length}; it is truncated or "
                "not a safetensors file: fetch it again"
            )
        text = handle.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique_keys)
    except _DuplicateError as error:
        raise CheckpointError(f"{file} lists {error.args[0]} twice; write it anew") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"the header of {file} is not JSON ({error}); the file is damaged: fetch it again"
        ) from None
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {file} is not a table of tensors; fetch it again")
    header.pop("__metadata__", None)
    found = sorted((_entry(file, 8 + length, n, v) for n, v in header.items()), key=_by_place)
    end = 8 + length
    for previous, stored in zip([None, *found], found):
        if stored.start != end:
            before = previous.name if previous else "the header"
            raise CheckpointError(
                f"{stored.name} in {file} {'overlaps' if stored.start < end else 'leaves a gap to'}"
                f" {before}; the file is damaged: fetch it again"
            )
        end = stored.end
    if end != size:
        raise CheckpointError(
            f"{file} has {size} bytes where its header needs {end}; "
            f"it is {'truncated' if size < end else 'damaged'}: fetch it again"
        )
    return found


def _by_place(stored: Stored) -> tuple[int, int]:
    return stored.start, stored.end


def _entry(file: Path, origin: int, name: str, value: Any) -> Stored:
    try:
        kind, shape, (start, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, start, end))
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        raise CheckpointError(
            f"{file} does not say dtype, shape and place of {name}; fetch it again"
        )
    if kind not in DTYPES:
        raise CheckpointError(
            f"tensor {name} in {file} has dtype {kind}; weights are read as {', '.join(DTYPES)}"
        )
    dtype = DTYPES[kind]
    if end - start != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"tensor {name} in {file} takes {end - start} bytes, which is not "
            f"{'x'.join(map(str, shape)) or '1'} {kind}; the file is damaged: fetch it again"
        )
    return Stored(name, file, dtype, shape, origin + start, origin + end)


class _DuplicateError(Exception):
    pass


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateError(next(n for n in names if names.count(n) > 1))
    return table


def _read_index(path: Path) -> dict[str, str]:
    try:
        claimed = json.loads(path.read_bytes(), object_pairs_hook=_unique_keys)["weight_map"]
        assert_names = all(isinstance(v, str) and Path(v).name == v for v in claimed.values())
    except _DuplicateError as error:
        raise CheckpointError(f"{path} lists {error.args[0]} twice; write it anew") from None
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        assert_names = False
    if not assert_names:
        raise CheckpointError(
            f"{path} is not an index: it must map tensor names to file names under 'weight_map'"
        )
    return claimed


def _check_index_files(folder: Path, files: Sequence[Path], claimed: Mapping[str, str]) -> None:
    there, wanted = {file.name for file in files}, set(claimed.values())
    if missing := sorted(wanted - there):
        raise CheckpointError(
            f"{folder} lacks {_some(missing)}, which {INDEX} names; fetch what is missing"
        )
    if extra := sorted(name for name in there - wanted if name.startswith("model")):
        raise CheckpointError(
            f"{folder} holds {_some(extra)}, which {INDEX} does not name; "
            "remove what belongs to another save"
        )


def _check_index_names(
    folder: Path, tensors: Mapping[str, Stored], claimed: Mapping[str, str]
) -> None:
    for name in sorted(tensors.keys() | claimed.keys()):
        there = tensors[name].file.name if name in tensors else "no file"
        said = claimed.get(name, "no file")
        if there != said:
            raise CheckpointError(
                f"{INDEX} of {folder} places {name} in {said}, but {there} holds it; "
                "the index belongs to other files"
            )


def _check_shard_numbers(folder: Path, files: Sequence[Path]) -> None:
    for match in filter(None, (_SHARD.fullmatch(file.name) for file in files)):
        wanted = [
            f"{match[1]}-{n:05d}-of-{match[3]}.safetensors" for n in range(1, 1 + int(match[3]))
        ]
        if missing := [name for name in wanted if not (folder / name).is_file()]:
            raise CheckpointError(f"{folder} lacks {_some(missing)}; fetch what is missing")


def _no_weights(folder: Path) -> str:
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES)
    if pickles:
        return (
            f"{folder} holds {_some(pickles)}, a pickle that can run code when it is read and is "
            "never opened here; convert it to safetensors with the program that wrote it"
        )
    return f"{folder} holds no *.safetensors file; give the folder of a saved model"


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
