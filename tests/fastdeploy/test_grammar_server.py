"""Answers held to a form over HTTP: the official client's flows, hostile forms, and the process
that tries them first.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from helpers_server import Server
from openai import OpenAI
from pydantic import BaseModel

from ernie import Tokenizer
from fastdeploy import LLM, GuidedDecodingParams, SamplingParams
from fastdeploy.engine.grammar import Grammars
from fastdeploy.errors import RequestError
from fastdeploy.server.grammars import GrammarCheck

pytest.importorskip("llguidance")

HELLO: list[Any] = [{"role": "user", "content": "Hello!"}]


class Dog(BaseModel, extra="forbid"):
    name: Literal["Rex", "Bello"]
    age: Literal[1, 2, 3]


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=server.url, api_key="none", max_retries=0)


def post(server: Server, **body: Any) -> httpx.Response:
    url = f"{server.url}/completions"
    return httpx.post(url, json={"prompt": "Hello!", "max_tokens": 100, **body}, timeout=60)


def test_the_client_parses_answers_into_its_own_classes(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="m", messages=HELLO, response_format=Dog, n=3, temperature=1.5, seed=2
    )
    for choice in answer.choices:
        assert isinstance(choice.message.parsed, Dog) and choice.finish_reason == "stop"
    assert len({choice.message.content for choice in answer.choices}) > 1


def test_a_streamed_form_is_the_whole_one_and_the_librarys(client: OpenAI, llm: LLM) -> None:
    schema = Dog.model_json_schema()
    settings: dict[str, Any] = {
        "model": "m",
        "messages": HELLO,
        "seed": 5,
        "max_tokens": 100,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "dog", "schema": schema},
        },
    }
    whole = client.chat.completions.create(**settings).choices[0].message.content
    stream = client.chat.completions.create(**settings, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == whole and len([piece for piece in pieces if piece]) > 1
    guided = GuidedDecodingParams(json=schema)
    params = SamplingParams(seed=5, max_tokens=100, guided_decoding=guided)
    assert llm.chat(HELLO, params)[0].outputs.text == whole
    Dog.model_validate_json(whole)


TAG = {
    "structures": [{"begin": "<n>", "schema": {"enum": [1]}, "end": "</n>"}],
    "triggers": ["<n>"],
}
FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"guided_json": Dog.model_json_schema()}, r'\{.*"name".*\}'),
    ({"guided_json": json.dumps(Dog.model_json_schema())}, r'\{.*"name".*\}'),
    ({"guided_regex": "[a-z]{3}-[0-9]"}, "[a-z]{3}-[0-9]"),
    ({"guided_choice": ["left", "right"]}, "left|right"),
    ({"guided_grammar": 'root ::= "a" | "(" root ")"'}, r"\(*a\)*"),
    ({"guided_grammar": 'start: "a" | "(" start ")"'}, r"\(*a\)*"),
    ({"response_format": {"type": "json_object"}, "max_tokens": 200}, r"\{.*"),
    ({"response_format": {"type": "text"}}, ".*"),
    ({"response_format": {"type": "structural_tag", **TAG}}, ".*"),
    ({"structural_tag": json.dumps(TAG)}, ".*"),
]


@pytest.mark.parametrize(("body", "pattern"), FIELDS, ids=lambda v: repr(v)[:40])
def test_each_field_holds_the_answer(server: Server, body: dict[str, Any], pattern: str) -> None:
    response = post(server, **{"temperature": 0.8, "seed": 4} | body)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    assert re.fullmatch(pattern, choice["text"], re.DOTALL), choice


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


HOSTILE: list[tuple[dict[str, Any], str, str]] = [
    ({"guided_regex": "a" * 10**6}, "guided_regex", "1000000 bytes is longer"),
    ({"guided_regex": "foo("}, "guided_regex", "unclosed group"),
    ({"guided_json": {"$ref": "#"}}, "guided_json", "no answer fits it"),
    ({"guided_json": {"$ref": "http://127.0.0.1:9/a"}}, "guided_json", "does not fetch"),
    ({"guided_json": {"enum": [f"v{i}" for i in range(10**6)]}}, "guided_json", "is longer"),
    ({"guided_json": {"type": "florb"}}, "guided_json", "Invalid type: florb"),
    ({"guided_json": {"type": "integer", "minimum": 5, "maximum": 3}}, "guided_json", "greater"),
    ({"guided_json": nested(150)}, None, "nested too deeply"),
    ({"guided_json": "{"}, "guided_json", "cannot be read as JSON"),
    ({"guided_choice": []}, "guided_choice", "one or more texts"),
    ({"guided_choice": [1]}, "guided_choice", ""),
    ({"guided_grammar": "root ::= " + "(" * 9000}, "guided_grammar", "nested too deeply"),
    ({"structural_tag": "{}"}, "structural_tag", "must have"),
    ({"response_format": {"type": "xml"}}, "response_format", "takes one of text, json_object"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema.schema"),
    ({"response_format": {"type": "text", "x": 1}}, "response_format", "has the key 'x'"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
        "response_format",
        "Invalid type",
    ),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "leave out all but one"),
]


def test_hostile_forms_are_400s_that_name_the_field_and_streams_go_on(server: Server) -> None:
    body = {"prompt": "Hello!", "seed": 9, "max_tokens": 150, "ignore_eos": True, "stream": True}
    url = f"{server.url}/completions"
    alone = httpx.post(url, json=body, timeout=60).text
    beside: list[str] = []
    go_on = threading.Event()

    def read_streams() -> None:
        while not go_on.is_set():
            beside.append(httpx.post(url, json=body, timeout=60).text)

    reader = threading.Thread(target=read_streams)
    reader.start()
    try:
        for form, field, message in HOSTILE:
            response = post(server, **form)
            error = response.json().get("error", {})
            assert response.status_code == 400, (repr(form)[:80], response.text[:200])
            assert error["param"] == field and message in error["message"], error
            assert "\n" not in error["message"] and len(error["message"]) < 500
    finally:
        go_on.set()
        reader.join()
    texts = [re.findall(r'"text":("(?:[^"\\]|\\.)*")', stream) for stream in (alone, *beside)]
    assert texts[0] and all(one == texts[0] for one in texts), "a stream was disturbed"


def test_an_unfinished_form_is_counted_in_the_metrics(server: Server) -> None:
    def count() -> float:
        text = httpx.get(server.url.removesuffix("/v1") + "/metrics").text
        return float(re.findall(r"^fastdeploy:guided_unfinished_total (\S+)$", text, re.M)[0])

    before = count()
    response = post(server, guided_json=Dog.model_json_schema(), max_tokens=2)
    assert response.json()["choices"][0]["finish_reason"] == "length"
    assert count() == before + 1


def test_a_form_that_fails_on_the_way_is_an_error_event_of_its_stream(server: Server) -> None:
    wide = {"guided_regex": r"(\w{1,50}|\d+ ){1,50}x", "seed": 0}
    response = post(server, **wide)
    assert response.status_code == 400 and "outgrown" in response.json()["error"]["message"]
    events = post(server, **wide, stream=True).text.split("\n\n")
    assert (
        "outgrown its limits" in json.loads(events[-3].removeprefix("data: "))["error"]["message"]
    )


HOGS = """
import os, sys
from fastdeploy.engine.grammar_check import tried

class Hog:
    def check_size(self, guided): pass
    def compile(self, guided):
        if guided.text == "memory": bytearray(2**30)
        if guided.text == "abort": os.abort()
        if guided.text == "exit": os._exit(3)
        while guided.text == "time": pass

for name in ("memory", "abort", "exit", "time", "nothing"):
    print(name, tried(Hog(), {"regex": name})["error"])
print("torch" in sys.modules, "llguidance" in sys.modules)
"""


def test_a_grammar_that_takes_too_much_ends_its_own_process_only() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOGS], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert "more memory than the 256 MiB" in said["memory"], done.stderr
    assert "more memory than the 256 MiB" in said["abort"]
    assert "cannot be compiled" in said["exit"]
    assert "more time than the 1 s" in said["time"]
    assert said["nothing"] == "None"
    assert said["False"] == "False", "it needs neither torch nor, for this, llguidance"


def test_the_trying_process_is_replaced_when_it_dies_and_verdicts_are_kept(folder: Path) -> None:
    async def tell() -> None:
        tokenizer = Tokenizer.from_folder(folder)
        made = Grammars(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids, max_bytes=1000)
        check = GrammarCheck(lambda: made)
        good, bad = GuidedDecodingParams(regex="a"), GuidedDecodingParams(regex="a(")
        assert await check.checked(good, "guided_regex") == good
        assert check.process is not None
        check.process.kill()
        await check.process.wait()
        with pytest.raises(RequestError, match=r"^guided_regex: regex cannot be used"):
            await check.checked(bad, "guided_regex")
        gbnf = GuidedDecodingParams(grammar='root ::= "a"')
        lark = await check.checked(gbnf, "guided_grammar")
        assert "::=" not in lark.grammar
        await check.close()
        assert await check.checked(good, "guided_regex") == good
        with pytest.raises(RequestError, match=r"^other: regex cannot be used"):
            await check.checked(bad, "other")
        assert check.process is None, "all of these are remembered"
        checks = [check.checked(GuidedDecodingParams(regex=f"b{i}"), "x") for i in range(40)]
        results = await asyncio.gather(*checks, return_exceptions=True)
        busy = [one for one in results if isinstance(one, RequestError)]
        assert len(busy) == 8 and all(one.status == 429 for one in busy)
        await check.close()

    asyncio.run(tell())
