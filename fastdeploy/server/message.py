"""The message of a chat answer as it grows: thoughts, content, tool calls, and their tokens."""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ernie.chat.calls import Call
from ernie.tokenizer import Detokenizer, Tokenizer
from fastdeploy.outputs import CompletionOutput, TokenLogprobs
from fastdeploy.server.parsers import Parser, Segment, Syntax

_CHECKED_PIECE = 8192  # characters; a parser that is fed a long text at once copies it often


@dataclass(frozen=True, slots=True)
class Reading:
    """How the answers of one chat request are read."""

    syntax: Syntax = field(default_factory=Syntax)
    in_thought: bool = False  # the prompt ends in the middle of a thought
    begun: str = ""  # what the request has begun the answers with
    parallel: bool = True  # False: the first call is made, later ones are left out
    shown: frozenset[int] = frozenset()  # special tokens that the parser has to see
    is_held: bool = False  # a grammar holds each call to its form

    def parser(self) -> Parser:
        return Parser(
            self.syntax, in_thought=self.in_thought, is_held=self.is_held, begun=self.begun
        )


@dataclass(slots=True)
class Said:
    """What a message says, or what is new in it."""

    reasoning: str = ""
    content: str = ""
    arguments: str = ""  # more of those of a call before
    calls: list[Call] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the tokens of the content

    def add(self, segments: Iterable[Segment]) -> None:
        for segment in segments:
            if segment.kind == "reasoning":
                self.reasoning += segment.text
            elif segment.kind == "content":
                self.content += segment.text
            elif segment.kind == "arguments":
                self.add_arguments(segment.text)
            self.calls += segment.calls

    def add_arguments(self, text: str) -> None:
        """More of the last call's."""
        if self.calls:
            last = self.calls[-1]
            self.calls[-1] = Call(last.name, last.arguments + text)
        else:
            self.arguments += text


class Message:
    """One choice. `push` takes its pieces and says what is new."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.parser = reading.parser()
        self.said = Said()
        self.texts: list[str] = []  # as the model wrote them
        self.call_ids: list[str] = []
        self.num_begun = 0  # calls, those that are left out too
        self.tokens = _ContentTokens()

    def push(self, piece: CompletionOutput) -> Said:
        self.texts.append(piece.text)
        segments = self.parser.push(piece.text)
        if piece.finish_reason is not None:
            segments += self.parser.finish()
        new = Said()
        new.add(segments)
        if not self.reading.parallel:
            new.arguments = new.arguments if self.num_begun == 1 else ""
            self.num_begun += len(new.calls)
            del new.calls[max(0, 1 - len(self.said.calls)) :]
        if piece.logprobs is not None:
            new.logprobs = piece.logprobs
            if self.parser.tags:
                new.logprobs = self.tokens.push(piece, segments)
        self.said.reasoning += new.reasoning
        self.said.content += new.content
        if new.arguments:
            self.said.add_arguments(new.arguments)
        self.said.calls += new.calls
        self.said.logprobs += new.logprobs
        return new

    def delta(self, new: Said) -> dict[str, Any]:
        """What is new in the form of a stream."""
        first = len(self.call_ids)
        delta: dict[str, Any] = {}
        if new.reasoning:
            delta["reasoning_content"] = new.reasoning
        if new.content:
            delta["content"] = new.content
        if new.arguments:
            delta["tool_calls"] = [
                {"index": first - 1, "function": {"arguments": new.arguments}},
            ]
        if new.calls:
            calls = self._described(new.calls)
            described = [{"index": first + i, **call} for i, call in enumerate(calls)]
            delta["tool_calls"] = delta.get("tool_calls", []) + described
        return delta

    def whole(self) -> dict[str, Any]:
        """All of it in the form of a whole answer."""
        said = self.said
        message: dict[str, Any] = {"role": "assistant", "content": said.content}
        if self.reading.syntax.thoughts is not None:
            message["reasoning_content"] = said.reasoning or None
        if said.calls:
            message["content"] = said.content or None
            message["tool_calls"] = self._described(said.calls)
        return message

    def finish_reason(self, reason: str | None) -> str | None:
        """`tool_calls` where the model stopped to have calls made, `length` where it was stopped in
        the middle of one, by whatever.
        """
        if reason != "stop" or not self.said.calls:
            return reason
        return "length" if self.parser.has_cut_call else "tool_calls"

    def diverges(self) -> bool:
        """Whether the text read once more, in other pieces, says anything else than was sent."""
        if not self.parser.tags:
            return False
        parser, again, text = self.reading.parser(), Said(), "".join(self.texts)
        for start in range(0, len(text), _CHECKED_PIECE):
            again.add(parser.push(text[start : start + _CHECKED_PIECE]))
        again.add(parser.finish())
        if not self.reading.parallel:
            del again.calls[1:]
        said = self.said
        return (again.reasoning, again.content, again.calls) != (
            said.reasoning,
            said.content,
            said.calls,
        )

    def _described(self, calls: Iterable[Call]) -> list[dict[str, Any]]:
        described = []
        for call in calls:
            self.call_ids.append(f"chatcmpl-tool-{uuid.uuid4().hex}")
            function = {"name": call.name, "arguments": call.arguments}
            described.append({"id": self.call_ids[-1], "type": "function", "function": function})
        return described


class ReasoningTokens:
    """Counts the tokens of an answer's thoughts, one by one: neither how many come in a piece nor
    what a stop string holds back of their text makes a difference.
    """

    def __init__(self, reading: Reading, tokenizer: Tokenizer) -> None:
        self.num = 0
        self.detokenizer = Detokenizer(tokenizer, shown=reading.shown)
        # None where no more thoughts can come.
        self.parser = reading.parser() if reading.syntax.thoughts is not None else None

    def push(self, token_ids: Iterable[int]) -> None:
        for token in token_ids:
            if self.parser is None:
                return
            was_thought = self.parser.state == "reasoning"
            self.parser.push(self.detokenizer.push([token]))
            is_thought = self.parser.state == "reasoning"
            self.num += was_thought and is_thought
            if not is_thought and not self.parser.is_fresh:
                self.parser = None


class _ContentTokens:
    """Finds the tokens that wrote content, as the segments of the text become certain.

    A token that completes no character belongs with the next one that does; those at the very end,
    such as the one that ended the text, belong with what was written last.
    """

    def __init__(self) -> None:
        self.num_arrived = self.num_certain = 0  # characters
        self.content_end = 0  # of the last certain content
        self.silent: list[TokenLogprobs] = []
        # Entries with the span of text that their tokens wrote.
        self.waiting: deque[tuple[int, int, list[TokenLogprobs]]] = deque()

    def push(self, piece: CompletionOutput, segments: Iterable[Segment]) -> list[TokenLogprobs]:
        self.silent += piece.logprobs or ()
        if piece.text:
            start, self.num_arrived = self.num_arrived, self.num_arrived + len(piece.text)
            self.waiting.append((start, self.num_arrived, self.silent))
            self.silent = []
        found: list[TokenLogprobs] = []
        for segment in segments:
            self.num_certain += len(segment.text)
            if segment.kind == "content":
                self.content_end = self.num_certain
            while self.waiting and self.waiting[0][1] <= self.num_certain:
                start, _, entries = self.waiting.popleft()
                found += entries if self.content_end > start else ()
        if piece.finish_reason is not None and self.content_end == self.num_arrived:
            found += self.silent
        return found
