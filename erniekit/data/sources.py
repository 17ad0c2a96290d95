"""Files of records, read in any order: JSON lines, JSON arrays and plain text, gzipped or not.

A file of JSON lines is mapped into memory and indexed by the offsets of its lines, so that
shuffling costs 16 bytes a record and nothing is held that is not looked at. A gzipped file is first
unpacked to an unnamed temporary file; a JSON array is read whole. A byte order mark, CRLF and blank
lines are understood, a key given twice is not. A plain text is one record, and a long one several,
cut at line ends. Refuses what cannot be a data file at all (missing,
empty, cut short); a record that cannot be used raises `DataError` when it is asked for.
"""

from __future__ import annotations

import codecs
import gzip
import json
import mmap
import shutil
import tempfile
import zlib
from bisect import bisect_right
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from ernie.settings import ConfigError

_BOM = b"\xef\xbb\xbf"
_WINDOW = 1 << 26  # bytes searched for line ends at once
_STRETCH = 1 << 18  # bytes of a plain text that are one record, up to the end of the line


class DataError(ValueError):
    """A record that cannot be trained on, and why, in one sentence.

    `at` is the path of the value at fault, as in `messages[2].content`; `column` its first
    character in the line, from 1, where that is known. `Source.where` has file and line.
    """

    def __init__(self, reason: str, *, at: str = "", column: int | None = None) -> None:
        super().__init__(reason)
        self.at, self.column = at, column


class Source(Protocol):
    """Records of one file, by index. `where(i)` names file and line for messages, `number(i)` is
    the line (or the item), `index_of` the way back, and `text(i)` what stands there; bytes that are
    no text are spelled out. `size` is about that of all records: bytes, or tokens.
    """

    path: Path

    @property
    def size(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def where(self, index: int) -> str: ...

    def number(self, index: int) -> int: ...

    def index_of(self, number: int) -> int | None: ...

    def text(self, index: int) -> str: ...


def open_source(path: str | Path) -> Source:
    """The records of a `.jsonl`, `.json`, `.txt` or `.gz` file; raises ConfigError where there are
    none.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"there is no data file {path}; give the path of a .jsonl or .json file")
    file = _unpacked(path) if path.suffix == ".gz" else path.open("rb")
    head = file.read(4096)
    file.seek(0)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ConfigError(f"{path} is text in UTF-16; save it as UTF-8")
    if is_plain_text(path):
        return Text(path, file)
    is_array = head.removeprefix(_BOM).lstrip().startswith(b"[")
    source: Source = Array(path, file) if is_array else Lines(path, file)
    if not len(source):
        raise ConfigError(f"{path} holds no records; it must hold one JSON object per line")
    return source


def is_plain_text(path: str | Path) -> bool:
    return Path(str(path).removesuffix(".gz")).suffix == ".txt"


def _unpacked(path: Path) -> BinaryIO:
    file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the source
    try:
        with gzip.open(path) as packed:
            shutil.copyfileobj(packed, file)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ConfigError(f"{path} is not a whole gzip file ({error}); copy it again") from None
    file.seek(0)
    return file


class Lines:
    """One JSON object per line, parsed when it is asked for."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.starts, self.ends, self.numbers = _line_bounds(file)
        self.content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if len(self) else b""
        self.size = len(self.content)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Any:
        line = self._line(index)
        try:
            return _decode(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            column = len(line[: error.start].decode("utf-8")) + 1
            raise DataError(
                f"not UTF-8 text (byte {error.start}); save the file as UTF-8", column=column
            ) from None
        except json.JSONDecodeError as error:
            raise DataError(f"not a JSON object ({error.msg})", column=error.pos + 1) from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"not a JSON object ({error})") from None

    def _line(self, index: int) -> bytes:
        return self.content[self.starts[index] : self.ends[index]].rstrip(b"\r")

    def where(self, index: int) -> str:
        return f"{self.path}:{self.numbers[index]}"

    def number(self, index: int) -> int:
        return int(self.numbers[index])

    def index_of(self, number: int) -> int | None:
        index = int(np.searchsorted(self.numbers, number))
        return index if index < len(self) and self.numbers[index] == number else None

    def text(self, index: int) -> str:
        return self._line(index).decode("utf-8", "backslashreplace")


class Text:
    """A plain text as `{"text": ...}`, in stretches of whole lines where it is long. A stretch is
    numbered by its first line. Raises ConfigError for a file without any text.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.size = size = file.seek(0, 2)
        self.content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        start = len(_BOM) if self.content[:3] == _BOM else 0
        self.bounds, self.numbers = [start], [1]
        while start < size:
            end = (self.content.find(b"\n", start + _STRETCH) + 1) or size
            self.numbers.append(self.numbers[-1] + self.content[start:end].count(b"\n"))
            self.bounds.append(end)
            start = end
        if not self.content[self.bounds[0] : self.bounds[0] + _STRETCH].strip():
            raise ConfigError(f"{path} holds no text; give a file that begins with some")

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> dict[str, str]:
        try:
            return {"text": self._stretch(index).decode("utf-8").replace("\r\n", "\n")}
        except UnicodeDecodeError as error:
            raise DataError(
                f"not UTF-8 text (byte {self.bounds[index] + error.start} of the file); save the "
                "file as UTF-8"
            ) from None

    def _stretch(self, index: int) -> bytes:
        return self.content[self.bounds[index] : self.bounds[index + 1]]

    def where(self, index: int) -> str:
        return f"{self.path}:{self.numbers[index]}"

    def number(self, index: int) -> int:
        return self.numbers[index]

    def index_of(self, number: int) -> int | None:
        index = bisect_right(self.numbers, number) - 1
        return index if 0 <= index < len(self) else None

    def text(self, index: int) -> str:
        return self._stretch(index).decode("utf-8", "backslashreplace")


class Array:
    """A JSON array of objects, read whole; items are counted from 1."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        try:
            content = file.read()
            self.size = len(content)
            text = content.removeprefix(_BOM).decode("utf-8")
            self.records = json.loads(text, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} begins like a JSON array but is not one: {error}") from None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        return self.records[index]

    def where(self, index: int) -> str:
        return f"{self.path}, item {index + 1}"

    def number(self, index: int) -> int:
        return index + 1

    def index_of(self, number: int) -> int | None:
        return number - 1 if 0 < number <= len(self) else None

    def text(self, index: int) -> str:
        return (
            json.dumps(self.records[index], ensure_ascii=False)
            .encode("utf-8", "backslashreplace")
            .decode("utf-8")
        )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises ValueError for a key that is given twice: one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r} is given twice")
    return found


_decode = json.JSONDecoder(object_pairs_hook=_object).decode


def _line_bounds(file: BinaryIO) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start and end offset and line number of every line that is not blank."""
    newlines, size = [], 0
    while window := file.read(_WINDOW):
        newlines.append(np.flatnonzero(np.frombuffer(window, np.uint8) == ord("\n")) + size)
        size += len(window)
    ends = np.concatenate((*newlines, [size])).astype(np.int64)
    starts = np.concatenate(([0], ends[:-1] + 1)).astype(np.int64)
    file.seek(0)
    if file.read(3) == _BOM:
        starts[0] = 3
    # A line of fewer than three bytes may be blank but for a carriage return or a space.
    kept = ends > starts
    for i in np.flatnonzero(kept & (ends - starts < 3)):
        file.seek(int(starts[i]))
        kept[i] = bool(file.read(int(ends[i] - starts[i])).strip())
    numbers = np.flatnonzero(kept) + 1
    return starts[kept], ends[kept], numbers
