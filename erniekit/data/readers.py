"""What the data commands read a record with, by stage: dialogues, or pairs of them.

A pair becomes one sample for counting: what both dialogues begin with, once; the rest of the chosen
one; the rest of the rejected one. Of both only the answers are trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ernie.chat import UNTRAINED
from erniekit.data.dialogue import Dialogue, Encoder, Sample, read_dialogue
from erniekit.data.preference import Pair, read_pair
from erniekit.data.sources import DataError, Source


@dataclass(frozen=True)
class Read:
    """The samples of a record, and the tokens of messages that are in none of them."""

    samples: list[Sample]
    num_left_out: int = 0


@dataclass(frozen=True)
class Shown:
    """A sample to look at; `cut_ids` are the tokens that stood before its token `cut_at`."""

    title: str
    sample: Sample
    cut_ids: list[int] = field(default_factory=list)
    cut_at: int = 0


@dataclass(frozen=True)
class Reader:
    """`read(encoder, record, kind)` raises DataError; `dialogues(record, kind)` are the dialogues
    in a record, before anything is encoded, and `titles` say which is which. `is_packed`: rows are
    filled by `erniekit.data.pack`.
    """

    read: Callable[[Encoder, Any, str], Read]
    dialogues: Callable[[Any, str], list[Dialogue]]
    titles: tuple[str, ...] = ("",)
    is_packed: bool = True

    def shown(self, encoder: Encoder, record: Any, kind: str) -> list[Shown]:
        """Every sample of a record with what was cut off of it; raises DataError."""
        found = []
        for dialogue, title in zip(self.dialogues(record, kind), self.titles):
            parts = encoder.parts(dialogue)
            for number, messages in enumerate(parts, start=1):
                sample = encoder.fitted(messages, dialogue.tools)
                whole = encoder.encode(messages, dialogue.tools).token_ids
                which = f", answer {number} of {len(parts)}" if len(parts) > 1 else ""
                found.append(Shown(title + which, sample, *_cut(whole, sample)))
        return found

    def size(self, encoder: Encoder, source: Source, index: int, kind: str) -> int:
        """Tokens of a record that cannot be used: of its dialogues, else of its raw text."""
        try:
            found = self.dialogues(source[index], kind)
            return _num_tokens(encoder, found)
        except DataError:
            return len(encoder.tokenizer.encode(source.text(index)))


def _read_dialogue(encoder: Encoder, record: Any, kind: str) -> Read:
    dialogue = read_dialogue(record, kind)
    samples = encoder.samples(dialogue)
    return Read(samples, _after_last_answer(encoder, dialogue))


def _after_last_answer(encoder: Encoder, dialogue: Dialogue) -> int:
    """Tokens behind the last trained answer, of which one sample per answer has none."""
    last = dialogue.messages[-1]
    if not encoder.one_answer_per_sample or last.get("label", 1):
        return 0
    longest = encoder.parts(dialogue)[-1]
    shorter = Dialogue(longest, dialogue.tools)
    return max(_num_tokens(encoder, [dialogue]) - _num_tokens(encoder, [shorter]), 0)


def _read_pair(encoder: Encoder, record: Any, kind: str) -> Read:
    wholes = _dialogues_of_pair(record, kind)
    chosen, rejected = (encoder.fitted(d.messages) for d in wholes)
    joined, num_cut = joined_pair(chosen, rejected), 0
    if chosen.num_cut or rejected.num_cut:
        num_cut = _num_tokens(encoder, wholes) - (len(joined) + 1)
    return Read([Sample(joined.token_ids, joined.labels, num_cut)])


def joined_pair(chosen: Sample, rejected: Sample) -> Sample:
    """Both dialogues one after the other; what they begin with, up to the answers, once."""
    answers = (
        next(i for i, n in enumerate(s.labels) if n != UNTRAINED) for s in (chosen, rejected)
    )
    shared = min(_common(chosen.token_ids, rejected.token_ids), 1 + min(answers))
    return Sample(
        [*chosen.token_ids, chosen.labels[-1], *rejected.token_ids[shared:]],
        [*chosen.labels, *rejected.labels[shared - 1 :]],
    )


def _dialogues_of_pair(record: Any, kind: str) -> list[Dialogue]:
    pair: Pair = read_pair(record, kind)
    return [Dialogue(pair.chosen), Dialogue(pair.rejected)]


def _num_tokens(encoder: Encoder, dialogues: list[Dialogue]) -> int:
    """Tokens of whole dialogues, what two of them begin with counted once."""
    first, *others = (
        encoder.encode([{**m, "label": 0} for m in d.messages], d.tools).token_ids
        for d in dialogues
    )
    return len(first) + sum(len(other) - _common(first, other) for other in others)


def _cut(whole: list[int], sample: Sample) -> tuple[list[int], int]:
    """The tokens of whole turns that a sample lacks, and where they stood: as far to the front as
    they can have been.
    """
    if not sample.num_cut:
        return [], 0
    start = _common(whole, sample.token_ids)
    while start and whole[start - 1] == whole[start - 1 + sample.num_cut]:
        start -= 1
    return whole[start : start + sample.num_cut], start


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


READERS = {
    "SFT": Reader(_read_dialogue, lambda record, kind: [read_dialogue(record, kind)]),
    "DPO": Reader(_read_pair, _dialogues_of_pair, (", chosen", ", rejected"), is_packed=False),
}
