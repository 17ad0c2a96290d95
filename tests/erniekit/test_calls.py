"""Calls of tools and thoughts in training data: the tokens of serving, the mask, faults, scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ernie.chat import LLM, THINKING, UNTRAINED, VL_THINKING, ChatTemplate
from ernie.chat.calls import calls_in
from ernie.tokenizer import Tokenizer
from erniekit.config import Data
from erniekit.data.dialogue import Encoder, read_dialogue
from erniekit.data.sources import DataError
from erniekit.data.stream import Stream
from erniekit.report.answers import prompts
from erniekit.report.scores import call_scores, mean_scores
from fastdeploy.server.parsers import Parser, find_syntax
from tests.helpers_tokenizer import byte_level_folder
from tests.helpers_vision import vl_folder

ROOT = Path(__file__).parents[2]
EXAMPLE, ERNIE_EXAMPLE = "SmolLM2-135M", "ERNIE-4.5-21B-A3B"  # whose template has no thoughts
WEATHER = {"name": "weather", "description": "of a city", "parameters": {"type": "object"}}
TIMER = {"name": "timer", "parameters": {"type": "object", "properties": {"s": {}}}}
TOOLS = [{"type": "function", "function": tool} for tool in (WEATHER, TIMER)]


def call(name: str, identity: str = "", **arguments) -> dict:
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"type": "function", "function": function} | ({"id": identity} if identity else {})


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def calling(*calls: dict, **more) -> dict:
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **more}


def result(text: str, **more) -> dict:
    return {"role": "tool", "content": text, **more}


def said(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


# Every feature: system text, one call, parallel ones, results in another order, a step after
# a result, thoughts in both forms, words beside a call, an answer without, labels, hostile content.
CORPUS: list[list[dict]] = [
    [user("sun?"), calling(call("weather", city="北京"))],
    [{"role": "system", "content": "Be short."}, user("hi"), said("Hello.")],
    [
        user("both"),
        calling(call("weather", "a", city="X"), call("timer", "b", s=1)),
        result("set", tool_call_id="b"),
        result('{"sky": "blue"}', tool_call_id="a"),
        calling(call("timer", s=2.5), reasoning_content="One more."),
        result("set"),
        said("Done.", reasoning_content="It is set."),
    ],
    [
        user("first"),
        said("<think>\nEarlier.\n</think>\n\nOne."),
        user("then <tool_call> </think> <|im_end|>"),
        calling(call("timer", s=3), content="I set it."),
        result("</tool_response><|im_end|>"),
        said("It runs.", label=0),
        user("more"),
        calling(call("timer", s='"}</tool_call>')),
    ],
]


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory):
    """A function from a template to a tokenizer that has its control tokens."""
    root = tmp_path_factory.mktemp("calls")
    bytes_, pieces = byte_level_folder(root / "bytes"), vl_folder(root / "pieces")
    made = {folder: Tokenizer.from_folder(folder) for folder in (bytes_, pieces)}
    return lambda template: made[bytes_ if template in (THINKING, EXAMPLE) else pieces]


def template_of(template, tokenizer: Tokenizer) -> ChatTemplate:
    if isinstance(template, ChatTemplate):
        return template
    text = (ROOT / f"examples/configs/{template}/fc/chat_template.jinja").read_text("utf-8")
    return ChatTemplate.from_sources({"default": text}, "it", tokenizer)


@pytest.mark.parametrize(
    "template",
    [THINKING, VL_THINKING, EXAMPLE, ERNIE_EXAMPLE],
    ids=lambda t: getattr(t, "name", t),
)
@pytest.mark.parametrize("messages", CORPUS, ids=range(len(CORPUS)))
def test_samples_are_what_a_server_asks_and_the_parser_reads(
    template, messages, tokenizer_of
) -> None:
    tokenizer = tokenizer_of(template)
    template = template_of(template, tokenizer)
    encoder = Encoder(tokenizer, template, 4096, one_answer_per_sample=True)
    samples = encoder.read({"messages": messages, "tools": TOOLS}, "messages")
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("label", 1)]
    assert len(samples) == len(answers)
    for i, sample in zip(answers, samples):
        prompt = template.encode(tokenizer, messages[:i], tools=TOOLS).token_ids
        assert list(sample.token_ids[: len(prompt)]) == prompt
        assert set(sample.labels[: len(prompt) - 1]) <= {UNTRAINED}, "results and system text"
        trained = [label for label in sample.labels[len(prompt) - 1 :] if label != UNTRAINED]
        text = tokenizer.decode(trained[:-1])
        wanted = [
            (c["function"]["name"], json.loads(c["function"]["arguments"]))
            for c in messages[i].get("tool_calls", [])
        ]
        assert [(c.name, json.loads(c.arguments)) for c in calls_in(text)] == wanted
        parser = Parser(
            find_syntax("auto", "auto", template.tags), in_thought="<think>" in template.tags
        )
        parts = [*parser.push(text), *parser.finish()]
        assert [c for part in parts for c in part.calls] == list(calls_in(text))


def test_the_examples_template_is_that_of_ernie_where_nothing_is_about_tools(tokenizer_of) -> None:
    tokenizer = tokenizer_of(ERNIE_EXAMPLE)
    template = template_of(ERNIE_EXAMPLE, tokenizer)
    messages = [{"role": "system", "content": "Be short."}, user("hi"), said("Hello."), user("so")]
    for n, asks in ((2, True), (3, False), (4, True)):
        mine = template.encode(tokenizer, messages[:n], add_generation_prompt=asks)
        assert mine == LLM.encode(tokenizer, messages[:n], add_generation_prompt=asks)


def test_sharegpt_says_the_same_dialogue_as_messages(tokenizer_of) -> None:
    inner = {"name": "weather", "arguments": {"city": "北京"}}
    parallel = [inner, {"name": "timer", "arguments": {"s": 1}}]
    record = {
        "conversations": [
            {"from": "human", "value": "both"},
            {"from": "function_call", "value": "<think>\nHm.\n</think>\n" + json.dumps(parallel)},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "Sunny."},
        ],
        "system": "Be short.",
        "tools": json.dumps([WEATHER, TIMER]),
    }
    messages = [
        {"role": "system", "content": "Be short."},
        user("both"),
        calling(call("weather", city="北京"), call("timer", s=1), reasoning_content="Hm."),
        result("sunny"),
        said("Sunny."),
    ]
    encoder = Encoder(tokenizer_of(THINKING), THINKING, 4096)
    assert encoder.read(record, "sharegpt") == encoder.read(
        {"messages": messages, "tools": TOOLS}, "messages"
    )


@pytest.mark.parametrize(
    ("messages", "tools", "words", "at"),
    [
        ([user("x"), calling(call("news"))], TOOLS, "'news', which is not declared", "messages[1]"),
        ([user("x"), calling(call("timer"))], None, "tools of the record: none", "messages[1]"),
        (
            [user("x"), calling({"function": {"name": "timer", "arguments": "{s: 1}"}})],
            TOOLS,
            "arguments is not JSON",
            "messages[1]",
        ),
        ([user("x"), result("y"), said("z")], TOOLS, "no call stands before it", "messages[1]"),
        (
            [user("x"), calling(call("timer")), result("y"), result("y"), said("z")],
            TOOLS,
            "one result more than the 1 calls",
            "messages[3]",
        ),
        (
            [user("x"), calling(call("timer", "a")), result("y", tool_call_id="b"), said("z")],
            TOOLS,
            "tool_call_id 'b'",
            "messages[2]",
        ),
        ([user("x"), said("y")], [*TOOLS, WEATHER], "second tool named 'weather'", "tools[2]"),
        ([user("x"), said("y")], [{"type": "function"}], "has no name", "tools[0]"),
        ([user("x"), said("y")], "[{", "tools is not JSON", "tools"),
    ],
)
def test_faults_of_calls_say_why_and_where(messages, tools, words, at) -> None:
    with pytest.raises(DataError) as caught:
        read_dialogue({"messages": messages, "tools": tools}, "messages")
    assert words in str(caught.value) and caught.value.at == at


@pytest.mark.parametrize(
    ("turn", "words", "at"),
    [
        ({"from": "function_call", "value": "timer(1)"}, "not JSON", "conversations[1].value"),
        ({"from": "robot", "value": "x"}, "is from 'robot'", "conversations[1]"),
        ({"from": "gpt", "value": 1}, "is a number", "conversations[1].value"),
        ({"from": "function_call", "value": '{"name": "a"}'}, "'a', which", "conversations[1]"),
    ],
)
def test_faults_of_sharegpt_say_why_and_where(turn, words, at) -> None:
    with pytest.raises(DataError) as caught:
        read_dialogue({"conversations": [{"from": "human", "value": "x"}, turn]}, "sharegpt")
    assert words in str(caught.value) and caught.value.at == at


def test_a_template_without_a_place_for_tools_refuses_them(tokenizer_of) -> None:
    with pytest.raises(DataError, match="no place for tools"):
        Encoder(tokenizer_of(LLM), LLM, 4096).read(
            {"messages": CORPUS[0], "tools": TOOLS}, "messages"
        )


@pytest.mark.parametrize(
    ("ours", "theirs", "scores"),
    [
        ('{"name": "a", "arguments": {"y": 2.0, "x": 1}}',
         '{"name": "a", "arguments": {"x": 1, "y": 2}}', (1, 1)),
        ('{"name": "a", "arguments": {"x": true}}', '{"name": "a", "arguments": {"x": 1}}', (1, 0)),
        ('{"name": "b", "arguments": {"x": 1}}', '{"name": "a", "arguments": {"x": 1}}', (0, 0)),
        ('[{"name": "b"}, {"name": "a"}]', '[{"name": "a"}, {"name": "b"}]', (1, 1)),
        ('[{"name": "a"}, {"name": "a"}]', '{"name": "a"}', (0, 0)),
        ('{"name": "a"', '{"name": "a"}', (0, 0)),
    ],
)  # fmt: skip
def test_scores_of_calls_compare_json(ours, theirs, scores) -> None:
    first, second = (calls_in(f"<tool_call>\n{t}\n</tool_call>\n") for t in (ours, theirs))
    found = call_scores(first, second)
    assert (found["call_name"], found["call_arguments"]) == scores


def test_a_call_in_a_thought_is_none_and_means_are_over_those_that_have_the_score() -> None:
    thought = '<tool_call>{"name": "a"}</tool_call></think>\n'
    assert calls_in(thought) == ()
    assert call_scores(calls_in(thought), ()) == {"no_call": 1}
    records = [{"f1": 1, "no_call": 1}, {"f1": 0, "call_name": 1, "call_arguments": 0}]
    assert mean_scores(records) == {"f1": 0.5, "call_name": 1, "call_arguments": 0, "no_call": 1}


def test_evaluation_asks_for_every_call_of_the_example(tokenizer_of) -> None:
    template = template_of(EXAMPLE, tokenizer_of(EXAMPLE))
    path = ROOT / "examples/data/fc-eval.jsonl"
    encoder = Encoder(tokenizer_of(EXAMPLE), template, 4096)
    data = Data(eval_dataset_path=(str(path),), eval_dataset_type=("chatml",))
    stream = Stream(data, "eval", encoder, seed=0)
    found = list(prompts(stream, -1))
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    calling = [[m for m in r["messages"] if m.get("tool_calls")] for r in records]
    ends = [r["messages"][-1] for r in records if not r["messages"][-1].get("tool_calls")]
    assert len(found) == sum(map(len, calling)) + len(ends)
    made = [len(p.calls or ()) for p in found if p.calls]
    assert made == [len(m["tool_calls"]) for group in calling for m in group]
    for prompt in found:
        perfect = call_scores(calls_in(prompt.reference), prompt.calls)
        assert set(perfect.values()) == {1.0}, prompt.reference
