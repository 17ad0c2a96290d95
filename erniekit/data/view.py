"""`erniekit data show=N` and `sample=FILE:LINE`: samples token by token, as the model gets them.

    -- row 1, sample 2: train.jsonl:17: 12 tokens, 5 trained, 7 masked
      | <|begin_of_sentence|>│User: │What│ is│...     masked: read, and not to be said
    + | It│ is│ sunny│<|end_of_sentence|>             trained: to be said after what is before it
    - | ...                                           cut: in turns left out because of the length

Tokens stand between bars. A token that is not whole characters is shown as its bytes, and the
character where it is complete: `⟨e4⟩│⟨bd⟩│⟨a0=你⟩`. Characters that would move the cursor or hide
are shown as their numbers, so that what a file holds cannot paint over the view.
"""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TextIO

from ernie.chat import UNTRAINED
from ernie.settings import ConfigError
from ernie.tokenizer import Tokenizer
from erniekit.config import Audit
from erniekit.data.sources import DataError
from erniekit.data.stream import Stream
from erniekit.data.wholes import Shown, shown, sides_of

GUTTERS = {"masked": "    ", "trained": "  + ", "cut": "  - "}
MEANINGS = {
    "masked": "masked: read, not to be said",
    "trained": "trained: to be said after what stands before it",
    "cut": "cut: in turns that were left out because the dialogue is too long",
}
# SGR parameters; the two of a kind alternate from token to token.
COLOURS = {
    "masked": ("39", "38;5;244"),
    "trained": ("38;5;16;48;5;114", "38;5;16;48;5;151"),
    "cut": ("9;38;5;167", "9;38;5;131"),
}
GUTTER_COLOURS = {"masked": "39", "trained": "1;38;5;71", "cut": "1;38;5;167"}
BORDER = "1;38;5;68"
BAR, BREAK = "│", "⏎"


@dataclass(frozen=True)
class Token:
    text: str
    kind: str  # of GUTTERS


def show(wanted: Audit, streams: Mapping[str, Stream]) -> int:
    """Print what is wanted; returns 0, also when the reader of a pipe has seen enough. Raises
    ConfigError, or DataError for a record that cannot be used.
    """
    try:
        _show(Page.on(sys.stdout), wanted, streams)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _show(page: Page, wanted: Audit, streams: Mapping[str, Stream]) -> None:
    page.legend()
    if wanted.sample:
        _show_record(page, wanted.sample, streams)
    if wanted.show:
        _show_rows(page, next(iter(streams.values())), wanted.show)


def _show_record(page: Page, wanted: str, streams: Mapping[str, Stream]) -> None:
    records, source, index = find(wanted, streams)
    place = records.sources[source].where(index)
    try:
        record = records.sources[source][index]
        found = shown(records.encoder, record, records.kinds[source])
    except DataError as error:
        raise DataError(f"{place}: {error}") from None
    for one in found:
        page.sample(f"{place}{one.title}", one, records.encoder.tokenizer)


def find(wanted: str, streams: Mapping[str, Stream]) -> tuple[Stream, int, int]:
    """The stream, source and index of `FILE:LINE`; raises ConfigError where there is none."""
    file, _, line = wanted.rpartition(":")
    if not file or not line.isdecimal():
        raise ConfigError(f"sample={wanted!r} is not a place; give file:line, as in data.jsonl:17")
    for stream in streams.values():
        for number, source in enumerate(stream.sources):
            if str(source.path) != file and source.path.name != file:
                continue
            index = source.index_of(int(line))
            if index is None:
                raise ConfigError(f"{file} has no record in line {line}; give another line")
            return stream, number, index
    files = ", ".join(str(s.path) for stream in streams.values() for s in stream.sources)
    raise ConfigError(f"{file} is not a file of this run; give one of {files}")


def _show_rows(page: Page, stream: Stream, count: int) -> None:
    """The first `count` samples of the stream, in the rows they are trained in."""
    data, tokenizer = stream.data, stream.encoder.tokenizer
    rows = stream.drawn_rows(end=stream.epoch_size)
    for number, (row, _) in enumerate(rows, start=1):
        for i, drawn in enumerate(row[:count], start=1):
            source, index = next(stream.mix.draws(drawn.position))
            place = stream.sources[source].where(index)
            if drawn.offset:
                place += f", from token {drawn.offset + 1}"
            for title, side in sides_of(drawn.sample):
                shown_side = Shown(title, side)
                page.sample(f"row {number}, sample {i}: {place}{title}", shown_side, tokenizer)
        free = data.max_seq_len - sum(map(len, row))
        if len(row) <= count:
            page.border(
                f"end of row {number}: {len(row)} samples, {free} of "
                f"{data.max_seq_len} places {'padding' if data.padding else 'free'}"
            )
        count -= len(row)
        if count <= 0:
            return


# --- tokens ---


def tokens_of(one: Shown, tokenizer: Tokenizer) -> list[Token]:
    """The tokens of a sample, the last label too, with those that were cut off where they stood."""
    sample = one.sample
    ids, labels = list(sample.token_ids), [UNTRAINED, *sample.labels]
    ids.append(labels[-1])
    if labels[-1] == UNTRAINED:  # nothing follows the last input that anyone asks for
        del ids[-1], labels[-1]
    kinds = ["masked" if label == UNTRAINED else "trained" for label in labels]
    start = one.cut_at
    ids[start:start] = one.cut_ids
    kinds[start:start] = ["cut"] * len(one.cut_ids)
    labels[start:start] = [UNTRAINED] * len(one.cut_ids)
    found = []
    for i, label, kind, text in zip(ids, labels, kinds, texts_of(ids, tokenizer)):
        other = tokenizer.token_of(label) if label not in (UNTRAINED, i) else None
        found.append(Token(f"{text}→{other}" if other else text, kind))
    return found


def texts_of(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """What each token looks like; bytes of a character that is spread over tokens in ⟨⟩."""
    texts, pending = [], b""
    for i in ids:
        text, pending = _shown(tokenizer.join_bytes([i]), pending)
        texts.append(text or f"⟨id {i}⟩")
    return texts


def _shown(data: bytes, pending: bytes) -> tuple[str, bytes]:
    """The text of a token's bytes after those of an unfinished character, and what is unfinished
    then.
    """
    text = ""
    if pending:
        size = _size_of_character(pending[0])
        n = 0
        while n < len(data) and len(pending) + n < size and data[n] & 0xC0 == 0x80:
            n += 1
        taken, data, whole = data[:n], data[n:], pending + data[:n]
        if taken and len(whole) < size and not data:
            return f"⟨{taken.hex(' ')}⟩", whole
        if taken:
            character = _visible(whole.decode("utf-8", "ignore"))
            text = f"⟨{taken.hex(' ')}{'=' if character else ''}{character}⟩"
    while data:
        size = _size_of_character(data[0])
        piece, data = data[:size], data[size:]
        try:
            text += _visible(piece.decode("utf-8"))
        except UnicodeDecodeError:
            if len(piece) < size and all(b & 0xC0 == 0x80 for b in piece[1:]):
                return f"{text}⟨{piece.hex(' ')}⟩", piece
            text, data = f"{text}⟨{piece[:1].hex()}⟩", piece[1:] + data
    return text, b""


def _size_of_character(first: int) -> int:
    """Bytes of the UTF-8 character that begins with this one."""
    return 1 if first < 0xC0 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4


def _visible(text: str) -> str:
    """Line breaks as ⏎, tabs as ⇥, and what cannot be seen by its number."""
    known = {"\n": BREAK, "\t": "⇥", "\r": "␍"}
    return "".join(known.get(c) or (c if c.isprintable() else f"⟨U+{ord(c):04X}⟩") for c in text)


# --- the page ---


@dataclass
class Page:
    """Where the view is written: how wide, and whether in colour."""

    out: TextIO
    width: int
    has_colour: bool

    @classmethod
    def on(cls, out: TextIO) -> Page:
        """Colour on a terminal, unless NO_COLOR says otherwise (https://no-color.org)."""
        is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        if hasattr(out, "reconfigure"):
            out.reconfigure(errors="backslashreplace")
        return cls(out, shutil.get_terminal_size((100, 24)).columns, out.isatty() and not is_plain)

    def legend(self) -> None:
        for kind, meaning in MEANINGS.items():
            word, _, rest = meaning.partition(":")
            gutter = self._painted(GUTTERS[kind], GUTTER_COLOURS[kind])
            self.out.write(f"{gutter}{self._painted(word, COLOURS[kind][0])}:{rest}\n")

    def border(self, text: str) -> None:
        rule = "─" * max(self.width - _columns(text) - 4, 2)
        self.out.write(self._painted(f"── {text} {rule}", BORDER) + "\n")

    def sample(self, title: str, one: Shown, tokenizer: Tokenizer) -> None:
        """A border, then the tokens, a new line for every change of kind."""
        tokens = tokens_of(one, tokenizer)
        num_trained = sum(token.kind == "trained" for token in tokens)
        cut = f", {one.sample.num_cut} cut" if one.sample.num_cut else ""
        self.border(
            f"{title}: {len(one.sample) + 1} tokens, {num_trained} trained, "
            f"{len(one.sample) + 1 - num_trained} masked{cut}"
        )
        for kind, group in groupby(tokens, key=lambda token: token.kind):
            for line in self._lines([token.text for token in group]):
                self._write(kind, line)

    def _lines(self, texts: Sequence[str]) -> Iterator[list[tuple[int, str]]]:
        """(number, text) of tokens, line by line: broken after line breaks and at the width."""
        line: list[tuple[int, str]] = []
        room = self.width - 4
        for number, text in enumerate(texts):
            size = _columns(text) + (not self.has_colour)  # the bar
            if line and size > room and text != BREAK:
                yield line
                line, room = [], self.width - 4
            line.append((number, text))
            room -= size
            if text.endswith(BREAK):
                yield line
                line, room = [], self.width - 4
        if line:
            yield line

    def _write(self, kind: str, line: Sequence[tuple[int, str]]) -> None:
        gutter = self._painted(GUTTERS[kind], GUTTER_COLOURS[kind])
        if self.has_colour:
            painted = (self._painted(text, COLOURS[kind][n % 2]) for n, text in line)
            self.out.write(f"{gutter}{''.join(painted)}\n")
        else:
            self.out.write(f"{gutter}{BAR.join(text for _, text in line)}\n")

    def _painted(self, text: str, colour: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self.has_colour else text


def _columns(text: str) -> int:
    """Columns a text takes on a terminal: two for wide characters, none for marks above others."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )
