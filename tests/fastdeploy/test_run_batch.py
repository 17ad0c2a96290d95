"""Batch files: every line answered once, whatever happens in between."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from helpers_page import running
from helpers_server import Server

from fastdeploy import cli
from fastdeploy.client.batch import Batch, read_lines, run


def line(name: str, content: str = "Hello!", **changes: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4, "seed": 1}
    url = "/v1/chat/completions"
    return {"custom_id": name, "method": "POST", "url": url, "body": body} | changes


def written(path: Path, entries: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
    return path


def answers(path: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(text) for text in path.read_text("utf-8").split("\n") if text]
    assert len({answer["custom_id"] for answer in found}) == len(found), "a line has two answers"
    return {answer["custom_id"]: answer for answer in found}


def test_every_line_is_answered_good_or_bad(server: Server, tmp_path: Path) -> None:
    good = [line(f"good-{i}", f"Hello {i}, 你好") for i in range(20)]
    asked = {"role": "user", "content": "Hello!"}
    anthropic = {"model": "m", "max_tokens": 4, "messages": [asked]}
    bad = [
        line("refused", body={"messages": []}),
        line("url", url="/v1/models"),
        line("streamed", body={"messages": [], "stream": True}),
        line("get", method="GET"),
        line("no body", body=None),
    ]
    others = [
        line("messages", url="/v1/messages", body=anthropic),
        line("no message", url="/v1/messages", body=anthropic | {"messages": []}),
    ]
    lines = good + bad + others
    source, output = written(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    command = ["run-batch", "-i", str(source), "-o", str(output), "--base-url", server.url]
    assert cli.main(command) == 1  # some have failed
    found = answers(output)
    assert found.keys() == {entry["custom_id"] for entry in lines}
    assert found["messages"]["response"]["body"]["usage"]["output_tokens"] == 4
    refusal = found["no message"]["response"]
    assert refusal["status_code"] == 400
    assert "messages" in refusal["body"]["error"]["message"]
    for entry in good:
        response = found[entry["custom_id"]]["response"]
        assert response["status_code"] == 200
        assert response["body"]["usage"]["completion_tokens"] == 4
        assert response["request_id"] == response["body"]["id"]
    assert found["refused"]["response"]["status_code"] == 400
    assert "messages" in found["refused"]["response"]["body"]["error"]["message"]
    for entry in bad[1:]:
        assert found[entry["custom_id"]]["error"]["code"] == "invalid_request"
    assert not list(tmp_path.glob("*.part"))


def test_half_a_character_fails_its_line_alone(server: Server, tmp_path: Path) -> None:
    lines = [line("good"), line("half", "\ud83d"), line("half \ud83d")]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    command = ["run-batch", "-i", str(source), "-o", str(output), "--base-url", server.url]
    assert cli.main(command) == 1
    found = {name: answer["response"] for name, answer in answers(output).items()}
    assert {name: response["status_code"] for name, response in found.items()} == {
        "good": 200,
        "half": 400,
        "half \ud83d": 200,
    }
    assert "surrogate" in found["half"]["body"]["error"]["message"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}\n", "line 1 is no JSON object with a custom_id"),
        ('{"custom_id": "a"}\nnonsense\n', "line 2 is no JSON object"),
        ('{"custom_id": "a"}\n\n{"custom_id": "a"}\n', "line 3: custom_id='a' must be"),
    ],
)
def test_a_line_without_a_name_of_its_own_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, text: str, message: str
) -> None:
    (tmp_path / "in.jsonl").write_text(text)
    flags = ["-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "o"), "--base-url", "http://x"]
    assert cli.main(["run-batch", *flags]) == 2
    assert message in capsys.readouterr().err


class Faulty:
    """Counts what it is asked; its first answers to each prompt are failures."""

    def __init__(self, faults: list[Response | None]) -> None:
        self.faults = faults
        self.asked: Counter[str] = Counter()
        self.open, self.most_open = 0, 0

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.post("/v1/chat/completions")
        async def completions(request: Request) -> Response:
            content = (await request.json())["messages"][0]["content"]
            tries = self.asked[content]
            self.asked[content] += 1
            self.open += 1
            self.most_open = max(self.most_open, self.open)
            await asyncio.sleep(0.01)
            self.open -= 1
            if tries < len(self.faults) and self.faults[tries] is not None:
                return self.faults[tries]
            return JSONResponse({"id": "x", "echo": content})

        return app


def test_passing_failures_are_tried_again_and_few_at_once(tmp_path: Path) -> None:
    headers = {"retry-after": "0"}
    busy = JSONResponse({"error": {"message": "busy"}}, 429, headers)
    upstream = Faulty([busy, JSONResponse({"error": {"message": "down"}}, 503, headers)])
    source = written(tmp_path / "in.jsonl", [line(str(i), str(i)) for i in range(30)])
    output = tmp_path / "out.jsonl"
    with running(upstream.app()) as url:
        batch = Batch(
            input_file=str(source), output_file=str(output), base_url=url, max_concurrency=7
        )
        assert asyncio.run(run(batch, read_lines(source), url)) == 0
    assert set(upstream.asked.values()) == {3}
    assert upstream.most_open == 7
    echoes = {name: found["response"]["body"]["echo"] for name, found in answers(output).items()}
    assert echoes == {str(i): str(i) for i in range(30)}


@pytest.mark.parametrize("content", ["<html>Busy</html>", "", "[1]"])
def test_an_answer_that_is_no_json_object_fails_its_line_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    upstream = Faulty([])
    plain = upstream.app()

    @plain.middleware("http")
    async def _(request: Request, call_next: Any) -> Response:
        body = await request.body()
        return Response(content) if b'"1"' in body else await call_next(request)

    source = written(tmp_path / "in.jsonl", [line(str(i), str(i)) for i in range(3)])
    output = tmp_path / "out.jsonl"
    with running(plain) as url:
        batch = Batch(input_file=str(source), output_file=str(output), base_url=url, max_tries=1)
        assert asyncio.run(run(batch, read_lines(source), url)) == 1
    found = answers(output)
    assert found["1"]["error"]["code"] == "no_answer"
    assert "no JSON object" in found["1"]["error"]["message"]
    assert {found[name]["response"]["body"]["echo"] for name in ("0", "2")} == {"0", "2"}


def test_it_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    upstream = Faulty([])
    entries = [line(str(i), str(i)) for i in range(10)]
    source, output = written(tmp_path / "in.jsonl", entries), tmp_path / "out.jsonl"
    part = tmp_path / "out.jsonl.part"
    done = {"id": "b", "response": {"status_code": 200, "body": {}}, "error": None}
    kept = [json.dumps({"custom_id": name, **done}) for name in ("3", "7")]
    part.write_text("\n".join(kept) + '\n{"id": "half of a li')
    with running(upstream.app()) as url:
        batch = Batch(input_file=str(source), output_file=str(output), base_url=url)
        assert asyncio.run(run(batch, read_lines(source), url)) == 0
    assert upstream.asked.keys() == {str(i) for i in range(10)} - {"3", "7"}
    assert answers(output).keys() == {str(i) for i in range(10)}


def test_a_server_that_is_gone_loses_no_line(tmp_path: Path, monkeypatch) -> None:
    async def at_once(_: float) -> None:
        return None

    source = written(tmp_path / "in.jsonl", [line(str(i)) for i in range(3)])
    output = tmp_path / "out.jsonl"
    batch = Batch(input_file=str(source), output_file=str(output), base_url="http://127.0.0.1:1")
    monkeypatch.setattr(asyncio, "sleep", at_once)
    assert asyncio.run(run(batch, read_lines(source), "http://127.0.0.1:1")) == 3
    assert {found["error"]["code"] for found in answers(output).values()} == {"no_answer"}


def test_a_model_is_served_for_the_batch(folder: Path, tmp_path: Path) -> None:
    source, output = written(tmp_path / "in.jsonl", [line("a")]), tmp_path / "out.jsonl"
    flags = ["-i", str(source), "-o", str(output), "--model", str(folder)]
    flags += ["--serve-flags", "--dtype float32 --max-model-len 256"]
    assert cli.main(["run-batch", *flags]) == 0
    assert answers(output)["a"]["response"]["body"]["usage"]["completion_tokens"] == 4
