"""Records of the dialogue formats to tokens with labels.

    erniekit  {"src": [question, ...], "tgt": [answer, ...], "system"?, "label"?: [0/1, ...]}
    alpaca    {"instruction", "input"?, "output", "history"?: [[question, answer], ...], "system"?}
    messages  {"messages": [{"role", "content", "label"?, "tool_calls"?}, ...], "system"?, "tools"?}
    chatml    the same; each trained answer is a sample of its own, as in ERNIEKit
    sharegpt  {"conversations": [{"from", "value"}, ...], "system"?, "tools"?}

Each becomes chat messages, and `ernie.chat` writes both these and a server's prompts, so that what
is trained is what is served. `system` is the first message; one that is blank is left out, and a
question or an answer that is blank is a fault. A dialogue that is longer than a row loses its
*oldest whole turns* (the system message stays); one whose last turn does not fit is left out.
Nothing is cut inside a turn. Whatever cannot be used raises `DataError`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ernie.chat import UNTRAINED, ChatError, ChatTemplate, Encoded, one_answer_each
from ernie.chat.messages import checked_message
from ernie.tokenizer import Tokenizer, TokenizerError
from erniekit.data import sharegpt
from erniekit.data.calls import Calls, read_tools
from erniekit.data.fields import is_blank, kind_of, short, text_of, texts_of
from erniekit.data.sources import DataError

if TYPE_CHECKING:
    from erniekit.data.multimodal import Media, PictureReader


@dataclass(frozen=True)
class Sample:
    """Inputs and what shall follow each of them: `labels[i]` is the token after `token_ids[i]`.

    The shift is made here, once, inside a sample; the last token of a dialogue is only a label.
    `num_cut` tokens of the dialogue were in turns that were left out because it was too long.
    `media` is what a sample of a multimodal model has beside.
    """

    token_ids: Sequence[int]
    labels: Sequence[int]
    num_cut: int = field(default=0, compare=False)
    media: Media | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_trained(self) -> int:
        return len(self.labels) - self.labels.count(UNTRAINED)

    @property
    def positions(self) -> np.ndarray:
        """`(T,)`, or `(3, T)` of a multimodal model."""
        return np.arange(len(self)) if self.media is None else self.media.positions_3T

    @property
    def mark(self) -> bytes:
        """What tells it from a sample of the same tokens."""
        return b"" if self.media is None else self.media.mark

    @property
    def content(self) -> bytes:
        """Equal for samples of equal tokens and pictures, whatever is trained of them."""
        return np.asarray(self.token_ids, np.int32).tobytes() + self.mark

    @property
    def num_bytes(self) -> int:
        """Bytes that it holds besides its tokens."""
        return 0 if self.media is None else self.media.num_bytes


class CutAway(DataError):
    """All trained answers of a dialogue were in the turns that did not fit."""


@dataclass(frozen=True)
class Dialogue:
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    is_split: bool = False  # each trained answer is a sample of its own


@dataclass(frozen=True)
class Written:
    """Messages as a record has them, where in it each stands, and its tools."""

    messages: list[Any]
    places: list[str]
    tools: Any = None


def read_dialogue(record: Any, kind: str) -> Dialogue:
    """The dialogue in a record of a format; raises DataError for one that cannot be used."""
    if not isinstance(record, dict):
        raise DataError(f"{kind_of(record)}; expected an object")
    dialogue = checked_dialogue(record, written(record, kind))
    return replace(dialogue, is_split=kind == "chatml")


def written(record: Mapping[str, Any], kind: str) -> Written:
    """What a record of a format holds beside `system`; raises DataError."""
    own = _OWN_KEYS.get("messages" if kind == "chatml" else kind)
    if own and own not in record:
        for other, key in _OWN_KEYS.items():
            if key in record:
                raise DataError(f"it has no {own} but {key}, as of the type {other}")
    return _READERS[kind](record)


def _from_erniekit(record: Mapping[str, Any]) -> Written:
    questions, answers = texts_of(record, "src"), texts_of(record, "tgt")
    num_first = int(first_is_system(record))
    messages = [{"role": "system", "content": text} for text in questions[:num_first]]
    places = [f"src[{i}]" for i in range(num_first)]
    questions = questions[num_first:]
    if len(questions) != len(answers):
        raise DataError(
            f"{len(questions)} src and {len(answers)} tgt; expected one answer each", at="tgt"
        )
    labels = record.get("label", [1] * len(answers))
    if not isinstance(labels, list) or len(labels) != len(answers):
        raise DataError(
            f"label is {short(labels)}; expected a list of one 0 or 1 per answer", at="label"
        )
    for i, label in enumerate(labels):
        if label not in (0, 1):
            raise DataError(f"label[{i}] is {short(label)}; expected 0 or 1", at=f"label[{i}]")
    for i, (question, answer, label) in enumerate(zip(questions, answers, labels)):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer, "label": label})
        places += [f"src[{i + num_first}]", f"tgt[{i}]"]
    return Written(messages, places)


def first_is_system(record: Mapping[str, Any]) -> bool:
    """Whether the first text of a record is that of the system, which it does not give apart."""
    system = record.get("system")
    return bool(record.get("is_system")) and (system is None or is_blank(system))


def _from_alpaca(record: Mapping[str, Any]) -> Written:
    asked, answer = alpaca_prompt(record, "instruction"), text_of(record, "output")
    messages = [*asked.messages, {"role": "assistant", "content": answer}]
    return Written(messages, [*asked.places, "output"])


def alpaca_prompt(record: Mapping[str, Any], question: str) -> Written:
    """The turns of `history`, and the question of that key with its `input`; raises DataError."""
    text, more = text_of(record, question), record.get("input")
    if not isinstance(more, (str, type(None))):
        raise DataError(f"input is {kind_of(more)}; expected a string", at="input")
    earlier = history_of(record)
    if more and not is_blank(more):
        text = f"{text}\n{more}"
    messages = [*earlier.messages, {"role": "user", "content": text}]
    return Written(messages, [*earlier.places, question])


def history_of(record: Mapping[str, Any]) -> Written:
    """The turns of `history`, a list of [question, answer]; raises DataError."""
    history = record.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"history is {kind_of(history)}; expected a list", at="history")
    messages, places = [], []
    for i, pair in enumerate(history):
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
        ):
            raise DataError(f"history[{i}] is not a pair [question, answer]", at=f"history[{i}]")
        messages.append({"role": "user", "content": pair[0]})
        messages.append({"role": "assistant", "content": pair[1]})
        places += [f"history[{i}][0]", f"history[{i}][1]"]
    return Written(messages, places)


def _from_messages(record: Mapping[str, Any]) -> Written:
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(
            "no messages; expected a list of objects with role and content", at="messages"
        )
    places = [f"messages[{i}]" for i in range(len(messages))]
    return Written(messages, places, record.get("tools"))


def _from_sharegpt(record: Mapping[str, Any]) -> Written:
    return Written(*sharegpt.messages_of(record), record.get("tools"))


def checked_dialogue(
    record: Mapping[str, Any], found: Written, reads: Collection[str] = ()
) -> Dialogue:
    """The dialogue of a record in which messages were found, with pictures of the kinds that are
    read; raises DataError.
    """
    declared = read_tools(found.tools)
    messages, places = _opened(found.messages, found.places, record.get("system"))
    messages = [_labelled(message, where) for message, where in zip(messages, places)]
    before, calls = None, Calls(declared)
    for i, (message, where) in enumerate(zip(messages, places)):
        try:
            checked = checked_message(where, message, reads)
        except ChatError as error:
            raise DataError(str(error), at=where) from None
        role = checked["role"]
        fault = (
            _out_of_order(role, before, is_first=i == 0)
            or _nothing_said(checked)
            or calls.fault(checked)
        )
        if fault:
            raise DataError(f"{where} {fault}", at=where)
        before = role
    if before != "assistant":
        raise DataError(
            "the last message is not an answer; nothing follows it to be trained",
            at=places[-1] if places else "",
        )
    return Dialogue(messages, declared or None)


def _opened(messages: list[Any], places: list[str], system: Any) -> tuple[list[Any], list[str]]:
    """Messages and their places, the first those of the record's system text; one that is blank is
    left out. Raises DataError.
    """
    if not isinstance(system, (str, type(None))):
        raise DataError(f"system is {kind_of(system)}; expected a string", at="system")
    first = messages[0] if messages and isinstance(messages[0], Mapping) else {}
    if first.get("role") == "system" and is_blank(first.get("content")):
        messages, places, first = messages[1:], places[1:], {}
    if system is None or is_blank(system):
        return messages, places
    if first.get("role") == "system":
        raise DataError(
            f"system is given, and {places[0]} is of the system too; expected one of them",
            at="system",
        )
    return [{"role": "system", "content": system}, *messages], ["system", *places]


def _labelled(message: Any, where: str) -> Any:
    """A message whose `weight`, as OpenAI's files for fine-tuning have it, is its `label`."""
    if not isinstance(message, Mapping) or message.get("weight") is None:
        return message
    label = message.get("label", message["weight"])
    if label != message["weight"]:
        raise DataError(
            f"{where} has the label {short(label)} and the weight {short(message['weight'])}; give "
            "one of them",
            at=where,
        )
    return {key: value for key, value in message.items() if key != "weight"} | {"label": label}


def _out_of_order(role: str, before: str | None, *, is_first: bool) -> str:
    """What is wrong with a message after one of role `before`; the empty string for nothing."""
    if role == "system" and not is_first:
        return "is of the system; it may only come first"
    if role == before == "user":
        return "is a second user message in a row"
    if role == "assistant" and before in (None, "system", "assistant"):
        return "is an answer without a question"
    return ""


def _nothing_said(checked: Mapping[str, Any]) -> str:
    """The fault of a question or an answer that is blank; the empty string for none."""
    if not is_blank(checked["content"]):
        return ""
    if checked["role"] == "user":
        return "is an empty question; expected text"
    says_more = checked.get("tool_calls") or not is_blank(checked.get("reasoning_content", ""))
    if checked["role"] == "assistant" and not says_more:
        return "is an empty answer; expected text"
    return ""


# By which a record of a format is known from those of others.
_OWN_KEYS = {
    "erniekit": "src",
    "alpaca": "instruction",
    "messages": "messages",
    "sharegpt": "conversations",
}
_READERS = {
    "erniekit": _from_erniekit,
    "alpaca": _from_alpaca,
    "messages": _from_messages,
    "chatml": _from_messages,
    "sharegpt": _from_sharegpt,
    "reasoning_gym": _from_messages,
}


class Encoder:
    """Turns dialogues into samples of at most `max_tokens` and counts what it had to leave out.

    `counts` has: dialogues cut, turns dropped, tokens of the samples and the trained ones of them.
    With a `reader` samples are those of a multimodal model, with the pictures that records name.
    """

    one_answer_per_sample = False
    reader: PictureReader | None = None

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        max_tokens: int,
        *,
        one_answer_per_sample: bool = False,
        reader: PictureReader | None = None,
    ) -> None:
        self.tokenizer, self.template, self.max_tokens = tokenizer, template, max_tokens
        self.one_answer_per_sample, self.reader = one_answer_per_sample, reader
        self.counts: Counter[str] = Counter()

    def dialogue(self, record: Any, kind: str) -> Dialogue:
        """What is shown and asked of a record; raises DataError."""
        return self.checked(record, kind)

    def checked(self, record: Any, kind: str) -> Dialogue:
        """The dialogue of a record, with its pictures read where there is a reader; raises
        DataError.
        """
        return self.reader.dialogue(record, kind) if self.reader else read_dialogue(record, kind)

    def dialogues(self, record: Any, kind: str) -> list[Dialogue]:
        """Everything that is trained of a record."""
        return [self.dialogue(record, kind)]

    def read(self, record: Any, kind: str) -> list[Sample]:
        """The samples of a record of a format; raises DataError for one that cannot be used."""
        return self.samples(self.dialogue(record, kind))

    def samples(self, dialogue: Dialogue) -> list[Sample]:
        """The samples of a dialogue; raises DataError where there is nothing to train on."""
        samples = [self.fitted(messages, dialogue.tools) for messages in self.parts(dialogue)]
        self.counts["tokens"] += sum(map(len, samples))
        self.counts["trained tokens"] += sum(sample.num_trained for sample in samples)
        return samples

    def parts(self, dialogue: Dialogue) -> list[list[dict[str, Any]]]:
        """The messages of each sample, before anything is cut."""
        if not self.splits(dialogue):
            return [dialogue.messages]
        parts = one_answer_each(dialogue.messages)
        if not parts:
            raise DataError("no answer with label 1; nothing to train on")
        return parts

    def splits(self, dialogue: Dialogue) -> bool:
        return self.one_answer_per_sample or dialogue.is_split

    def fitted(self, messages: list[dict[str, Any]], tools: Any = None) -> Sample:
        """One sample of messages, cut to fit; raises DataError where nothing is left to train."""
        encoded, dropped, num_cut = self.encode(messages, tools), 0, 0
        if (size := len(encoded.token_ids)) > self.max_tokens:
            encoded, dropped = self._shortened(messages, tools)
            num_cut = size - len(encoded.token_ids)
        self.counts["dialogues cut"] += dropped > 0
        self.counts["turns dropped"] += dropped
        sample = self.sample_of(encoded, messages, num_cut)
        if not sample.num_trained:
            if dropped:
                raise CutAway("no trained answer is left after cutting")
            raise DataError("no answer with label 1; nothing to train on")
        return sample

    def sample_of(
        self, encoded: Encoded, messages: Sequence[Mapping[str, Any]], num_cut: int
    ) -> Sample:
        """The sample of an encoded dialogue, `num_cut` tokens of whose messages were cut off."""
        ids = encoded.token_ids[:-1]
        media = self.reader.media_of(ids, encoded, messages) if self.reader else None
        return Sample(ids, encoded.labels[1:], num_cut, media)

    def _shortened(self, messages: list[dict[str, Any]], tools: Any) -> tuple[Encoded, int]:
        """A dialogue that is too long without as few of its oldest turns as possible, and their
        number; found in a few encodings, because every turn makes it longer.
        """
        shorter = list(without_oldest_turns(messages))

        @cache
        def without(num_turns: int) -> Encoded:
            return self.encode(shorter[num_turns], tools)

        def fits(num_turns: int) -> bool:
            return len(without(num_turns).token_ids) <= self.max_tokens

        last = len(shorter) - 1
        if not fits(last):
            raise DataError(
                f"its last turn is longer than max_seq_len={self.max_tokens}; it has "
                f"{len(without(last).token_ids)} tokens"
            )
        dropped = bisect_left(range(last), True, lo=1, key=fits)
        return without(dropped), dropped

    def encode(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> Encoded:
        """A whole dialogue as the template writes it, labels not shifted; raises DataError."""
        extra = {"tools": tools} if tools else {}
        sizes = self.reader.sizes(messages) if self.reader else ()
        try:
            return self.template.encode(
                self.tokenizer, messages, sizes, add_generation_prompt=False, **extra
            )
        except (ChatError, TokenizerError) as error:
            raise DataError(str(error)) from None


def without_oldest_turns(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The messages; without the first turn; without the first two; ... A turn starts with the
    user.
    """
    start = int(messages[0].get("role") == "system") if isinstance(messages[0], dict) else 0
    turns = [i for i in range(start, len(messages)) if messages[i].get("role") == "user"]
    yield messages
    for i in turns[1:]:
        yield messages[:start] + messages[i:]
