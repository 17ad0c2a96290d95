"""Records of single answers that are judged: desirable or undesirable (stage: KTO).

    erniekit  {"src": [question, ...], "tgt": [earlier answer, ...], "response": answer, "label":
              true, "system"?}      a response may be a list answer, question, answer, ...
    alpaca    {"instruction", "input"?, "output", "history"?, "system"?, "kto_tag": true}
    messages  {"messages": [message, ..., answer], "label": true, "system"?, "tools"?}
              {"prompt": [message, ...], "completion": [message, ...], "label": true, "system"?,
              "tools"?}

Without tables to tell them apart these are also the formats of LLaMA-Factory's `kto_en_demo`
(messages; `kto_tag` and `label` are two names of one key) and of TRL (prompt and completion; both
may be texts). `chatml` is another name of `messages`. Whatever cannot be used raises `DataError`.

A judged answer is compared with what is usual, which needs the answer to another prompt after this
one (`JudgedSample.other`): that of the next record in the file that has another prompt. It is not
part of a row, and is cut where it is too long.
"""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ernie.chat import UNTRAINED, ChatTemplate
from ernie.tokenizer import Tokenizer
from erniekit.data.dialogue import Dialogue, Encoder, Sample, read_dialogue, written
from erniekit.data.fields import kind_of
from erniekit.data.preference import continuation, first_trained, prompt_of, without_ends
from erniekit.data.sources import DataError

if TYPE_CHECKING:
    from erniekit.data.multimodal import PictureReader

NEIGHBOURS = 100  # records after one that are looked through for an answer to another prompt


@dataclass(frozen=True)
class Judgement:
    """A dialogue, of which only what was judged has label 1."""

    dialogue: Dialogue
    is_desirable: bool


@dataclass(frozen=True, kw_only=True)
class JudgedSample(Sample):
    """A prompt and an answer; the answer begins with what follows token `num_prompt - 1`.

    `other` is the prompt with an answer that belongs to another one, None before it is known.
    """

    num_prompt: int
    is_desirable: bool
    other: Sample | None = None

    @property
    def prompt(self) -> tuple[list[int], bytes]:
        """Equal for equal prompts."""
        media = self.media and self.media.cut(0, self.num_prompt)
        return list(self.token_ids[: self.num_prompt]), media.mark if media else b""

    @property
    def key(self) -> bytes:
        """Equal for equal answers that are compared with equal ones: 16 bytes."""
        numbers, mark = [len(self), *self.token_ids, *self.labels], self.mark
        if self.other is not None:
            numbers += [*self.other.token_ids, *self.other.labels]
            mark += self.other.mark
        content = np.asarray(numbers, np.int32).tobytes() + mark
        return hashlib.blake2b(content, digest_size=16).digest()


def read_judgement(
    record: Any, kind: str, read: Callable[[Any, str], Dialogue] = read_dialogue
) -> Judgement:
    """The judged answer in a record of a format; `read` checks its dialogue, given as a record of
    messages. Raises DataError for one that cannot be used.
    """
    if not isinstance(record, dict):
        raise DataError(f"{kind_of(record)}; expected an object")
    messages, num_judged = _READERS[kind](record)
    dialogue = read({**record, "messages": messages}, "messages")
    num_prompt = len(dialogue.messages) - num_judged
    messages = [
        {**m, "label": int(i >= num_prompt)} if m.get("role") == "assistant" else m
        for i, m in enumerate(dialogue.messages)
    ]
    return Judgement(Dialogue(messages, dialogue.tools), _label(record))


def _label(record: Mapping[str, Any]) -> bool:
    keys = [key for key in ("label", "kto_tag") if key in record]
    if len(keys) != 1:
        told = "both label and kto_tag" if keys else "no label"
        raise DataError(f"{told}; expected label: true for a desirable answer, else false")
    value = record[keys[0]]
    if not isinstance(value, bool):
        raise DataError(f"{keys[0]} is {value!r}; expected true or false", at=keys[0])
    return value


Turns = tuple[list[dict[str, Any]], int]  # messages, and how many of the last ones are judged


def _from_erniekit(record: Mapping[str, Any]) -> Turns:
    answer = continuation(record.get("response"))
    return prompt_of(record) + answer, len(answer)


def _from_alpaca(record: Mapping[str, Any]) -> Turns:
    return written(record, "alpaca").messages, 1


def _from_messages(record: Mapping[str, Any]) -> Turns:
    if "messages" in record:
        return record["messages"], 1
    prompt = _messages(record, "prompt", "user")
    answer = _messages(record, "completion", "assistant")
    return prompt + answer, len(answer)


def _messages(record: Mapping[str, Any], key: str, role: str) -> list[dict[str, Any]]:
    value = record.get(key)
    if isinstance(value, str) and value.strip():
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise DataError(f"{key} is neither text nor a list of messages", at=key)
    return value


_READERS = {
    "erniekit": _from_erniekit,
    "alpaca": _from_alpaca,
    "messages": _from_messages,
    "chatml": _from_messages,
}


class JudgedEncoder(Encoder):
    """Turns judged answers into samples of at most `max_tokens`, as `Encoder` does dialogues.

    With `masks_end` the token that ends an answer has no loss.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        max_tokens: int,
        *,
        masks_end: bool,
        reader: PictureReader | None = None,
    ) -> None:
        super().__init__(tokenizer, template, max_tokens, reader=reader)
        self.masks_end = masks_end

    def dialogue(self, record: Any, kind: str) -> Dialogue:
        return self.judgement(record, kind).dialogue

    def judgement(self, record: Any, kind: str) -> Judgement:
        """With its pictures read, where there is a reader; raises DataError."""
        return read_judgement(record, kind, self.checked)

    def read(self, record: Any, kind: str) -> list[Sample]:
        judgement = self.judgement(record, kind)
        (sample,) = self.samples(judgement.dialogue)
        labels = without_ends(sample.labels) if self.masks_end else list(sample.labels)
        if all(label == UNTRAINED for label in labels):
            raise DataError("an answer has no token to learn from")
        num_prompt = first_trained(labels) + 1
        return [
            JudgedSample(
                sample.token_ids,
                labels,
                sample.num_cut,
                sample.media,
                num_prompt=num_prompt,
                is_desirable=judgement.is_desirable,
            )
        ]

    def completed(
        self, samples: list[Sample], following: Iterable[tuple[Any, str]]
    ) -> list[Sample]:
        """The samples of a record with their `other`, from the records (and formats) after it."""
        (sample,) = samples
        assert isinstance(sample, JudgedSample)
        prompt, neighbour = sample.prompt, copy.copy(self)
        neighbour.counts = Counter()  # each is counted where it is read for itself
        for record, kind in following:
            try:
                (other,) = neighbour.read(record, kind)
            except DataError:  # told where it is read for itself
                continue
            assert isinstance(other, JudgedSample)
            if other.prompt != prompt:
                return [replace(sample, other=self._after(sample, other))]
        raise DataError(
            f"no other prompt in the {NEIGHBOURS} records after it; expected one, whose answer its "
            "own is compared with"
        )

    def _after(self, sample: JudgedSample, other: JudgedSample) -> Sample:
        """The answer of a sample after the prompt of another one, cut to fit."""
        middle, start = sample.num_prompt, other.num_prompt
        ids = [*sample.token_ids[:middle], *other.token_ids[start:]][: self.max_tokens]
        labels = [UNTRAINED] * (middle - 1) + list(other.labels[start - 1 :])
        media = None
        if self.reader and sample.media and other.media:
            own, answer = sample.media.cut(0, middle), other.media.cut(start, len(other))
            media = self.reader.media(ids, [*own.pictures, *answer.pictures])
        return Sample(ids, labels[: self.max_tokens], media=media)
