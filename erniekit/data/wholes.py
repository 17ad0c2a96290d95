"""Records as they are before anything is cut off or left out: what the data commands count and show
beside the samples that are trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from erniekit.data.dialogue import Dialogue, Encoder, Sample
from erniekit.data.judged import JudgedSample
from erniekit.data.preference import PairEncoder, PairSample
from erniekit.data.sources import DataError, Source
from erniekit.data.text import TextEncoder


@dataclass(frozen=True)
class Shown:
    """A sample to look at; `cut_ids` are the tokens that stood before its token `cut_at`."""

    title: str
    sample: Sample
    cut_ids: list[int] = field(default_factory=list)
    cut_at: int = 0


def num_tokens(encoder: Encoder, source: Source, index: int, kind: str) -> int:
    """Tokens of a record that cannot be used: of its dialogues, else of its raw text."""
    try:
        return _num_tokens(encoder, encoder.dialogues(source[index], kind))
    except DataError:
        return len(encoder.tokenizer.encode(source.text(index)))


def num_left_out(encoder: Encoder, record: Any, kind: str) -> int:
    """Tokens behind the last trained answer, of which one sample per answer has none."""
    if not encoder.one_answer_per_sample and kind != "chatml":
        return 0
    dialogue = encoder.dialogues(record, kind)[0]
    if not encoder.splits(dialogue) or dialogue.messages[-1].get("label", 1):
        return 0
    shorter = Dialogue(encoder.parts(dialogue)[-1], dialogue.tools)
    return max(_num_tokens(encoder, [dialogue]) - _num_tokens(encoder, [shorter]), 0)


def shown(encoder: Encoder, record: Any, kind: str) -> list[Shown]:
    """Every sample of a record with what was cut off of it; raises DataError."""
    samples = encoder.read(record, kind)
    if isinstance(encoder, TextEncoder):
        titles = [f", document {n}" if len(samples) > 1 else "" for n in range(1, 1 + len(samples))]
        return [Shown(title, sample) for title, sample in zip(titles, samples)]
    sides = [side for sample in samples for side in sides_of(sample)]
    wholes = [
        encoder.encode(messages, dialogue.tools).token_ids
        for dialogue in encoder.dialogues(record, kind)
        for messages in encoder.parts(dialogue)
    ]
    if len(sides) > 1 and not isinstance(encoder, PairEncoder):
        titles = [f", answer {number} of {len(sides)}" for number in range(1, len(sides) + 1)]
        sides = [(title, sample) for title, (_, sample) in zip(titles, sides)]
    return [
        Shown(title, sample, *_cut(whole, sample)) for (title, sample), whole in zip(sides, wholes)
    ]


def sides_of(sample: Sample) -> list[tuple[str, Sample]]:
    """A sample, judged or with no title; or the two dialogues of a pair, each with its prompt."""
    if isinstance(sample, JudgedSample):
        return [(", desirable" if sample.is_desirable else ", undesirable", sample)]
    if not isinstance(sample, PairSample):
        return [("", sample)]
    ids, labels, start, middle = sample.token_ids, sample.labels, sample.chosen, sample.rejected
    return [
        (", chosen", Sample(ids[:middle], labels[:middle], sample.num_cut)),
        (
            ", rejected",
            Sample(
                [*ids[:start], *ids[middle:]], [*labels[:start], *labels[middle:]], sample.num_cut
            ),
        ),
    ]


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


def _num_tokens(encoder: Encoder, dialogues: list[Dialogue]) -> int:
    """Tokens of whole dialogues, what two of them begin with counted once."""
    first, *others = (
        encoder.encode([{**m, "label": 0} for m in d.messages], d.tools).token_ids
        for d in dialogues
    )
    return len(first) + sum(len(other) - _common(first, other) for other in others)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
