"""Documents as token ids in two files, `<prefix>.bin` and `<prefix>.idx`: Megatron's format.

    .bin    the tokens of all sequences, one after the other, in one integer type
    .idx    "MMIDIDX\\0\\0", version (u64, 1), type code (u8), S (u64), D (u64), then
            sizes (S x i32, tokens), offsets (S x i64, bytes), documents (D x i64: D - 1 documents,
            each from one sequence number to the next)

All numbers are little endian. Files are mapped, not read, so that they may be of any size. Refused:
files that are cut short or contradict themselves, and types that are no integers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from ernie.settings import ConfigError

MAGIC = b"MMIDIDX\0\0"
_HEAD = struct.Struct("<9sQBQQ")
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_SHORT_VOCABULARY = 65_500  # up to here ids take two bytes, as in Megatron


class Indexed:
    """The documents of a prefix by index, as integer arrays; a `Source` of `erniekit.data.sources`.

    `bounds` are the first document and the one behind the last that this source has.
    """

    def __init__(self, prefix: str | Path, bounds: tuple[int, int] | None = None) -> None:
        self.prefix = str(prefix)
        self.path, index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        for path in (index, self.path):
            if not path.is_file():
                raise ConfigError(
                    f"there is no data file {path}; input_dir takes the common beginning of the "
                    "names of a .bin and an .idx file"
                )
        self._read_index(index)
        self.first, self.last = bounds or (0, self.num_documents)

    @property
    def num_documents(self) -> int:
        """Of the whole file."""
        return len(self._documents) - 1

    def __len__(self) -> int:
        return self.last - self.first

    @property
    def size(self) -> int:
        low, high = self._documents[[self.first, self.last]].tolist()
        return int(self._sizes[low:high].sum(dtype=np.int64))

    def __getitem__(self, index: int) -> np.ndarray:
        low, high = self._documents[self.first + index : self.first + index + 2].tolist()
        parts = [self._sequence(s) for s in range(low, high)]
        return parts[0] if len(parts) == 1 else np.concatenate([self._tokens[:0], *parts])

    def _sequence(self, number: int) -> np.ndarray:
        start = int(self._starts[number])
        return self._tokens[start : start + int(self._sizes[number])]

    def where(self, index: int) -> str:
        return f"{self.path}, document {self.number(index)}"

    def number(self, index: int) -> int:
        return self.first + index + 1

    def index_of(self, number: int) -> int | None:
        index = number - 1 - self.first
        return index if 0 <= index < len(self) else None

    def text(self, index: int) -> str:
        return str(self[index].tolist())

    def _read_index(self, path: Path) -> None:
        content = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
        if len(content) < _HEAD.size or bytes(content[: len(MAGIC)]) != MAGIC:
            raise ConfigError(
                f"{path} is not an index of token ids: it does not begin with MMIDIDX"
            )
        _, version, code, num_sequences, num_bounds = _HEAD.unpack(content[: _HEAD.size].tobytes())
        if version != 1 or code not in _TYPES:
            raise ConfigError(
                f"{path} has version {version} and type code {code}; version 1 with integers "
                f"(codes {', '.join(map(str, _TYPES))}) can be read"
            )
        ends = np.cumsum([_HEAD.size, 4 * num_sequences, 8 * num_sequences, 8 * num_bounds])
        if len(content) < ends[-1] or not num_bounds:
            raise ConfigError(f"{path} is cut short: {len(content)} of {ends[-1]} bytes are there")
        sizes, offsets, documents = (
            content[start:end].view(kind)
            for start, end, kind in zip(ends, ends[1:], ("<i4", "<i8", "<i8"))
        )
        dtype = np.dtype(_TYPES[code])
        self._tokens = _mapped(self.path, dtype)
        self._sizes, self._starts, self._documents = sizes, offsets // dtype.itemsize, documents
        starts, last = self._starts, len(self._tokens)
        is_whole = not num_sequences or (
            min(sizes.min(), starts.min()) >= 0 and (starts + sizes).max() <= last
        )
        if not is_whole or (offsets % dtype.itemsize).any():
            raise ConfigError(f"{self.path} is cut short, or not the file that {path} describes")
        if documents[0] < 0 or (np.diff(documents) < 0).any() or documents[-1] > num_sequences:
            raise ConfigError(f"{path} has documents of sequences that it does not have")


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    length = path.stat().st_size // dtype.itemsize
    return np.memmap(path, dtype, "r", shape=(length,)) if length else np.zeros(0, dtype)


class Writer:
    """Writes documents to a prefix, one `add` each; the files are there once the context ends.

    Ids take two bytes for vocabularies up to 65,500 and four beyond.
    """

    def __init__(self, prefix: str | Path, vocab_size: int) -> None:
        self.data, self.index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        self.code = 8 if vocab_size < _SHORT_VOCABULARY else 4
        self.dtype = np.dtype(_TYPES[self.code])
        self.sizes: list[int] = []

    def __enter__(self) -> Writer:
        self.data.parent.mkdir(parents=True, exist_ok=True)
        self.hidden = [p.with_name(f".{p.name}.partial") for p in (self.data, self.index)]
        self.file: BinaryIO = self.hidden[0].open("wb")
        return self

    def add(self, ids: Iterable[int]) -> None:
        """One document."""
        found = np.fromiter(ids, self.dtype)
        self.file.write(found.tobytes())
        self.sizes.append(len(found))

    def __exit__(
        self, kind: type[BaseException] | None, value: object, trace: TracebackType | None
    ) -> None:
        self.file.close()
        if kind is None:
            self.hidden[1].write_bytes(self._index())
            self.hidden[0].replace(self.data)
            self.hidden[1].replace(self.index)
        for path in self.hidden:
            path.unlink(missing_ok=True)

    def _index(self) -> bytes:
        sizes = np.array(self.sizes, "<i4")
        offsets = np.concatenate(([0], np.cumsum(sizes, dtype="<i8")))[:-1] * self.dtype.itemsize
        head = _HEAD.pack(MAGIC, 1, self.code, len(sizes), len(sizes) + 1)
        documents = np.arange(len(sizes) + 1, dtype="<i8")
        parts = (sizes, offsets.astype("<i8"), documents)
        return head + b"".join(part.tobytes() for part in parts)


def share(num_documents: int, shares: Sequence[float], number: int) -> tuple[int, int]:
    """Bounds of the documents that belong to share `number` of some shares, in order of the file.

    Every document belongs to exactly one share. Source: Megatron's `split`.
    """
    total = sum(shares)
    low, high = (round(num_documents * sum(shares[:n]) / total) for n in (number, number + 1))
    return low, high
