"""The parser of thoughts and tool calls: a corpus, cut in every way; and what becomes a message."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import helpers_tokenizer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ernie
from ernie.chat import LLM, THINKING
from ernie.chat.calls import Call, read_calls
from ernie.settings import ConfigError
from fastdeploy.engine.request import TokenOutput
from fastdeploy.engine.text import Sample
from fastdeploy.outputs import CompletionOutput, Logprob, RequestMetrics
from fastdeploy.sampling import SamplingParams
from fastdeploy.server.chat import ChatReply
from fastdeploy.server.engine import Piece
from fastdeploy.server.message import Message, Reading, Said
from fastdeploy.server.parsers import (
    REASONING_PARSERS,
    TOOL_PARSERS,
    Parser,
    Segment,
    Syntax,
    find_syntax,
    merged,
)
from fastdeploy.server.protocol import ChatRequest
from fastdeploy.server.reply import Context

PLAIN, CALLS = Syntax(), Syntax(has_calls=True)
X1 = Syntax(REASONING_PARSERS["ernie-x1"], has_calls=True)
VL = Syntax(REASONING_PARSERS["ernie-45-vl"], has_calls=True)
VL_THOUGHTS = Syntax(REASONING_PARSERS["ernie-45-vl"])
WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
PARIS = Call("weather", '{"city": "Paris"}')
NOW = '<tool_call>{"name": "now"}</tool_call>'


@dataclass(frozen=True)
class Case:
    """A text, and what it says."""

    name: str
    syntax: Syntax
    text: str
    content: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    in_thought: bool = False


def thinking(name: str, text: str, **said) -> Case:
    return Case(name, X1, text, in_thought=True, **said)


CORPUS = [
    Case(
        "nothing is looked for", PLAIN, f"<think>a</think>{WEATHER}", f"<think>a</think>{WEATHER}"
    ),
    Case("nothing at all", X1, ""),
    Case("blanks only", VL, "\n \n", "\n \n"),
    Case("newlines within", VL, "a\n\n\n\nb\n\n", "a\n\n\n\nb\n\n"),
    Case("blanks in front", VL, "  \n a", "  \n a"),
    thinking(
        "thought, response",
        "One\n\ntwo\n</think>\n\n<response>\nYes,\n\n  no.\n</response>\n",
        reasoning="One\n\ntwo",
        content="Yes,\n\n  no.",
    ),
    thinking("thought that is not closed", "One\n", reasoning="One\n"),
    thinking("empty thought", "\n\n</think>\n\nYes", content="Yes"),
    thinking(
        "opening tag of its own", "\n<think>\nHm\n</think>\nYes", reasoning="Hm", content="Yes"
    ),
    thinking("no response tags", "Hm.\n</think>\n\nYes\n", reasoning="Hm.", content="Yes\n"),
    thinking(
        "more newlines than the tag has",
        "Hm\n\n\n</think>\n\n\n\nYes",
        reasoning="Hm\n\n",
        content="\n\nYes",
    ),
    thinking("one call", f"Hm\n</think>\n\n{WEATHER}\n", reasoning="Hm", calls=(PARIS,)),
    thinking(
        "response, two calls, blanks around",
        f"Hm\n</think>\n\n<response>\nI look.\n</response>\n\n{WEATHER}\n\n\n{NOW}\n\n",
        reasoning="Hm",
        content="I look.",
        calls=(PARIS, Call("now", "{}")),
    ),
    thinking(
        "a call within a thought is a thought",
        f"I could {WEATHER} so\n</think>\n\nNo",
        reasoning=f"I could {WEATHER} so",
        content="No",
    ),
    Case(
        "content before, between, after",
        CALLS,
        f"a\n{NOW}\nb {NOW} c\n",
        "ab  c\n",
        "",
        (Call("now", "{}"),) * 2,
    ),
    Case(
        "calls where none are looked for",
        VL_THOUGHTS,
        f"<think>Hm</think>{WEATHER}",
        WEATHER,
        "Hm",
    ),
    Case("the model opens the thought", VL, "<think>\nHm\n</think>\n\nYes", "Yes", "Hm"),
    Case("a late tag opens nothing", VL, "So: <think>a</think>", "So: <think>a</think>"),
    Case("a tag that closes nothing", VL, "a </think> b", "a </think> b"),
    Case("almost tags", VL, "a <thin k> </ <tool_cal> <", "a <thin k> </ <tool_cal> <"),
    Case(
        "the closing tag in a string",
        CALLS,
        '<tool_call>{"name": "f", "arguments": {"x": "</tool_call> \\" \\\\"}}</tool_call>!',
        "!",
        "",
        (Call("f", '{"x": "</tool_call> \\" \\\\"}'),),
    ),
    Case(
        "broken JSON, then a call",
        CALLS,
        f'a\n<tool_call>\n{{"name": "f, "arguments": {{}}}}\n</tool_call>\n{NOW}',
        'a\n<tool_call>\n{"name": "f, "arguments": {}}\n</tool_call>',
        "",
        (Call("now", "{}"),),
    ),
    Case(
        "JSON that is not a call", CALLS, "<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>"
    ),
    Case("nothing in it", CALLS, "<tool_call>\n</tool_call>\n", "<tool_call>\n</tool_call>\n"),
    Case(
        "a list of calls",
        CALLS,
        '<tool_call>[{"name": "a"}, {"name": "b"}]</tool_call>',
        "",
        "",
        (Call("a", "{}"), Call("b", "{}")),
    ),
    Case(
        "cut in a call",
        CALLS,
        'a\n<tool_call>\n{"name": "f", "argu',
        'a\n<tool_call>\n{"name": "f", "argu',
    ),
    Case(
        "cut before the closing tag",
        CALLS,
        '<tool_call>\n{"name": "f"}\n',
        "",
        "",
        (Call("f", "{}"),),
    ),
    Case(
        "quoted arguments",
        CALLS,
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
        "",
        "",
        (Call("f", '{"a": 1}'),),
    ),
    Case(
        "other scripts",
        CALLS,
        '好 \U0001f600\n<tool_call>{"name": "f", "arguments": {"城": "巴黎\\n"}}</tool_call>',
        "好 \U0001f600",
        "",
        (Call("f", '{"城": "巴黎\\n"}'),),
    ),
]


def segments_of(case: Case, pieces: list[str], *, is_held: bool = False) -> list[Segment]:
    parser = Parser(case.syntax, in_thought=case.in_thought, is_held=is_held)
    segments = [segment for piece in pieces for segment in parser.push(piece)]
    return merged(segments + parser.finish())


def cut(text: str, *places: int) -> list[str]:
    return [text[a:b] for a, b in zip((0, *sorted(places)), (*sorted(places), len(text)))]


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case.name)
def test_what_a_text_says_and_that_nothing_is_lost(case: Case) -> None:
    segments = segments_of(case, [case.text])
    said = Said()
    said.add(segments)
    expected = (case.reasoning, case.content, list(case.calls))
    assert (said.reasoning, said.content, said.calls) == expected
    assert "".join(segment.text for segment in segments) == case.text


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case.name)
def test_parts_do_not_depend_on_any_cut(case: Case) -> None:
    whole, text = segments_of(case, [case.text]), case.text
    assert segments_of(case, list(text)) == whole
    for i in range(len(text)):
        assert segments_of(case, cut(text, i)) == whole, cut(text, i)
        for j in range(i, len(text), 7):
            assert segments_of(case, cut(text, i, j)) == whole, cut(text, i, j)


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case.name)
def test_an_answer_goes_on_as_what_its_beginning_has_opened(case: Case) -> None:
    """From any place on, each character is of the kind that it is of in the whole answer."""

    def kinds(segments: list[Segment]) -> list[str]:
        return [segment.kind for segment in segments for _ in segment.text]

    text = case.text
    whole = segments_of(case, [text])
    for i in range(len(text) + 1):
        parser = Parser(case.syntax, in_thought=case.in_thought, begun=text[:i])
        segments = [*(one for c in text[i:] for one in parser.push(c)), *parser.finish()]
        assert "".join(segment.text for segment in segments) == text[i:]
        assert kinds(segments) == kinds(whole)[i:], text[i:]
        ends = [len("".join(s.text for s in whole[: n + 1])) for n in range(len(whole))]
        calls = [call for s, end in zip(whole, ends) if end > i for call in s.calls]
        made = [call for segment in segments for call in segment.calls]
        assert made == calls or i in ends, text[i:]


ALPHABET = ["<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>"]
ALPHABET += ["\n", " ", "a", "<", "</tool_c", '{"name": "f"}', '{"name": "f", "arguments": {"x": "']
ALPHABET += ['"}}', '"', "\\", "é"]


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.sampled_from(ALPHABET), max_size=14).map("".join),
    st.sampled_from([PLAIN, CALLS, X1, VL, VL_THOUGHTS]),
    st.booleans(),
    st.lists(st.integers(0, 200), max_size=4),
)
def test_parts_do_not_depend_on_cuts_of_what_nobody_writes(
    text: str, syntax: Syntax, in_thought: bool, places: list[int]
) -> None:
    case = Case("", syntax, text, in_thought=in_thought and syntax.thoughts is not None)
    some = cut(text, *(place % (len(text) + 1) for place in places))
    for is_held in (False, True):
        whole = segments_of(case, [text], is_held=is_held)
        assert "".join(segment.text for segment in whole) == text
        for pieces in (list(text), some):
            assert segments_of(case, pieces, is_held=is_held) == whole


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[ernie.Tokenizer]:
    """Tags as special tokens, and tags in pieces."""
    root = tmp_path_factory.mktemp("tokenizers")
    special = helpers_tokenizer.sentencepiece_folder(root / "special", thinking=True)
    config = json.loads((special / "tokenizer_config.json").read_text("utf-8"))
    config["additional_special_tokens"] += ["<think>", "</think>", "</response>"]
    helpers_tokenizer.write_json(special / "tokenizer_config.json", config)
    plain = helpers_tokenizer.byte_level_folder(root / "plain")
    return [ernie.Tokenizer.from_folder(folder) for folder in (special, plain)]


def pieces_of(
    tokenizer: ernie.Tokenizer, ids: list[int], reading: Reading, reason: str, **options: Any
):
    """Token by token through the server's own path from tokens to text, with log-probabilities."""
    sample = Sample(0, SamplingParams(logprobs=0, **options), tokenizer, reading.shown)
    for i, token in enumerate(ids):
        end = reason if i == len(ids) - 1 else None
        entry = {token: Logprob(-1.0, 1)}
        metrics = RequestMetrics(time.monotonic())
        yield sample.push(TokenOutput("0", token, -1.0, entry, end, metrics, 0))


def reading_of(case: Case, tokenizer: ernie.Tokenizer, **options) -> Reading:
    ids = {tokenizer.id_of(tag) for tag in case.syntax.tags}
    return Reading(case.syntax, case.in_thought, shown=tokenizer.special_ids & ids, **options)


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case.name)
def test_a_message_made_of_tokens_says_what_the_text_says(case: Case, tokenizers) -> None:
    for tokenizer in tokenizers:
        for allow_special in (True, False):
            if allow_special and not case.syntax.tags:
                continue  # then the special ones are hidden
            ids = [*tokenizer.encode(case.text, allow_special=allow_special), tokenizer.eos_id]
            message = Message(reading_of(case, tokenizer))
            deltas = [
                message.delta(message.push(piece))
                for piece in pieces_of(tokenizer, ids, message.reading, "stop")
            ]
            said = message.said
            expected = (case.reasoning, case.content, list(case.calls))
            assert (said.reasoning, said.content, said.calls) == expected, ids
            assert not message.diverges()
            calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
            assert [call["index"] for call in calls] == list(range(len(case.calls)))
            assert message.finish_reason("stop") == ("tool_calls" if case.calls else "stop")
            assert "".join(delta.get("content", "") for delta in deltas) == case.content


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case.name)
def test_logprobs_are_those_of_the_tokens_of_the_content(case: Case, tokenizers) -> None:
    """They spell the content, with at most the rest of a token at the borders."""
    for tokenizer in tokenizers:
        ids = tokenizer.encode(case.text, allow_special=bool(case.syntax.tags))
        message = Message(reading_of(case, tokenizer))
        for piece in pieces_of(tokenizer, [*ids, tokenizer.eos_id], message.reading, "stop"):
            message.push(piece)
        tokens = [next(iter(entry)) for entry in message.said.logprobs]
        spelled = tokenizer.decode([token for token in tokens if token != tokenizer.eos_id])
        rest = iter(spelled)
        assert all(character in rest for character in case.content), (spelled, case.content)
        excess = len(spelled) - len(case.content)
        borders = len(merged(segments_of(case, [case.text])))
        assert excess <= 3 * borders, (spelled, case.content)
        if not case.content:
            assert not spelled


def test_every_prefix_of_a_call_is_content_until_its_json_is_whole() -> None:
    opened = WEATHER.index("{")
    for end in range(1, len(WEATHER) + 1):
        case = Case("", CALLS, WEATHER[:end])
        said = Said()
        said.add(segments_of(case, [case.text]))
        is_whole = WEATHER[opened:end].rstrip().endswith("}}") or end == len(WEATHER)
        assert bool(said.calls) == is_whole, case.text
        assert said.content == ("" if is_whole else case.text)


def test_a_cut_answer_keeps_its_reason_even_after_a_call() -> None:
    message = Message(Reading(CALLS))
    text = WEATHER + '\n<tool_call>{"name": "no'
    message.push(CompletionOutput(0, text, [1], finish_reason="length"))
    assert message.finish_reason("length") == "length"
    assert message.whole()["content"] == '<tool_call>{"name": "no'
    (call,) = message.whole()["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Paris"}'}
    assert call["id"].startswith("chatcmpl-tool-") and call["type"] == "function"


NESTED = Call("f", '{"a": {"b": "}\\"} </tool_call>"}, "c": [{}, "\\\\"]}')
HELD = f'{WEATHER}\n\n<tool_call>\n{{"name": "f", "arguments": {NESTED.arguments}}}\n</tool_call>\n'


def held_message(pieces: list[str], reason: str, **options) -> tuple[Message, list[dict]]:
    """An answer that a grammar holds to calls, and the deltas of its stream."""
    message = Message(Reading(CALLS, is_held=True, **options))
    deltas = []
    for i, piece in enumerate(pieces):
        end = reason if i == len(pieces) - 1 else None
        deltas.append(message.delta(message.push(CompletionOutput(0, piece, finish_reason=end))))
    assert not message.diverges()
    return message, deltas


def streamed_calls(deltas: list[dict]) -> list[Call]:
    """As clients put them together: the name comes first, and only there."""
    calls: list[Call] = []
    for part in (part for delta in deltas for part in delta.get("tool_calls", [])):
        if "id" in part:
            assert part["index"] == len(calls)
            calls.append(Call(part["function"]["name"], ""))
        assert part["index"] == len(calls) - 1
        last = calls[-1]
        calls[-1] = Call(last.name, last.arguments + part["function"]["arguments"])
    return calls


def test_held_calls_stream_their_arguments_and_every_cut_says_the_same() -> None:
    every = [cut(HELD, i, j) for i in range(len(HELD)) for j in range(i, len(HELD), 7)]
    for pieces in [[HELD], list(HELD), *every]:
        message, deltas = held_message(pieces, "stop")
        assert message.said.calls == streamed_calls(deltas) == [PARIS, NESTED], pieces
        assert message.finish_reason("stop") == "tool_calls" and not message.said.content
    fragments = [d for d in held_message(list(HELD), "stop")[1] if d.get("tool_calls")]
    assert len(fragments) > len(NESTED.arguments)  # each as soon as it is written


@pytest.mark.parametrize("reason", ["length", "stop"])
def test_a_held_call_that_is_cut_is_no_json_and_ends_with_length(reason: str) -> None:
    for end in range(1, len(HELD) + 1):
        text = HELD[:end]
        whole, _ = held_message([text], reason)
        message, deltas = held_message(list(text), reason)
        assert message.said == whole.said and streamed_calls(deltas) == whole.said.calls
        num_whole = text.count("}}\n")
        for i, call in enumerate(whole.said.calls):
            is_whole = i < num_whole or text.endswith("}}")
            assert is_json(call.arguments) == is_whole, text
            if not is_whole:
                assert message.finish_reason(reason) == "length", text
        if reason == "length":
            assert message.finish_reason(reason) == "length"


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def test_of_held_calls_too_only_the_first_is_made_without_parallel_ones() -> None:
    for pieces in ([HELD], list(HELD)):
        message, deltas = held_message(pieces, "stop", parallel=False)
        assert message.said.calls == streamed_calls(deltas) == [PARIS]


@pytest.mark.parametrize("pieces", [1, 3, 1000])
def test_without_parallel_calls_only_the_first_is_made(pieces: int) -> None:
    message = Message(Reading(CALLS, parallel=False))
    text = WEATHER + NOW + '<tool_call>[{"name": "a"}, {"name": "b"}]</tool_call>'
    step = -(-len(text) // pieces)
    for start in range(0, len(text), step):
        last = start + step >= len(text)
        message.push(
            CompletionOutput(0, text[start : start + step], finish_reason="stop" if last else None)
        )
    assert message.said.calls == [PARIS] and message.said.content == ""
    assert not message.diverges()


@pytest.mark.parametrize("size", [1, 3, 100])
def test_reasoning_tokens_are_those_before_the_closing_tag(tokenizers, size: int) -> None:
    """However many come in an event, and though a stop string holds back the tag for a while."""
    case = thinking("", "")
    for tokenizer in tokenizers:
        text = "One two\n</think>\n\nYes, <think> so"
        ids = tokenizer.encode(text, allow_special=True)
        closed = next(i for i in range(len(ids)) if "</think>" in tokenizer.decode(ids[: i + 1]))
        reading = reading_of(case, tokenizer)
        answer = SimpleNamespace(id="a", num_choices=1, num_samples=1, prompts=[[1]])
        answer.num_picture_tokens = {}
        pieces = pieces_of(tokenizer, ids, reading, "length", stop=["</think>\n\nNo"])

        async def read(pieces=pieces) -> AsyncIterator[Piece]:
            for piece in pieces:
                yield Piece(0, piece, 0, None)

        answer.pieces = read
        options = {"include_usage": True}
        body = ChatRequest(stream=True, stream_options=options, max_streaming_response_tokens=size)
        context = Context("m", tokenizer, 0, 1, lambda: None, reading)
        reply = ChatReply(body, answer, context)

        async def last(reply=reply) -> dict[str, Any]:
            return [event async for event in reply.events()][-1]

        details = asyncio.run(last())["usage"]["completion_tokens_details"]
        assert details == {"reasoning_tokens": closed}


def test_a_parser_that_depends_on_cuts_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def stream() -> Message:
        message = Message(Reading(CALLS))
        for piece in (f"a {WEATHER}"[:6], f"a {WEATHER}"[6:]):
            message.push(CompletionOutput(0, piece))
        message.push(CompletionOutput(0, finish_reason="stop"))
        return message

    assert not stream().diverges()
    monkeypatch.setattr(Parser, "_num_certain", lambda self: len(self.held))  # holds nothing back
    assert stream().diverges()


@pytest.mark.parametrize(
    "text",
    [
        '{"name": 1}',
        '{"name": ""}',
        "{}",
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": "x"}',
        '{"name": "f", "arguments": {"x": 1e999}}',
        '{"name": "f", "arguments": {"x": NaN}}',
        '{"name": "f", "arguments": {"x": "\\ud800"}}',
        '{"name": "f", "arguments": {"x": ' + "9" * 5000 + "}}",
        "[" * 100_000,
        '{"name": "f"} {"name": "g"}',
        "",
        "[]",
    ],
    ids=lambda text: text[:40],
)
def test_json_that_cannot_be_carried_on_is_no_call(text: str) -> None:
    assert read_calls(text) == ()


def test_parsers_are_found_by_name_or_by_the_template() -> None:
    assert find_syntax("auto", "auto", ()) == PLAIN
    assert find_syntax("auto", "auto", {"<think>", "<response>", "<tool_call>"}) == X1
    assert find_syntax("auto", None, {"<think>", "<tool_call>"}) == VL_THOUGHTS
    assert find_syntax("ernie_x1", "ernie_x1", ()) == find_syntax("ernie45", "ernie45", ()) == X1
    for name in REASONING_PARSERS:
        assert find_syntax(name, None, ()).thoughts == REASONING_PARSERS[name]
    assert all(find_syntax(None, name, ()).has_calls for name in TOOL_PARSERS)
    for names in (("x", None), (None, "qwen3")):
        with pytest.raises(ConfigError, match="is not known; use auto, none, ernie-45-vl"):
            find_syntax(*names, ())


@pytest.mark.parametrize(
    ("name", "prompt_end", "expected"),
    [
        ("ernie-45-vl", "Assistant: <think>", True),
        ("ernie-45-vl", "Assistant: <think>\n\n</think>\n\n", False),
        ("ernie-45-vl", "Assistant: ", False),
        ("ernie-x1", "assistant\n<think>\n", True),
        ("ernie-x1", "assistant\n", True),
        ("ernie-45-vl-thinking", "<think></think>", False),
    ],
)
def test_the_prompt_says_whether_a_thought_is_open(
    name: str, prompt_end: str, expected: bool
) -> None:
    assert find_syntax(name, None, ()).begins_in_thought(prompt_end) is expected


def test_a_long_call_is_read_in_time_that_grows_with_its_length() -> None:
    """Counted, not timed: characters that the scan looks at."""
    parser = Parser(CALLS)
    text = '<tool_call>{"name": "f", "arguments": {"x": "' + "<" * 5000
    for character in text:
        parser.push(character)
    assert parser.scan.at >= len(text) - 1, "the scan lags behind, or begins anew each time"


def test_templates_of_the_family_name_their_parsers() -> None:
    assert find_syntax("auto", "auto", THINKING.tags) == X1
    assert find_syntax("auto", "auto", LLM.tags) == PLAIN
