"""Tools and thoughts through the server, with a model that says what a script wants."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import helpers_scripted
import helpers_tokenizer
import httpx
import pytest
from helpers_scripted import Line
from helpers_server import Server, start_server, stop_server
from openai import OpenAI

from ernie.settings import ConfigError
from ernie.tokenizer import Tokenizer
from fastdeploy.config import EngineConfig, ServerConfig
from fastdeploy.errors import RequestError
from fastdeploy.flags import read_config
from fastdeploy.sampling import GuidedDecodingParams
from fastdeploy.server.tools import check_history, constraint_for, tool_use

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def tool(name: Any = "weather", parameters: Any = CITY, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def written(city: str) -> str:
    call = {"name": "weather", "arguments": {"city": city}}
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>\n"


HELLO = [user("Hello!")]
HISTORY = [
    user("Paris?"),
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call-1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call-1", "content": "sunny"},
]
BROKEN = '<tool_call>\n{"name": weather}\n</tool_call>'
SCRIPT = [
    Line(
        HELLO,
        "The user says\n\nhello.\n</think>\n\n<response>\nNice to\n\nmeet you.\n</response>\n",
    ),
    Line([user("Paris?")], "I look.\n</think>\n\n" + written("Paris"), [tool()]),
    Line(
        [user("Both?")],
        "Two.\n</think>\n\nLet me look.\n" + written("Paris") + written("Rome"),
        [tool()],
    ),
    Line([user("Paris?")], "I look.\n</think>\n\n" + written("Paris"), [tool(strict=True)]),
    Line([user("Form?")], 'Hm.\n</think>\n\n{"city": "Rome"}', [tool()]),
    Line([user("Broken?")], f"Hm.\n</think>\n\n{BROKEN}\n", [tool()]),
    Line(HISTORY, "So.\n</think>\n\n<response>\nIt is sunny.\n</response>\n", [tool()]),
]


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return helpers_scripted.scripted_folder(tmp_path_factory.mktemp("models") / "scripted", SCRIPT)


@pytest.fixture(scope="module")
def thinker(scripted: Path) -> Iterator[Server]:
    flags = ("--enable-logprob", "--trust-request-chat-template")
    running = start_server(scripted, *flags, max_len=512)
    yield running
    metrics = httpx.get(running.url.removesuffix("/v1") + "/metrics").text
    assert "fastdeploy:stream_divergence_total 0.0" in metrics
    assert stop_server(running) == 0


@pytest.fixture(scope="module")
def client(thinker: Server) -> OpenAI:
    return OpenAI(base_url=thinker.url, api_key="none", max_retries=0)


def ask(client: OpenAI, messages: Any, **options: Any) -> Any:
    return client.chat.completions.create(model="m", messages=messages, temperature=0, **options)


def streamed(client: OpenAI, messages: Any, **options: Any) -> dict[str, Any]:
    """The first choice of a stream, put together as clients do."""
    message: dict[str, Any] = {"reasoning_content": "", "content": "", "tool_calls": []}
    for chunk in ask(client, messages, stream=True, **options):
        (choice,) = chunk.choices or (None,)
        if choice is None:
            message["usage"] = chunk.usage
            continue
        delta = choice.delta
        message["content"] += delta.content or ""
        message["reasoning_content"] += getattr(delta, "reasoning_content", None) or ""
        for call in delta.tool_calls or ():
            assert call.index == len(message["tool_calls"]) and call.id
            message["tool_calls"].append((call.function.name, call.function.arguments))
        message["finish_reason"] = choice.finish_reason
    return message


CASES = {
    "an answer": (HELLO, {}, "The user says\n\nhello.", "Nice to\n\nmeet you.", [], "stop"),
    "a call": ([user("Paris?")], {"tools": [tool()]}, "I look.", None, ["Paris"], "tool_calls"),
    "two calls": (
        [user("Both?")],
        {"tools": [tool()]},
        "Two.",
        "Let me look.",
        ["Paris", "Rome"],
        "tool_calls",
    ),
    "one of two": (
        [user("Both?")],
        {"tools": [tool()], "parallel_tool_calls": False},
        "Two.",
        "Let me look.",
        ["Paris"],
        "tool_calls",
    ),
    "a broken one": ([user("Broken?")], {"tools": [tool()]}, "Hm.", BROKEN + "\n", [], "stop"),
    "a result": (HISTORY, {"tools": [tool()]}, "So.", "It is sunny.", [], "stop"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_thoughts_and_calls_whole_and_streamed(client: OpenAI, case: tuple) -> None:
    messages, options, reasoning, content, cities, reason = case
    choice = ask(client, messages, **options).choices[0]
    message = choice.message
    assert message.reasoning_content == reasoning
    assert message.content == content
    calls = [(c.function.name, c.function.arguments) for c in message.tool_calls or ()]
    assert calls == [("weather", json.dumps({"city": city})) for city in cities]
    assert choice.finish_reason == reason
    got = streamed(client, messages, **options)
    assert got == {
        "reasoning_content": reasoning,
        "content": content or "",
        "tool_calls": calls,
        "finish_reason": reason,
    }


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_required_call_is_made_where_the_model_would_only_talk(
    client: OpenAI, choice: Any
) -> None:
    enum = {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}
    fields: dict[str, Any] = {
        "messages": HELLO,
        "tools": [tool(parameters=enum | {"additionalProperties": False})],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "extra_body": {"reasoning_max_tokens": 12},
        "model": "m",
        "temperature": 0,
        "max_tokens": 120,
    }
    whole = client.chat.completions.create(**fields)
    answer = whole.choices[0]
    assert answer.finish_reason == "tool_calls", answer
    (call,) = answer.message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Rome"}
    assert whole.usage is not None
    most: list[str] = []
    for num_missing in range(0, 21, 5):  # cut in the end of the call, and within it
        fields["max_tokens"] = whole.usage.completion_tokens - num_missing
        stream = list(client.chat.completions.create(**fields, stream=True))
        parts = [p for c in stream for p in c.choices[0].delta.tool_calls or ()]
        assert num_missing or len(parts) > 3, "in fragments, as they are written"
        names = [p.function.name for p in parts]
        assert names[0] == "weather" and not any(names[1:])
        assert parts[0].id and not any(p.id for p in parts[1:])
        arguments = "".join(p.function.arguments for p in parts)
        reason = stream[-1].choices[0].finish_reason
        cut = client.chat.completions.create(**fields).choices[0]
        assert (arguments, reason) == (
            cut.message.tool_calls[0].function.arguments,
            cut.finish_reason,
        )
        assert reason == ("length" if num_missing else "tool_calls")
        most.append(arguments)
    assert most[0] == call.function.arguments
    assert not most[-1].endswith("}") and most[0].startswith(most[-1])


def test_a_strict_tool_streams_its_arguments_where_the_model_decides(client: OpenAI) -> None:
    options: dict[str, Any] = {"tools": [tool(strict=True)], "messages": [user("Paris?")]}
    whole = ask(client, **options).choices[0]
    (call,) = whole.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Paris"}')
    chunks = list(ask(client, **options, stream=True))
    parts = [p for c in chunks for p in c.choices[0].delta.tool_calls or ()]
    assert [p.function.name for p in parts if p.id] == ["weather"]
    assert len(parts) > 3, "in fragments, as they are written"
    assert "".join(p.function.arguments for p in parts) == call.function.arguments
    assert not any(c.choices[0].delta.content for c in chunks) and whole.message.content is None
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason == "tool_calls"


@pytest.mark.parametrize("form", ["json_object", "json_schema"])
def test_a_tool_can_be_called_where_an_answer_without_calls_is_json(
    client: OpenAI, form: str
) -> None:
    described = {"name": "city", "schema": CITY | {"additionalProperties": False}}
    options: dict[str, Any] = {"response_format": {"type": form}, "tools": [tool()]}
    if form == "json_schema":
        options["response_format"]["json_schema"] = described
    called = ask(client, [user("Paris?")], **options).choices[0]
    assert called.finish_reason == "tool_calls" and called.message.content is None, called
    (call,) = called.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Paris"}')
    said = ask(client, [user("Form?")], **options).choices[0]
    assert (said.finish_reason, said.message.tool_calls) == ("stop", None)
    assert said.message.content == '{"city": "Rome"}' and said.message.reasoning_content == "Hm."
    for question, whole in (("Paris?", called), ("Form?", said)):
        choices = [c.choices[0] for c in ask(client, [user(question)], **options, stream=True)]
        assert "".join(c.delta.content or "" for c in choices) == (whole.message.content or "")
        parts = [p.function.arguments for c in choices for p in c.delta.tool_calls or ()]
        expected = [one.function.arguments for one in whole.message.tool_calls or ()]
        assert "".join(parts) == "".join(expected)
        assert choices[-1].finish_reason == whole.finish_reason


def test_the_clients_stream_helper_understands_the_calls(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model="m", messages=[user("Both?")], tools=[tool()], temperature=0
    ) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    assert [c.function.name for c in message.tool_calls] == ["weather", "weather"]
    assert len({c.id for c in message.tool_calls}) == 2


def test_anthropics_form_has_thoughts_calls_and_results_as_blocks(thinker: Server) -> None:
    weather = {"name": "weather", "input_schema": CITY}

    def create(messages: Any, **fields: Any) -> dict[str, Any]:
        body = {"model": "m", "max_tokens": 200, "temperature": 0, "tools": [weather], **fields}
        body["messages"] = messages
        return httpx.post(f"{thinker.url}/messages", json=body, timeout=60).json()

    asked = [user("Paris?")]
    answer = create(asked)
    thought, used = answer["content"]
    assert thought == {"type": "thinking", "thinking": "I look.", "signature": ""}
    assert (used["type"], used["name"], used["input"]) == ("tool_use", "weather", {"city": "Paris"})
    assert answer["stop_reason"] == "tool_use"
    result = {"type": "tool_result", "tool_use_id": used["id"], "content": "sunny"}
    history = [
        *asked,
        {"role": "assistant", "content": answer["content"]},
        {"role": "user", "content": [result]},
    ]
    assert create(history)["content"][-1] == {"type": "text", "text": "It is sunny."}
    chosen = create([user("Hello!")], tool_choice={"type": "tool", "name": "weather"})
    assert chosen["content"][-1]["name"] == "weather"
    refused = create([*asked, {"role": "assistant", "content": "It"}])["error"]
    assert "does not think" in refused["message"]


def test_a_call_that_max_tokens_cuts_is_not_sold(client: OpenAI) -> None:
    tools: list[Any] = [tool()]
    whole = ask(client, [user("Paris?")], tools=tools).usage.completion_tokens
    for missing in (6, 12):
        most = whole - missing
        choice = ask(client, [user("Paris?")], tools=tools, max_tokens=most).choices[0]
        assert choice.finish_reason == "length" and not choice.message.tool_calls
        assert choice.message.content.lstrip().startswith("<tool_call>")
        got = streamed(client, [user("Paris?")], tools=tools, max_tokens=most)
        assert (got["content"], got["tool_calls"]) == (choice.message.content, [])


def test_reasoning_tokens_are_counted_alike(client: OpenAI) -> None:
    usage = ask(client, HELLO).usage
    thoughts = usage.completion_tokens_details.reasoning_tokens
    assert 0 < thoughts < usage.completion_tokens
    got = streamed(client, HELLO, stream_options={"include_usage": True})["usage"]
    assert got.completion_tokens_details.reasoning_tokens == thoughts
    effort = {"reasoning_effort": "minimal", "extra_body": {"reasoning_max_tokens": 4}}
    short = ask(client, HELLO, max_tokens=40, **effort).usage
    assert short.completion_tokens_details.reasoning_tokens == 4


@pytest.mark.parametrize("stream", [False, True])
def test_a_begun_answer_goes_on_where_it_was(client: OpenAI, scripted: Path, stream: bool) -> None:
    whole = ask(client, HELLO, extra_body={"return_token_ids": True}).choices[0].message
    ids = whole.completion_token_ids
    tokenizer = Tokenizer.from_folder(scripted)
    for mark, thought, content in (
        ("The user says", "\n\nhello.", "Nice to\n\nmeet you."),
        ("Nice to", "", "\n\nmeet you."),
    ):
        begun = next(ids[:i] for i in range(len(ids)) if mark in tokenizer.decode(ids[:i]))
        body = {"completion_token_ids": begun}
        if stream:
            got = streamed(client, HELLO, extra_body=body)
            assert (got["reasoning_content"], got["content"]) == (thought, content)
        else:
            message = ask(client, HELLO, extra_body=body).choices[0].message
            assert (message.reasoning_content or "", message.content) == (thought, content)


def test_logprobs_list_the_tokens_of_the_content(client: OpenAI) -> None:
    choice = ask(client, HELLO, logprobs=True, top_logprobs=1).choices[0]
    spelled = b"".join(bytes(token.bytes) for token in choice.logprobs.content).decode()
    assert spelled.strip() == choice.message.content
    chunks = list(ask(client, HELLO, logprobs=True, top_logprobs=1, stream=True))
    logprobs = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
    tokens = [token for one in logprobs for token in one.content]
    assert tokens == choice.logprobs.content


def test_best_of_keeps_each_samples_message(client: OpenAI) -> None:
    body = {"best_of": 3, "return_token_ids": True}
    answer = client.chat.completions.create(
        model="m", messages=HELLO, n=2, seed=1, extra_body=body, max_tokens=30
    )
    assert [choice.index for choice in answer.choices] == [0, 1]


def test_without_tools_tags_of_calls_are_text(client: OpenAI) -> None:
    """A choice of none leaves the tools out of the prompt as well."""
    prompts = [
        ask(client, HELLO, max_tokens=1, extra_body={"return_token_ids": True}, **options)
        for options in ({}, {"tools": [tool()], "tool_choice": "none"})
    ]
    first, second = (answer.choices[0].message.prompt_token_ids for answer in prompts)
    assert first == second


def test_a_template_of_the_request_and_none_at_all(client: OpenAI) -> None:
    def prompt(**extra: Any) -> list[int]:
        body = {"return_token_ids": True, **extra}
        return (
            ask(client, [user("Hi <think>")], max_tokens=1, extra_body=body)
            .choices[0]
            .message.prompt_token_ids
        )

    raw = prompt(disable_chat_template=True)
    own = prompt(chat_template="{{ messages[0].content }}")
    assert raw == own, "what a user writes stays text in both"
    assert raw != prompt()


def test_spellings_of_other_clients(client: OpenAI) -> None:
    def prompt(messages: Any) -> list[int]:
        body = {"return_token_ids": True}
        return (
            ask(client, messages, max_tokens=1, extra_body=body).choices[0].message.prompt_token_ids
        )

    system = [{"role": "system", "content": "Be kind."}, *HELLO]
    assert prompt(system) == prompt([{**system[0], "role": "developer"}, *HELLO])
    call = HISTORY[1]["tool_calls"][0]
    as_object = {**call, "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    assert prompt(HISTORY) == prompt(
        [HISTORY[0], {**HISTORY[1], "tool_calls": [as_object]}, HISTORY[2]]
    )
    parts = [{"type": "text", "text": "sunny"}]
    assert prompt(HISTORY) == prompt([*HISTORY[:2], {**HISTORY[2], "content": parts}])


DEEP: dict[str, Any] = {"type": "object"}
for _ in range(200):
    DEEP = {"type": "object", "properties": {"a": DEEP}}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tools": ["weather"]}, "tools"),
    ({"tools": {"type": "function"}}, "tools"),
    ({"tools": [{"type": "web_search"}]}, "tools"),
    ({"tools": [tool('we"ather')]}, "tools"),
    ({"tools": [tool("we\nather")]}, "tools"),
    ({"tools": [tool("")]}, "tools"),
    ({"tools": [tool("a" * 65)]}, "tools"),
    ({"tools": [tool(None)]}, "tools"),
    ({"tools": [tool(), tool()]}, "tools"),
    ({"tools": [tool(f"f{i}") for i in range(129)]}, "tools"),
    ({"tools": [tool(parameters=[1])]}, "tools"),
    ({"tools": [tool(parameters={"type": "string"})]}, "tools"),
    ({"tools": [tool(parameters={"type": "object", "properties": [1]})]}, "tools"),
    ({"tools": [tool(parameters={"properties": {"a": {"type": "strin"}}})]}, "tools"),
    ({"tools": [tool(parameters={"properties": {"a": {"type": ["string", {}]}}})]}, "tools"),
    ({"tools": [tool(parameters={"required": [1]})]}, "tools"),
    ({"tools": [tool(parameters={"anyOf": {}})]}, "tools"),
    ({"tools": [tool(parameters=DEEP)]}, None),
    ({"tools": [tool(strict="yes")]}, "tools"),
    ({"tools": [tool(description=1)]}, "tools"),
    ({"tools": [tool()], "tool_choice": "any"}, "tool_choice"),
    ({"tools": [tool()], "tool_choice": {"type": "function"}}, "tool_choice"),
    (
        {"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "x"}}},
        "tool_choice",
    ),
    ({"tool_choice": "required"}, "tool_choice"),
    (
        {"tools": [tool()], "tool_choice": "required", "completion_token_ids": [5]},
        "completion_token_ids",
    ),
    ({"guided_regex": "ab", "completion_token_ids": [5]}, "completion_token_ids"),
    ({"tools": [tool()], "guided_grammar": 'start: "a"'}, "tool_choice"),
    ({"tools": [tool()], "tool_choice": "required", "guided_regex": "a"}, "tool_choice"),
    ({"tools": [tool()], "guided_json": "{"}, "guided_json"),
    ({"tools": [tool()], "structural_tag": "{}"}, "structural_tag"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"function_call": {"name": "f"}}, "function_call"),
    ({"messages": [*HELLO, {"role": "tool", "content": "x"}]}, "messages"),
    ({"messages": [*HISTORY[:2], {**HISTORY[2], "tool_call_id": "call-2"}]}, "messages"),
    ({"messages": [*HELLO, {"role": "assistant", "function_call": {"name": "f"}}]}, "messages"),
    ({"reasoning_effort": "enormous"}, "reasoning_effort"),
    ({"enable_thinking": "yes"}, "enable_thinking"),
    ({"enable_thinking": False}, "messages"),
    ({"metadata": {"enable_thinking": "yes"}}, "metadata"),
    ({"enable_thinking": True, "reasoning_effort": "none"}, "enable_thinking"),
    ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
    (
        {"chat_template_kwargs": {"enable_thinking": False}, "enable_thinking": True},
        "enable_thinking",
    ),
    ({"chat_template_kwargs": {"colour": "red"}}, "messages"),
    ({"disable_chat_template": True, "messages": [*HELLO, *HELLO]}, "disable_chat_template"),
    ({"disable_chat_template": True, "messages": [{"role": "user"}]}, "disable_chat_template"),
    ({"chat_template": "{{ messages"}, "messages"),
    ({"chat_template": "{{ messages.__class__ }}"}, "messages"),
    ({"chat_template": "{{ messages[0].content }}", "tools": [tool()]}, "messages"),
]


@pytest.mark.parametrize(("body", "param"), BAD, ids=lambda value: repr(value)[:70])
def test_mistakes_with_tools_and_thoughts_are_400s_that_name_them(
    thinker: Server, body: dict[str, Any], param: str | None
) -> None:
    answer = httpx.post(
        thinker.url + "/chat/completions", json={"messages": HELLO, "max_tokens": 1} | body
    )
    assert answer.status_code == 400, answer.text[:300]
    error = answer.json()["error"]
    assert error["param"] == param, error
    assert len(error["message"]) < 400 and "Traceback" not in error["message"]


@pytest.mark.parametrize(
    "body", [{"tools": [tool()]}, {"tool_choice": "required"}, {"reasoning_effort": "low"}]
)
def test_fields_of_chat_are_refused_by_completions(thinker: Server, body: dict[str, Any]) -> None:
    answer = httpx.post(thinker.url + "/completions", json={"prompt": "a", **body})
    assert answer.status_code == 400
    assert "belongs to chat completions" in answer.json()["error"]["message"]


def test_a_model_without_tools_or_thoughts_says_so(server: Server) -> None:
    def error(**body: Any) -> dict[str, Any]:
        answer = httpx.post(server.url + "/chat/completions", json={"messages": HELLO, **body})
        assert answer.status_code == 400, answer.text
        return answer.json()["error"]

    assert "--tool-call-parser" in error(tools=[tool()])["message"]
    assert error(reasoning_effort="low")["param"] == "reasoning_effort"
    assert "trust_request_chat_template" in error(chat_template="x{{ 1 }}")["message"]
    assert "cannot think" in error(enable_thinking=True)["message"]
    off = {"messages": HELLO, "enable_thinking": False, "max_tokens": 1}
    assert httpx.post(server.url + "/chat/completions", json=off).status_code == 200


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            {"reasoning_parser": "erny"},
            "use auto, none, ernie-45-vl, ernie-45-vl-thinking, ernie-x1",
        ),
        ({"tool_call_parser": "x"}, "use auto, none, ernie-45-vl-thinking, ernie-x1, hermes"),
        ({"tool_parser_plugin": "/tmp/x.py"}, "no code from a model's folder or from a plug-in"),
    ],
)
def test_unknown_parsers_and_plugins_stop_the_start(flags: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_config([EngineConfig, ServerConfig], {"model": "m", **flags}, "flags")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Without any tag as a token."""
    folder = helpers_tokenizer.byte_level_folder(tmp_path_factory.mktemp("tokenizers") / "plain")
    return Tokenizer.from_folder(folder)


def choice_of(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


GRAMMARS = {
    "required": ("required", None, ["weather", "now"], True),
    "not parallel": ("required", False, ["weather", "now"], False),
    "named": (choice_of("now"), None, ["now"], False),
}


def taker(constraint: GuidedDecodingParams | None) -> Callable[[str], bool]:
    """Whether a grammar takes a whole text, as llguidance reads it byte by byte."""
    llguidance = pytest.importorskip("llguidance")
    assert constraint is not None and constraint.grammar is not None
    tokenizer = llguidance.LLTokenizer("byte")
    grammar = llguidance.LLMatcher.grammar_from_lark(constraint.grammar)

    def takes(text: str) -> bool:
        matcher = llguidance.LLMatcher(tokenizer, grammar)
        ids = tokenizer.tokenize_str(text)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    return takes


@pytest.mark.parametrize("case", GRAMMARS.values(), ids=GRAMMARS)
def test_a_required_call_is_a_grammar_that_takes_just_that(case: tuple, plain: Tokenizer) -> None:
    choice, parallel, names, several = case
    tools = [tool(), tool("now", {"type": "object", "additionalProperties": False})]
    takes = taker(constraint_for(tool_use(tools, choice, parallel), None, plain))
    weather, now = (
        written("Paris").rstrip(),
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    )
    assert takes(now) and takes("\n\n" + now)
    assert takes(weather) == ("weather" in names)
    assert takes(now + "\n" + now) == takes(now + "\n") == several
    for wrong in ("", "now", now.replace("{}", '{"x": 1}'), now.replace("now", "then"), now[:-1]):
        assert not takes(wrong), wrong
    assert not takes(weather.replace('"Paris"', "3"))


def test_tags_that_are_tokens_are_tokens_in_the_grammar(plain: Tokenizer) -> None:
    ids = {"<tool_call>": 7, "</tool_call>": 8}
    plain = copy.copy(plain)
    plain._id_by_token = plain._id_by_token | ids
    constraint = constraint_for(tool_use([tool()], "required", None), None, plain)
    assert 'call: <[7]> "\\n" body "\\n" <[8]>' in constraint.grammar


def test_only_strict_tools_bind_an_answer_that_need_not_call(plain: Tokenizer) -> None:
    assert constraint_for(tool_use([tool()], None, None), None, plain) is None
    assert constraint_for(tool_use([tool(strict=True)], "none", None), None, plain) is None
    use = tool_use([tool(strict=True), tool("now")], None, None)
    constraint = constraint_for(use, None, plain)
    assert constraint is not None and constraint.structural_tag is not None
    tag = json.loads(constraint.structural_tag)
    first, second = tag["structures"]
    assert written("Paris").startswith(first["begin"]) and tag["triggers"] == ["<tool_call>"]
    assert (first["schema"], second["schema"]) == (CITY, {"type": "object"})


FORMS = {
    "a schema": ({"json": CITY}, '{"city": "Rome"}', '{"town": "Rome"}'),
    "any object": ({"json_object": True}, '{"a":1}', "[1]"),
    "a choice": ({"choice": ["a/b", 'say "x"']}, 'say "x"', "a"),
    "a pattern": ({"regex": r"a/[b/]\/\d"}, "a///3", "a/3"),
}


@pytest.mark.parametrize("case", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("follows_thought", [False, True])
def test_an_answer_is_calls_or_of_the_form_beside_tools(
    case: tuple, follows_thought: bool, plain: Tokenizer
) -> None:
    fields, right, wrong = case
    form = GuidedDecodingParams(**fields)
    tools = [tool(), tool("now", strict=True)]

    def takes(text: str, parallel: bool = True) -> bool:
        use = tool_use(tools, "auto", parallel)
        return taker(constraint_for(use, form, plain, follows_thought=follows_thought))(text)

    call = written("Paris").rstrip()
    assert takes(right) and takes(call) and takes(f"{call}\n{call}\n")
    assert not takes(wrong) and not takes("") and not takes(right + call)
    assert takes("\n\n" + right) == takes("\n\n" + call) == follows_thought
    assert takes(call, parallel=False) and not takes(f"{call}\n{call}", parallel=False)
    loose = call.replace('"city": "Paris"', '"town": 3')
    assert takes(loose) and not takes(loose.replace("weather", "now")), "the strict one is held"
    unbound = tool_use(tools, "none", None)
    assert constraint_for(unbound, form, plain) is form


@pytest.mark.parametrize("kind", ["json", "structural_tag"])
def test_a_form_of_any_depth_beside_tools_is_taken_or_refused(kind: str, plain: Tokenizer) -> None:
    use = tool_use([tool()], None, None)
    for depth in range(700, 1000, 3):  # around the depth that Python's own stack has
        schema = '{"not":' * depth + "{}" + "}" * depth
        tag = f'{{"structures": [{{"begin": "a", "schema": {schema}}}], "triggers": ["a"]}}'
        form = GuidedDecodingParams(**{kind: schema if kind == "json" else tag})
        try:
            constraint_for(use, form, plain)
        except RequestError as error:
            assert "deep" in str(error) or "recursion" in str(error), error


def test_calls_are_tags_beside_the_tags_of_a_request(plain: Tokenizer) -> None:
    own = {"begin": "<a>", "schema": CITY, "end": "</a>"}
    asked = {"structures": [own], "triggers": ["<a"]}
    use = tool_use([tool()], None, None)
    constraint = constraint_for(use, GuidedDecodingParams(structural_tag=asked), plain)
    assert constraint is not None and constraint.structural_tag is not None
    tag = json.loads(constraint.structural_tag)
    assert tag["structures"][0] == own and tag["triggers"] == ["<a", "<tool_call>"]
    assert written("Paris").startswith(tag["structures"][1]["begin"])
    with pytest.raises(RequestError, match="must have"):
        constraint_for(use, GuidedDecodingParams(structural_tag={"triggers": []}), plain)


def test_results_belong_to_the_calls_before_them() -> None:
    check_history(HISTORY)
    check_history([*HISTORY, HISTORY[2]])  # several results
    check_history([*HISTORY[:2], {"role": "tool", "content": "x"}])  # without an id
    with pytest.raises(RequestError, match=r"messages\[4\] is the result of a tool"):
        check_history([*HISTORY, user("Thanks"), HISTORY[2]])
