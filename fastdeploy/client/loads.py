"""What a benchmark asks a server: talks of one or several turns, drawn from random words, from a
ShareGPT file or from real text.

Lengths are counted in words here, a Chinese character counting as one; the server's own count of
tokens is what results are given in.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ernie.settings import ConfigError

_WORD = re.compile(r"[\u3400-\u9fff]|[^\s\u3400-\u9fff]+")
# A spread as wide as that of real conversations: the 95th percentile is five times the median.
_SPREAD = 1.0


@dataclass(frozen=True, slots=True)
class Turn:
    """A message of the user, and the tokens that its answer gets."""

    text: str
    num_new: int


Talk = list[Turn]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Words of a message and tokens of its answer: means, or what is drawn around."""

    input: int
    output: int
    range_ratio: float = 0.0  # of `random`: lengths between (1 - r) and 1 times these

    def __post_init__(self) -> None:
        if self.input < 1 or self.output < 1 or not 0 <= self.range_ratio < 1:
            raise ConfigError(
                f"input_len={self.input}, output_len={self.output}, random_range_ratio="
                f"{self.range_ratio}: lengths are 1 or more, and the ratio is from 0 to below 1"
            )


def random_talks(count: int, turns: int, lengths: Lengths, seed: int) -> list[Talk]:
    """Words that mean nothing and share no prefix."""
    drawn = random.Random(seed)

    def size(most: int) -> int:
        return drawn.randint(max(1, round(most * (1 - lengths.range_ratio))), most)

    def words(number: int) -> str:
        return " ".join(_syllables(drawn) for _ in range(number))

    return [
        [Turn(words(size(lengths.input)), size(lengths.output)) for _ in range(turns)]
        for _ in range(count)
    ]


def _syllables(drawn: random.Random) -> str:
    return drawn.choice("bdfgklmnprstvz") + drawn.choice("aeiou") + drawn.choice("lmnrst")


def text_talks(text: str, count: int, turns: int, lengths: Lengths, seed: int) -> list[Talk]:
    """Passages of a text, with the spread of lengths that conversations have."""
    words = [match.span() for match in _WORD.finditer(text)]
    if len(words) < 2 * lengths.input:
        raise ConfigError(
            f"the text has {len(words)} words; give a longer one, or a lower input_len"
        )
    drawn = random.Random(seed)

    def size(mean: int, most: int) -> int:
        middle = math.log(mean) - _SPREAD**2 / 2
        return min(max(4, round(drawn.lognormvariate(middle, _SPREAD))), most)

    def turn() -> Turn:
        number = size(lengths.input, len(words) // 2)
        first = drawn.randrange(len(words) - number)
        passage = text[words[first][0] : words[first + number - 1][1]]
        return Turn(passage, size(lengths.output, 8 * lengths.output))

    return [[turn() for _ in range(turns)] for _ in range(count)]


def shipped_text() -> str:
    """English prose that every Python has: the topics of its own manual."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def file_talks(path: Path, count: int, turns: int, output: int | None, seed: int) -> list[Talk]:
    """Conversations of a file, in an order drawn from `seed`: JSON or JSON lines, in ShareGPT's
    form (`conversations`), OpenAI's (`messages`) or Alpaca's (`instruction`, `input`, `output`).

    An answer gets as many tokens as the file's has words, or `output`. Raises ConfigError.
    """
    try:
        text = path.read_text("utf-8")
        is_lines = path.suffix == ".jsonl"
        entries = [json.loads(t) for t in text.splitlines() if t] if is_lines else json.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    talks = [talk[:turns] for talk in map(_talk_reader(output), entries) if talk]
    if not talks:
        raise ConfigError(f"{path} has no conversation with a question and an answer")
    random.Random(seed).shuffle(talks)
    return [talks[i % len(talks)] for i in range(count)]


def _talk_reader(output: int | None) -> Callable[[Any], Talk]:
    def read(entry: Any) -> Talk:
        pairs = _pairs(entry)
        return [Turn(question, output or max(1, num_words(reply))) for question, reply in pairs]

    return read


def _pairs(entry: dict[str, Any]) -> list[tuple[str, str]]:
    if "instruction" in entry:
        question = "\n".join(filter(None, (entry["instruction"], entry.get("input"))))
        return [(question, entry["output"])]
    turns = entry.get("conversations") or entry.get("messages") or []
    said = [(t.get("from", t.get("role")), t.get("value", t.get("content"))) for t in turns]
    said = [one for one in said if one[0] != "system"]
    return [
        (question, reply)
        for (asks, question), (_, reply) in pairwise(said)
        if asks in ("human", "user") and isinstance(question, str) and isinstance(reply, str)
    ]


def num_words(text: str) -> int:
    return sum(1 for _ in _WORD.finditer(text))
