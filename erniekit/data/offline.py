"""`erniekit data dataset_output_dir=FOLDER`: documents of text as token ids, for `input_dir`.

Each file of a run becomes `FOLDER/<name>.bin` and `.idx` (`erniekit.data.indexed`), its documents
in their order and with their end tokens, so that training reads what it would have made itself.
Records that cannot be used are told, counted and left out; too many of them are an error.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ernie.settings import ConfigError
from erniekit.data.chunks import SIZE, Chunks
from erniekit.data.indexed import Writer
from erniekit.data.sources import DataError
from erniekit.data.stream import Faults, Stream
from erniekit.data.text import TextEncoder

log = logging.getLogger("erniekit")


@dataclass
class Documents:
    """Those of a stretch of records, and the records that hold none."""

    ids: list[array[int]] = field(default_factory=list)
    faults: list[tuple[int, DataError]] = field(default_factory=list)


def read_documents(stream: Stream, number: int, start: int) -> Documents:
    """Of the `SIZE` records of a file from `start` on."""
    source, kind, found = stream.sources[number], stream.kinds[number], Documents()
    for index in range(start, min(start + SIZE, len(source))):
        try:
            samples = stream.encoder.read(source[index], kind)
        except DataError as error:
            found.faults.append((index, error))
            continue
        for sample in samples:
            found.ids.append(array("i", [*sample.token_ids, sample.labels[-1]]))
    return found


def write(
    streams: Mapping[str, Stream], folder: Path, num_workers: int | None, *, overwrite: bool
) -> int:
    """Write the files of some streams; returns 0. Raises ConfigError, or DataError as training."""
    names = _names(streams)
    for name in names.values():
        there = [path for end in ("bin", "idx") if (path := folder / f"{name}.{end}").exists()]
        if there and not overwrite:
            raise ConfigError(
                f"{there[0]} is there already; give another dataset_output_dir, or "
                "overwrite_output_dir=true"
            )
    with Chunks(streams, num_workers) as chunks:
        for split, stream in streams.items():
            told = []
            faults = Faults(stream.faults.max_share, sum(map(len, stream.sources)))
            weights = [weight for _, _, weight in stream.data.files(split)]
            for number, source in enumerate(stream.sources):
                prefix = folder / names[split, number]
                vocab_size = stream.encoder.tokenizer.vocab_size
                with Writer(prefix, vocab_size) as writer:
                    for found in chunks.of(split, number, read_documents):
                        for ids in found.ids:
                            writer.add(ids)
                        for index, error in found.faults:
                            faults.add(source.where(index), error)
                log.info(
                    "%s: %s documents, %s tokens in %s.bin and .idx",
                    source.path, f"{len(writer.sizes):,}", f"{sum(writer.sizes):,}", prefix,
                )  # fmt: skip
                told.append(f"{weights[number]:g} {prefix}")
            faults.judge(at_end=True)
            log.info("%s: input_dir: %s", split, " ".join(told))
    return 0


def _names(streams: Mapping[str, Stream]) -> dict[tuple[str, int], str]:
    """The name of each file without its suffixes, all different."""
    names: dict[tuple[str, int], str] = {}
    for split, stream in streams.items():
        if not isinstance(stream.encoder, TextEncoder) or "indexed" in stream.kinds:
            raise ConfigError(
                "dataset_output_dir is for files of plain text; use it with stage: PT"
            )
        for number, source in enumerate(stream.sources):
            name = source.path.name.removesuffix(".gz").rpartition(".")[0] or source.path.name
            taken = name in names.values()
            names[split, number] = f"{split}-{number + 1}-{name}" if taken else name
    return names
