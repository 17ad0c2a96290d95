"""Chat messages to token ids: one code path for a server's prompts and for training samples.

A template turns messages into *segments*. The text of the template itself is trusted: control
tokens it spells become their ids. The content of messages is not: whatever it spells, it stays
text. Text is encoded in one piece between two *cuts*: before everything the model writes (an answer
begins where the prompt of the server ended) and around control tokens. Hence the invariant that
tests hold for every template here:

    encode(messages[:i], add_generation_prompt=True).token_ids
        is a prefix of  encode(messages[:i + 1], add_generation_prompt=False).token_ids

      <|begin_of_sentence|>User: Hi\\nAssistant: | Hello!<|end_of_sentence|>User: ...
                                          cut ^

Messages are those of the OpenAI API; the key "label" (1 if missing) says whether an answer is
trained. Pictures are segments of their own, which become as many placeholder tokens as
the `pictures` of `encode` say (`ernie.vision.prompt` reads the pictures and asks for that).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ernie.chat.builtin import (
    llm_segments,
    thinking_segments,
    vl_segments,
    vl_thinking_segments,
)
from ernie.chat.folder import JinjaSegments, folder_sources, read_by
from ernie.chat.messages import ChatError, Dialogue, NoTemplate, Segment, checked_message
from ernie.tokenizer import Tokenizer

UNTRAINED = -100  # the label that cross-entropy leaves out
# What ends a turn in the templates of the family, besides the tokenizer's own eos.
END_TOKENS = ("<|end_of_sentence|>", "<|im_end|>")
# Stands for pictures and clips alike, in as many copies as they have tokens.
PLACEHOLDER = "<|IMAGE_PLACEHOLDER|>"
_TAG = re.compile(r"</?[a-z_]+>")
_CONTROL = re.compile(r"<\|[^\s<|>]+\|>")


@dataclass(frozen=True)
class Encoded:
    """Token ids and, for each, the label of that same position (not shifted), `UNTRAINED` for none.

    A label differs from its id in one place: the `<|end_of_sentence|>` after a trained answer is
    labelled with eos, which is what the model is to say there and what the server stops at, while
    the dialogue goes on with `<|end_of_sentence|>`. Source: ERNIEKit's data pipeline.

    `pictures`: (number in the `pictures` given, first token, token after the last) of each, in
    order of appearance.
    """

    token_ids: list[int]
    labels: list[int]
    pictures: list[tuple[int, int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class ChatTemplate:
    """How a model wants a dialogue written. Choose one with `for_folder`, or `LLM`, `THINKING`.

    `tags` are those its text spells, such as `<think>`: they tell how the model answers. `source`
    is that text; empty for a built-in one. `reads`: kinds of pictures that messages may hold.
    """

    name: str
    _segments: Callable[[Dialogue], list[Segment]]
    _required: tuple[str, ...] = ()
    tags: frozenset[str] = frozenset()
    source: str = ""
    reads: frozenset[str] = frozenset()

    @classmethod
    def for_folder(cls, path: str | Path, tokenizer: Tokenizer | None = None) -> ChatTemplate:
        """The template in a model folder, else the built-in one that its special tokens belong to.

        Looked for in chat_template.jinja, chat_template.json and tokenizer_config.json. Raises
        ChatError for one that does not compile, and NoTemplate where there is none and the
        tokenizer has the tokens of no built-in one. VL_THINKING is not told from VL by its tokens:
        its folder needs the template.
        """
        folder = Path(path)
        tokenizer = tokenizer or Tokenizer.from_folder(folder)
        sources, where = folder_sources(folder)
        if sources:
            return cls.from_sources(sources, where, tokenizer)
        for template in (VL, LLM, THINKING):
            if all(tokenizer.id_of(token) is not None for token in template._required):
                return template
        raise NoTemplate(
            f"{folder} has no chat template, and its tokenizer has neither {LLM._required} nor "
            f"{THINKING._required}; put the model's chat_template.jinja there"
        )

    @classmethod
    def from_sources(
        cls, sources: Mapping[str, str], where: str, tokenizer: Tokenizer
    ) -> ChatTemplate:
        """Jinja texts by name, of which one is "default"; `where` names them in errors.

        Raises ChatError for a text that does not compile or that belongs to another model.
        """
        tags = frozenset(_TAG.findall("\n".join(sources.values())))
        segments = JinjaSegments(sources, where, tokenizer, stop_ids(tokenizer))
        reads = read_by("\n".join(sources.values()))
        found = cls(where, segments, (), tags, json.dumps(sources, sort_keys=True), reads)
        _check_tokens(found, tokenizer)
        return found

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> list[Segment]:
        """The dialogue as segments, whose texts joined are the rendered text.

        With `add_generation_prompt` it is a prompt, and nothing in it is trained. Without, it is a
        sample: the answers whose message has no "label" of 0 are. `options` reach the template
        (`chat_template_kwargs` of the servers). Raises ChatError naming the message at fault.
        """
        checked = [
            checked_message(f"messages[{i}]", message, self.reads)
            for i, message in enumerate(messages)
        ]
        if not checked:
            raise ChatError("messages is empty; a dialogue needs at least one message")
        trained = frozenset(
            i
            for i, message in enumerate(checked)
            if message["role"] == "assistant" and message.pop("label", 1)
        )
        return self._segments(
            Dialogue(
                checked,
                [dict(tool) for tool in tools or ()],
                add_generation_prompt,
                options,
                frozenset() if add_generation_prompt else trained,
            )
        )

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        pictures: Sequence[tuple[str, int]] = (),
        /,
        **arguments: Any,
    ) -> Encoded:
        """`render(messages, **arguments)` as token ids and labels.

        `pictures`: kind and number of tokens of those that the messages hold, in order.
        """
        for token in self._required:
            if tokenizer.id_of(token) is None:
                raise ChatError(
                    f"the {self.name} template needs the token {token}, which the tokenizer lacks"
                )
        segments = self.render(messages, **arguments)
        _check_pictures([segment.picture for segment in segments if segment.picture], pictures)
        return _encoded(tokenizer, segments, pictures)

    def end_id(self, tokenizer: Tokenizer) -> int:
        """The id that ends an answer in a dialogue, whichever of `stop_ids` a model says there.

        Raises ChatError for a template that cannot write a question and an answer alone.
        """
        exchange = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        encoded = self.encode(tokenizer, exchange, add_generation_prompt=False)
        trained = [i for i, label in enumerate(encoded.labels) if label != UNTRAINED]
        return encoded.token_ids[trained[-1]]


def stop_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids at which generation ends: every eos of the folder, and the templates' end tokens."""
    ends = (tokenizer.id_of(token) for token in END_TOKENS)
    return tokenizer.eos_ids | {i for i in ends if i is not None}


def one_answer_each(messages: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
    """One sample for each trained answer, which ends with it; the answers before are context.

    For templates that write an answer differently once the dialogue goes on (thoughts are dropped),
    where training all answers of one sample would teach a form the model never has to produce.
    """
    samples = []
    for i, message in enumerate(messages):
        if message.get("role") == "assistant" and message.get("label", 1):
            samples.append([{**m, "label": 0} for m in messages[:i]] + [{**message, "label": 1}])
    return samples


def _check_tokens(template: ChatTemplate, tokenizer: Tokenizer) -> None:
    """Raises ChatError where control tokens that a template writes would be text to the model."""
    try:
        segments = template.render([{"role": "user", "content": "?"}])
    except ChatError:  # it wants more than that, and says so when it gets too little
        return
    written = {token for segment in segments for token in _CONTROL.findall(segment.text)}
    if missing := sorted(token for token in written if tokenizer.id_of(token) is None):
        own = sorted(token for token in tokenizer.control_tokens if _CONTROL.fullmatch(token))
        raise ChatError(
            f"{template.name} writes {', '.join(missing)}, and the tokenizer's control tokens are "
            f"{', '.join(own[:8]) or 'none of this kind'}; one of the two is of another model"
        )


def _check_pictures(written: Sequence[str], pictures: Sequence[tuple[str, int]]) -> None:
    given = Counter(kind for kind, _ in pictures)
    if Counter(written) != given:
        raise ChatError(
            f"the chat template has places for {dict(Counter(written))} where the messages hold "
            f"{dict(given)}; a dialogue with pictures is prepared by ernie.vision.prompt"
        )


def _encoded(
    tokenizer: Tokenizer, segments: Sequence[Segment], pictures: Sequence[tuple[str, int]]
) -> Encoded:
    token_ids: list[int] = []
    labels: list[int] = []
    spans: list[tuple[int, int, int]] = []
    waiting = list(enumerate(pictures))
    pending: list[str] = []  # plain text since the last cut
    is_trained = False
    trained: list[slice] = []  # runs of labels

    def put(ids: list[int]) -> None:
        if is_trained and ids:
            goes_on = trained and trained[-1].stop == len(labels)
            start = trained.pop().start if goes_on else len(labels)
            trained.append(slice(start, len(labels) + len(ids)))
        token_ids.extend(ids)
        labels.extend(ids if is_trained else [UNTRAINED] * len(ids))

    def cut() -> None:
        put(tokenizer.encode("".join(pending)))
        pending.clear()

    for segment in segments:
        if segment.starts_answer or segment.is_trained != is_trained:
            cut()
        is_trained = segment.is_trained
        if segment.picture:
            cut()
            chosen = next(entry for entry in waiting if entry[1][0] == segment.picture)
            waiting.remove(chosen)
            number, (_, num_tokens) = chosen
            spans.append((number, len(token_ids), len(token_ids) + num_tokens))
            put([_placeholder_id(tokenizer)] * num_tokens)
            continue
        if not segment.is_trusted:
            pending.append(segment.text)
            continue
        for piece in tokenizer.split_control(segment.text):
            if isinstance(piece, int):
                cut()
                put([piece])
            else:
                pending.append(piece)
    cut()
    _set_eos(tokenizer, labels, trained)
    return Encoded(token_ids, labels, spans)


def _placeholder_id(tokenizer: Tokenizer) -> int:
    found = tokenizer.id_of(PLACEHOLDER)
    if found is None:
        raise ChatError(f"the tokenizer has no {PLACEHOLDER}, which stands for pictures")
    return found


def _set_eos(tokenizer: Tokenizer, labels: list[int], trained: Sequence[slice]) -> None:
    """Replace `<|end_of_sentence|>` by eos in labels; refuses answers that end on no stop."""
    stops = stop_ids(tokenizer)
    end, eos = tokenizer.id_of("<|end_of_sentence|>"), tokenizer.eos_id
    for run in trained:
        last = labels[run.stop - 1]
        if last not in stops:
            raise ChatError(
                f"a trained answer ends with {tokenizer.token_of(last)!r}, which is not a stop "
                "token; a model trained on it would not learn to stop"
            )
        if eos is not None:
            labels[run] = [eos if i == end else i for i in labels[run]]


LLM = ChatTemplate("ERNIE 4.5", llm_segments, ("<|begin_of_sentence|>", "<|end_of_sentence|>"))
THINKING = ChatTemplate(
    "ERNIE 4.5 Thinking",
    thinking_segments,
    ("<|im_start|>", "<|im_end|>"),
    frozenset({"<think>", "<response>", "<tool_call>"}),
)
_VL_TOKENS = (
    *("<|begin_of_sentence|>", "<|end_of_sentence|>", PLACEHOLDER),
    *("<|IMAGE_START|>", "<|IMAGE_END|>", "<|VIDEO_START|>", "<|VIDEO_END|>"),
)
_VL_READS = frozenset({"image", "video"})
VL = ChatTemplate("ERNIE 4.5 VL", vl_segments, _VL_TOKENS, frozenset({"<think>"}), reads=_VL_READS)
VL_THINKING = ChatTemplate(
    "ERNIE 4.5 VL Thinking",
    vl_thinking_segments,
    _VL_TOKENS,
    frozenset({"<think>", "<tool_call>"}),
    reads=_VL_READS,
)
