"""Records of the three dialogue formats to tokens with labels.

    erniekit  {"src": [question, ...], "tgt": [answer, ...], "system"?, "label"?: [0/1, ...]}
    alpaca    {"instruction", "input"?, "output", "history"?: [[question, answer], ...], "system"?}
    messages  {"messages": [{"role", "content", "label"?, "tool_calls"?}, ...], "tools"?}

Each becomes chat messages, and `ernie.chat` writes both these and a server's prompts, so that what
is trained is what is served. A dialogue that is longer than a row loses its *oldest whole turns*
(the system message stays); one whose last turn does not fit is left out. Nothing is cut inside a
turn. `chatml` is another name of `messages`. Whatever cannot be used raises `DataError`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ernie.chat import UNTRAINED, ChatError, ChatTemplate, one_answer_each
from ernie.tokenizer import Tokenizer
from erniekit.data.sources import DataError


@dataclass(frozen=True)
class Sample:
    """Inputs and what shall follow each of them: `labels[i]` is the token after `token_ids[i]`.

    The shift is made here, once, inside a sample; the last token of a dialogue is only a label.
    """

    token_ids: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def positions(self) -> np.ndarray:
        return np.arange(len(self))


@dataclass(frozen=True)
class Dialogue:
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


def read_dialogue(record: Any, kind: str) -> Dialogue:
    """The dialogue in a record of a format; raises DataError for one that cannot be used."""
    if not isinstance(record, dict):
        raise DataError(f"a {type(record).__name__}; expected an object")
    return _READERS[kind](record)


def _from_erniekit(record: Mapping[str, Any]) -> Dialogue:
    questions, answers = _texts(record, "src"), _texts(record, "tgt")
    system = record.get("system")
    if system is not None and not isinstance(system, str):
        raise DataError(f"system is a {type(system).__name__}; expected a string")
    if record.get("is_system") and not system:
        system, questions = questions[0], questions[1:]
    if len(questions) != len(answers):
        raise DataError(f"{len(questions)} src and {len(answers)} tgt; expected one answer each")
    labels = record.get("label", [1] * len(answers))
    if not isinstance(labels, list) or len(labels) != len(answers):
        raise DataError(f"label {labels!r}; expected a list of one 0 or 1 per answer")
    messages = _opening(system)
    for question, answer, label in zip(questions, answers, labels):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer, "label": label})
    return Dialogue(messages)


def _from_alpaca(record: Mapping[str, Any]) -> Dialogue:
    instruction, answer = _text(record, "instruction"), _text(record, "output")
    more = record.get("input") or ""
    if not isinstance(more, str):
        raise DataError(f"input is a {type(more).__name__}; expected a string")
    messages = _opening(record.get("system"))
    for pair in record.get("history") or ():
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
        ):
            raise DataError("history holds something else than [question, answer] pairs")
        messages.append({"role": "user", "content": pair[0]})
        messages.append({"role": "assistant", "content": pair[1]})
    question = f"{instruction}\n{more}" if more else instruction
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": answer})
    return Dialogue(messages)


def _from_messages(record: Mapping[str, Any]) -> Dialogue:
    messages, tools = record.get("messages"), record.get("tools")
    if not isinstance(messages, list) or not messages:
        raise DataError("no messages; expected a list of objects with role and content")
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"tools is a {type(tools).__name__}; expected a list")
    before = None
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role == "system" and i:
            raise DataError(f"messages[{i}] is of the system; it may only come first")
        if role == before == "user":
            raise DataError(f"messages[{i}] is a second user message in a row")
        if role == "assistant" and before in (None, "system", "assistant"):
            raise DataError(f"messages[{i}] is an answer without a question")
        if role == "assistant" and not (message.get("content") or message.get("tool_calls")):
            raise DataError(f"messages[{i}] is an empty answer")
        before = role
    if messages[-1]["role"] != "assistant":
        raise DataError("the last message is no answer; nothing follows it to be trained")
    return Dialogue(messages, tools or None)


_READERS = {
    "erniekit": _from_erniekit,
    "alpaca": _from_alpaca,
    "messages": _from_messages,
    "chatml": _from_messages,
}


def _opening(system: str | None) -> list[dict[str, Any]]:
    return [{"role": "system", "content": system}] if system else []


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{key} is {_shown(value)}; expected text")
    return value


def _texts(record: Mapping[str, Any], key: str) -> list[str]:
    value = record.get(key)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts:
        raise DataError(f"{key} is {_shown(value)}; expected a list of texts")
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{key}[{i}] is {_shown(text)}; expected text")
    return texts


def _shown(value: Any) -> str:
    if value is None:
        return "missing"
    return "empty" if value in ("", []) or isinstance(value, str) else f"a {type(value).__name__}"


class Encoder:
    """Turns dialogues into samples of at most `max_tokens` and counts what it had to leave out.

    `counts` has: dialogues cut, turns dropped, tokens read and tokens trained.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        max_tokens: int,
        *,
        one_answer_per_sample: bool = False,
    ) -> None:
        self.tokenizer, self.template, self.max_tokens = tokenizer, template, max_tokens
        self.one_answer_per_sample = one_answer_per_sample
        self.counts: Counter[str] = Counter()

    def dialogue(self, record: Any, kind: str) -> Dialogue:
        return read_dialogue(record, kind)

    def read(self, record: Any, kind: str) -> list[Sample]:
        """The samples of a record of a format; raises DataError for one that cannot be used."""
        return self.samples(self.dialogue(record, kind))

    def samples(self, dialogue: Dialogue) -> list[Sample]:
        """The samples of a dialogue; raises DataError where there is nothing to train on."""
        parts = [dialogue.messages]
        if self.one_answer_per_sample:
            parts = one_answer_each(dialogue.messages)
            if not parts:
                raise DataError("no answer with label 1; nothing to train on")
        samples = [self._sample(messages, dialogue.tools) for messages in parts]
        self.counts["tokens"] += sum(map(len, samples))
        self.counts["trained tokens"] += sum(
            label != UNTRAINED for sample in samples for label in sample.labels
        )
        return samples

    def _sample(self, messages: list[dict[str, Any]], tools: Any) -> Sample:
        dropped = -1
        for shorter in _without_oldest_turns(messages):
            encoded, dropped = self.encode(shorter, tools), dropped + 1
            if len(encoded.token_ids) <= self.max_tokens:
                break
        else:
            raise DataError(
                f"its last turn has {len(encoded.token_ids)} tokens; max_seq_len is "
                f"{self.max_tokens}"
            )
        self.counts["dialogues cut"] += dropped > 0
        self.counts["turns dropped"] += dropped
        labels = encoded.labels[1:]
        if all(label == UNTRAINED for label in labels):
            raise DataError(
                "no trained answer is left after cutting"
                if dropped
                else "no answer with label 1; nothing to train on"
            )
        return Sample(encoded.token_ids[:-1], labels)

    def encode(self, messages: list[dict[str, Any]], tools: Any = None) -> Any:
        """A whole dialogue as the template writes it, labels not shifted; raises DataError."""
        extra = {"tools": tools} if tools else {}
        try:
            return self.template.encode(
                self.tokenizer, messages, add_generation_prompt=False, **extra
            )
        except ChatError as error:
            raise DataError(str(error)) from None


def _without_oldest_turns(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The messages; without the first turn; without the first two; ... A turn starts with the
    user.
    """
    start = int(messages[0].get("role") == "system") if isinstance(messages[0], dict) else 0
    turns = [i for i in range(start, len(messages)) if messages[i].get("role") == "user"]
    yield messages
    for i in turns[1:]:
        yield messages[:start] + messages[i:]
