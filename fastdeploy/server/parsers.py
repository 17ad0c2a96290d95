"""Thoughts and tool calls in what a model writes: a table of tags, and one parser for all.

    <think>\\n thought \\n</think>\\n\\n answer      (some: <response>\\n answer \\n</response>\\n)
    <think>\\n thought \\n</think>\\n\\n <tool_call>\\n{"name": ..., ...}\\n</tool_call>\\n

`Parser` is fed text in pieces and gives *segments*, which joined are that text: whatever is not a
thought or a whole call is content, or the form around them ("frame"), and nothing is lost. The
segments, neighbours of a kind joined, do not depend on how the text was cut. It holds back only
what could still be a tag, the blanks beside one, and a call until its end.

A call is made once its JSON is whole and valid, in one piece. One that is cut by `max_tokens`, or
whose JSON is invalid, is content as the model wrote it: arguments that had begun to stream could
not be taken back. Where a grammar holds calls to their form (`is_held`) they cannot turn out to be
broken, and so a call begins with its name, and its arguments follow as they are written:

    <tool_call>\\n{"name": "f", "arguments":  {"x": 1  }  }\\n</tool_call>
    call                                       arguments  frame

The last brace of the arguments waits for the end of the call: those of a cut call are never JSON.
The tags are known by their text, whether a token of their own spells them or
several do. Imports neither torch nor web libraries.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ernie.chat.calls import (
    BEGIN,
    CALL,
    END,
    END_CALL,
    Braces,
    Call,
    CallScan,
    read_calls,
)
from ernie.settings import ConfigError

THINK, END_THINK = "<think>", "</think>"
RESPONSE, END_RESPONSE = "<response>", "</response>"
NEWLINES_AFTER = {END_THINK: 2}  # at most, as part of the tag; of others one; before any tag one


@dataclass(frozen=True, slots=True)
class Thoughts:
    """How a model marks its thoughts. Where the prompt opens one, the answer begins within it."""

    always: bool = False  # the answer begins with a thought, unless the prompt closes it
    has_response: bool = False  # the answer stands between tags of its own


REASONING_PARSERS = {
    "ernie-45-vl": Thoughts(),
    "ernie-45-vl-thinking": Thoughts(always=True),
    "ernie-x1": Thoughts(always=True, has_response=True),
    "qwen3": Thoughts(),
}
# All of them write JSON between the same tags.
TOOL_PARSERS = ("ernie-45-vl-thinking", "ernie-x1", "hermes")
ALIASES = {"ernie45": "ernie-x1"}


@dataclass(frozen=True, slots=True)
class Syntax:
    """What is looked for in an answer; without either, all of it is content."""

    thoughts: Thoughts | None = None
    has_calls: bool = False

    @property
    def tags(self) -> frozenset[str]:
        found: set[str] = set()
        if self.thoughts is not None:
            found |= {THINK, END_THINK}
            if self.thoughts.has_response:
                found |= {RESPONSE, END_RESPONSE}
        return frozenset(found | ({CALL, END_CALL} if self.has_calls else set()))

    def begins_in_thought(self, prompt_end: str) -> bool:
        """Whether an answer does, after a prompt that ends with this text."""
        if self.thoughts is None:
            return False
        end = prompt_end.rstrip()
        return end.endswith(THINK) or (self.thoughts.always and not end.endswith(END_THINK))


def find_syntax(reasoning: str | None, tools: str | None, written: Collection[str]) -> Syntax:
    """The parsers of two names, None for no parser. "auto" goes by the tags that the chat template
    writes. Raises ConfigError for a name that is not known.
    """
    if reasoning == "auto":
        found = ("ernie-x1" if RESPONSE in written else "qwen3") if THINK in written else None
    else:
        found = reasoning and _known("reasoning_parser", reasoning, REASONING_PARSERS)
    if tools not in (None, "auto"):
        _known("tool_call_parser", tools, TOOL_PARSERS)
    has_calls = CALL in written if tools == "auto" else tools is not None
    return Syntax(REASONING_PARSERS[found] if found else None, has_calls)


def _known(flag: str, name: str, names: Iterable[str]) -> str:
    plain = name.replace("_", "-")
    plain = ALIASES.get(plain, plain)
    if plain not in names:
        raise ConfigError(
            f"{flag}={name!r} is not known; use auto, none, {', '.join(sorted(names))}"
        )
    return plain


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of an answer, as the model wrote it.

    `kind` is reasoning, content, call (then `calls` has what it says), arguments (more of those of
    the last call) or frame: the tags, and the blanks that belong to them.
    """

    kind: str
    text: str
    calls: tuple[Call, ...] = ()


class Parser:
    """One answer. `push` and `finish` give the segments that are certain by then."""

    def __init__(
        self,
        syntax: Syntax,
        *,
        in_thought: bool = False,
        is_held: bool = False,
        begun: str = "",
    ) -> None:
        """`begun` is text that the answer begins with, and which is in no segment; what it opens
        goes on, and a call that it begins is made when it ends.
        """
        self.syntax, self.is_held = syntax, is_held
        self.tags = syntax.tags
        self.state = "reasoning" if in_thought else "content"
        self.held = ""  # text whose segment is not certain yet
        self.num_newlines = 1 if in_thought else 0  # that may still belong to the tag before
        self.is_fresh = True  # only blanks since the state began
        self.in_response = False
        self.has_closed = False  # a call or response: blanks at the very end are form
        self.scan = CallScan()
        self.braces = Braces()
        self.has_cut_call = False  # it ended in the middle of one that had begun to stream
        self.num_begun = 0  # characters of `held` that are those of `begun`
        self.push(begun)
        self.num_begun = len(self.held)

    def push(self, text: str) -> list[Segment]:
        if not self.tags:
            return [Segment("content", text)] if text else []
        return self._without_begun(self._push(text))

    def finish(self) -> list[Segment]:
        """The rest, once no more text comes."""
        return self._without_begun(self._finish())

    def _without_begun(self, segments: list[Segment]) -> list[Segment]:
        new = []
        for segment in segments:
            num = min(self.num_begun, len(segment.text))
            self.num_begun -= num
            if num:
                segment = Segment(segment.kind, segment.text[num:], segment.calls)
            if segment.text or segment.calls:
                new.append(segment)
        return new

    def _push(self, text: str) -> list[Segment]:
        self.held += text
        segments: list[Segment] = []
        while self._step(segments):
            pass
        return segments

    def _finish(self) -> list[Segment]:
        text, self.held = self.held, ""
        kind = self.state
        if kind == "arguments":
            return self._finish_arguments(text)
        if not text:
            return []
        if kind == "call":
            return [self._call(text, self.scan.opened, len(text))]
        if kind == "content" and self.is_fresh and self.has_closed and not text.strip():
            kind = "frame"
        return [Segment(kind, text)]

    def _step(self, segments: list[Segment]) -> bool:
        """Decide about the beginning of `held`; False when that needs more text."""
        if self.num_newlines and self.held:
            num = min(self.num_newlines, len(self.held) - len(self.held.lstrip("\n")))
            self._take(segments, "frame", num)
            self.num_newlines = 0 if self.held else self.num_newlines - num
        if self.state == "call":
            return self._step_in_call(segments)
        if self.state == "arguments":
            return self._step_in_arguments(segments)
        at, tag = min(
            ((at, tag) for tag in self._expected() if (at := self.held.find(tag)) >= 0),
            default=(-1, ""),
        )
        if at < 0:
            self._take(segments, self.state, self._num_certain())
            return False
        if tag in (THINK, RESPONSE) and self.held[:at].strip():
            self.is_fresh = False  # so late that it opens nothing
            return True
        if tag == CALL:
            self._open_call(segments, at)
            return True
        blank = self.is_fresh and not self.held[:at].strip()
        num = 0 if blank else at - self.held.endswith("\n", 0, at)
        self._take(segments, self.state, num)
        self._take(segments, "frame", at - num + len(tag))
        self._pass(tag)
        return True

    def _expected(self) -> list[str]:
        """The tags that mean something here."""
        if self.state == "reasoning":
            expected = [END_THINK, THINK] if self.is_fresh else [END_THINK]
        else:
            expected = [CALL, END_RESPONSE] if self.in_response else [CALL]
            if self.is_fresh and not self.has_closed:
                expected += [THINK, RESPONSE]
        return [tag for tag in expected if tag in self.tags]

    def _num_certain(self) -> int:
        """Characters of `held` that belong to the state, whatever follows."""
        if self.is_fresh and not self.held.strip():
            return 0
        num = 0
        for tag in self._expected():
            num = max(num, _overlap(self.held, tag), _overlap(self.held, "\n" + tag))
        certain = len(self.held) - num
        return 0 if self.is_fresh and not self.held[:certain].strip() else certain

    def _take(self, segments: list[Segment], kind: str, num: int) -> None:
        if not num:
            return
        segments.append(Segment(kind, self.held[:num]))
        self.held = self.held[num:]
        if kind == self.state:
            self.is_fresh = False

    def _pass(self, tag: str) -> None:
        self.state = "reasoning" if tag == THINK else "content"
        self.is_fresh = True
        self.in_response = tag == RESPONSE
        self.has_closed = tag == END_RESPONSE
        self.num_newlines = NEWLINES_AFTER.get(tag, 1)

    def _open_call(self, segments: list[Segment], at: int) -> None:
        """The blanks in front stay with the call, in case it turns out to be none."""
        blank = self.is_fresh and not self.held[:at].strip()
        num = 0 if blank else at - self.held.endswith("\n", 0, at)
        self._take(segments, self.state, num)
        self.state = "call"
        self.scan = CallScan(at - num + len(CALL))

    def _step_in_call(self, segments: list[Segment]) -> bool:
        if self.is_held and (begin := BEGIN.match(self.held, self.scan.opened)):
            name = begin.group(1)
            segments.append(Segment("call", self.held[: begin.end()], (Call(name, ""),)))
            self.held = self.held[begin.end() :]
            self.state, self.braces, self.num_newlines = "arguments", Braces(), 0
            return True
        end = self.scan.end_of_call(self.held)
        if end < 0:
            return False
        segment = self._call(self.held[: end + len(END_CALL)], self.scan.opened, end)
        segments.append(segment)
        self.held = self.held[len(segment.text) :]
        self.state = "content"
        self.is_fresh = self.has_closed = segment.kind == "call"
        self.num_newlines = int(self.is_fresh)
        return True

    def _step_in_arguments(self, segments: list[Segment]) -> bool:
        """`held` is text of the arguments, from their last brace on once that has come."""
        if not self.braces.closed:
            self._take(segments, "arguments", self.braces.end_of_object(self.held))
        end = END.match(self.held) if self.braces.closed else None
        if end is None or not self.held.startswith(END_CALL, end.end()):
            return False
        self._take(segments, "arguments", 1)
        self._take(segments, "frame", end.end() - 1 + len(END_CALL))
        self.state = "content"
        self.is_fresh = self.has_closed = True
        self.num_newlines = 1
        return True

    def _finish_arguments(self, text: str) -> list[Segment]:
        end = END.match(text)
        if end is not None and END_CALL.startswith(text[end.end() :]):  # the JSON is whole
            return [Segment("arguments", text[0]), Segment("frame", text[1:])]
        self.has_cut_call = True
        return [Segment("frame", text)] if text else []

    def _call(self, text: str, start: int, end: int) -> Segment:
        calls = read_calls(text[start:end])
        return Segment("call", text, calls) if calls else Segment("content", text)


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` with which `tag` begins, short of all of it."""
    for length in range(min(len(text), len(tag) - 1), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0


def merged(segments: Iterable[Segment]) -> list[Segment]:
    """Neighbours of a kind as one; calls stay apart."""
    whole: list[Segment] = []
    for segment in segments:
        if whole and whole[-1].kind == segment.kind != "call":
            whole[-1] = Segment(segment.kind, whole[-1].text + segment.text)
        else:
            whole.append(segment)
    return whole
