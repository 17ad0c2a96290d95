"""Records of preferences: one beginning of a dialogue, and two ways on from there.

    erniekit  {"src": [question, ...], "tgt": [earlier answer, ...], "response": [a, b], "sort":
              [1, 0], "system"?}      the larger of `sort` is preferred; a response is a text, or a
              list answer, question, answer, ...
    alpaca    {"question", "input"?, "chosen", "rejected", "history"?, "system"?}
    messages  {"prompt": [message, ...], "chosen": [message, ...], "rejected": [message, ...],
              "system"?, "tools"?}      without "prompt" it is what both dialogues begin with

A pair becomes one stretch of tokens in which the prompt stands once:

    prompt but its last token | last token, chosen answer | last token, rejected answer

so that both first tokens of an answer follow from the prompt. A prompt that is too long loses its
*oldest whole turns*; a pair that still does not fit is left out, and no answer is ever cut.
`chatml` is another name of `messages`. Whatever cannot be used raises `DataError`.

A multimodal model reads pairs about pictures too (`PairEncoder` with a `reader`): `images` and
`videos` of a record stand in the places of their tags, as in `erniekit.data.pictures`, and messages
may have parts. Pictures of the prompt are in the row once.

A reward model reads the same rows with the end of each answer among the inputs too, where otherwise
it is a label only: its scores stand at the tokens before `pairs_P4[:, 2]` and `pairs_P4[:, 3]`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

from ernie.chat import UNTRAINED, ChatTemplate, Encoded
from ernie.tokenizer import Tokenizer
from erniekit.data.dialogue import (
    Dialogue,
    Encoder,
    Sample,
    alpaca_prompt,
    read_dialogue,
    without_oldest_turns,
)
from erniekit.data.fields import kind_of, text_of, texts_of
from erniekit.data.sources import DataError

if TYPE_CHECKING:
    from erniekit.data.multimodal import Media, PictureReader


@dataclass(frozen=True)
class Pair:
    """Two whole dialogues, of which the first `num_prompt` messages are common; only what follows
    them has label 1.
    """

    chosen: list[dict[str, Any]]
    rejected: list[dict[str, Any]]
    num_prompt: int
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True, kw_only=True)
class PairSample(Sample):
    """A pair in the order above; the chosen answer begins at token `chosen`, the other one at
    `rejected`.
    """

    chosen: int
    rejected: int

    @property
    def positions(self) -> np.ndarray:
        if self.media is not None:
            return self.media.positions_3T
        first, second = self.rejected - self.chosen, len(self) - self.rejected
        return np.concatenate(
            [
                np.arange(n) + start
                for n, start in ((self.chosen, 0), (first, self.chosen), (second, self.chosen))
            ]
        )

    @property
    def key(self) -> bytes:
        """Equal for equal pairs: 16 bytes."""
        numbers = [self.chosen, self.rejected, *self.token_ids, *self.labels]
        content = np.asarray(numbers, np.int32).tobytes() + self.mark
        return hashlib.blake2b(content, digest_size=16).digest()


def read_pair(record: Any, kind: str, read: Callable[[Any, str], Dialogue] = read_dialogue) -> Pair:
    """The pair in a record of a format; `read` checks the dialogue of either answer, given as a
    record of messages. Raises DataError for one that cannot be used.
    """
    if not isinstance(record, dict):
        raise DataError(f"{kind_of(record)}; expected an object")
    prompt, chosen, rejected = _READERS[kind](record)
    if chosen == rejected:
        raise DataError("both answers are the same; expected one that is preferred")
    prompt = [{**m, "label": 0} if m.get("role") == "assistant" else m for m in prompt]
    first, second = (
        read({**record, "messages": prompt + answer}, "messages") for answer in (chosen, rejected)
    )
    num_prompt = len(first.messages) - len(chosen)
    return Pair(first.messages, second.messages, num_prompt, first.tools)


Parts = tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]


def _from_erniekit(record: Mapping[str, Any]) -> Parts:
    prompt = prompt_of(record)
    responses, order = record.get("response"), record.get("sort")
    if not isinstance(responses, list) or len(responses) != 2:
        raise DataError("response is not a list of two; expected two answers to choose from")
    if not isinstance(order, list) or [type(n) for n in order] != [int, int]:
        raise DataError(f"sort is {order!r}; expected two integers")
    if order[0] == order[1]:
        raise DataError(f"sort is {order!r}; expected the larger at the preferred answer")
    first, second = (continuation(response) for response in responses)
    chosen, rejected = (first, second) if order[0] > order[1] else (second, first)
    return prompt, chosen, rejected


def prompt_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of `src` and `tgt`, a question last; raises DataError."""
    questions = texts_of(record, "src")
    answers = texts_of(record, "tgt") if record.get("tgt") else []
    if len(questions) != len(answers) + 1:
        raise DataError(
            f"{len(questions)} src and {len(answers)} tgt; expected one question more than answers"
        )
    turns = [{"role": "user", "content": questions[0]}]
    for answer, question in zip(answers, questions[1:], strict=True):
        turns.append({"role": "assistant", "content": answer})
        turns.append({"role": "user", "content": question})
    return turns


def continuation(response: Any) -> list[dict[str, Any]]:
    """The messages of a response: a text, or a list answer, question, answer, ..."""
    texts = texts_of({"response": response}, "response")
    if len(texts) % 2 == 0:
        raise DataError(f"a response of {len(texts)} texts; expected an odd number, answers last")
    return [
        {"role": "user" if i % 2 else "assistant", "content": text} for i, text in enumerate(texts)
    ]


def _from_alpaca(record: Mapping[str, Any]) -> Parts:
    prompt = alpaca_prompt(record, "question").messages
    chosen, rejected = (continuation(text_of(record, key)) for key in ("chosen", "rejected"))
    return prompt, chosen, rejected


def _from_messages(record: Mapping[str, Any]) -> Parts:
    parts = {key: record[key] for key in ("prompt", "chosen", "rejected") if key in record}
    for key in ("chosen", "rejected", *parts):
        part = parts.get(key)
        if not isinstance(part, list) or not part or not all(isinstance(m, dict) for m in part):
            raise DataError(
                f"{key} is not a list of messages; expected objects with role and content"
            )
    if "prompt" in parts:
        return parts["prompt"], parts["chosen"], parts["rejected"]
    chosen, rejected = parts["chosen"], parts["rejected"]
    common = _num_equal(chosen, rejected)
    if not common:
        raise DataError("chosen and rejected have no beginning in common; expected a prompt")
    return chosen[:common], chosen[common:], rejected[common:]


def _num_equal(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items two sequences begin with in common."""
    pairs = enumerate(zip(a, b))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


_READERS = {
    "erniekit": _from_erniekit,
    "alpaca": _from_alpaca,
    "messages": _from_messages,
    "chatml": _from_messages,
}


class PairEncoder(Encoder):
    """Turns pairs into samples of at most `max_tokens`, prompts of at most `max_prompt_tokens`.

    Counts what `Encoder` does. With `masks_end` the token that ends an answer has no loss; with
    `reads_end` it is an input too.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        max_tokens: int,
        *,
        max_prompt_tokens: int,
        masks_end: bool,
        reads_end: bool = False,
        reader: PictureReader | None = None,
    ) -> None:
        super().__init__(tokenizer, template, max_tokens, reader=reader)
        self.max_prompt_tokens, self.masks_end = max_prompt_tokens, masks_end
        self.reads_end = reads_end

    def dialogue(self, record: Any, kind: str) -> Dialogue:
        """That of the chosen answer."""
        pair = self.pair(record, kind)
        return Dialogue(pair.chosen, pair.tools)

    def dialogues(self, record: Any, kind: str) -> list[Dialogue]:
        pair = self.pair(record, kind)
        return [Dialogue(messages, pair.tools) for messages in (pair.chosen, pair.rejected)]

    def pair(self, record: Any, kind: str) -> Pair:
        """With its pictures read, where there is a reader; raises DataError."""
        return read_pair(record, kind, self.checked)

    def read(self, record: Any, kind: str) -> list[Sample]:
        sample = self.sample(self.pair(record, kind))
        self.counts["tokens"] += len(sample)
        self.counts["trained tokens"] += sample.num_trained
        return [sample]

    def sample(self, pair: Pair) -> PairSample:
        """The pair as one stretch; raises DataError where it is too long or says nothing."""
        prompt, dropped, size, too_long = pair.chosen[: pair.num_prompt], -1, 0, ""
        for shorter in without_oldest_turns(prompt):
            sample, dropped = self._sample_after(shorter, pair), dropped + 1
            size = size or len(sample)
            too_long = self._what_is_too_long(sample)
            if not too_long:
                break
        if too_long:
            raise DataError(too_long)
        self.counts["dialogues cut"] += dropped > 0
        self.counts["turns dropped"] += dropped
        return replace(sample, num_cut=size - len(sample))

    def _what_is_too_long(self, sample: PairSample) -> str:
        if (length := sample.chosen + 1) > self.max_prompt_tokens:
            limit = f"max_seq_len and max_prompt_len allow {self.max_prompt_tokens}"
            return f"the last turn of its prompt has {length} tokens; {limit}"
        if len(sample) > self.max_tokens:
            limit = f"max_seq_len is {self.max_tokens}"
            return f"its last turn and both answers have {len(sample)} tokens; {limit}"
        return ""

    def _sample_after(self, prompt: list[dict[str, Any]], pair: Pair) -> PairSample:
        """The pair after another prompt, however long that is."""
        sides = [prompt + messages[pair.num_prompt :] for messages in (pair.chosen, pair.rejected)]
        both = [self.encode(messages, pair.tools) for messages in sides]
        wholes = self._media(both, sides)
        common = _num_common(both, wholes)
        assert common, "a dialogue begins with something"
        ids = both[0].token_ids[: common - 1]
        labels = [UNTRAINED] * len(ids)
        bounds: list[int] = []
        media: list[Media] = []
        for encoded, whole in zip_longest(both, wholes):
            targets = self._targets(encoded.labels[common:])
            end = common - 1 + len(targets) + self.reads_end
            if whole is not None:
                media.append(whole.cut(common - 1 if bounds else 0, end))
            bounds.append(len(ids))
            ids += encoded.token_ids[common - 1 : end]
            labels += targets + [UNTRAINED] * self.reads_end
        return PairSample(
            ids,
            labels,
            media=self.reader.joined(media) if self.reader else None,
            chosen=bounds[0],
            rejected=bounds[1],
        )

    def _media(self, both: Sequence[Encoded], sides: Sequence[list[dict[str, Any]]]) -> list[Media]:
        """Of each whole dialogue, none without a reader."""
        if self.reader is None:
            return []
        return [self.reader.media_of(e.token_ids, e, messages) for e, messages in zip(both, sides)]

    def _targets(self, labels: list[int]) -> list[int]:
        """Labels of an answer without ends where those are masked, up to the last one with loss."""
        if self.masks_end:
            labels = without_ends(labels)
        while labels and labels[-1] == UNTRAINED:
            labels.pop()
        if not labels:
            raise DataError("an answer has no token to learn from")
        return labels


def _num_common(both: Sequence[Encoded], wholes: Sequence[Media]) -> int:
    """Tokens that both dialogues begin with and that are not trained, up to a picture in which they
    differ.
    """
    bounds = [first_trained(encoded.labels) for encoded in both]
    if wholes:
        alike = _num_equal(*([picture.digest for picture in media.pictures] for media in wholes))
        bounds += [e.pictures[alike][1] for e in both if len(e.pictures) > alike]
    return min(*bounds, _num_equal(*(encoded.token_ids for encoded in both)))


def without_ends(labels: Sequence[int]) -> list[int]:
    """Labels of which the last of every stretch, the end of an answer, has no loss."""
    return [
        UNTRAINED if after == UNTRAINED else label
        for label, after in zip(labels, [*labels[1:], UNTRAINED], strict=True)
    ]


def first_trained(labels: list[int]) -> int:
    """Position of the first label; raises DataError where there is none."""
    first = next((i for i, label in enumerate(labels) if label != UNTRAINED), None)
    if first is None:
        raise DataError("an answer has label 0; nothing to learn from")
    return first
