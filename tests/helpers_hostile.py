"""Requests that nobody means well: hostile values in every field, bodies that are hardly JSON.

Made from the server's own OpenAPI document, so a new field is attacked without a new line here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEEP = 200
LONG = "\u202e\U0001f600" * 1000  # right-to-left marks and emoji

# As JSON text: some of them are nothing that a JSON library would write.
HOSTILE = (
    *("null", "true", "0", "-1", "1.5", "1e308", "1e999", "-0.0", "NaN", "-Infinity"),
    *(str(2**31), str(2**63), str(2**64), "-" + str(2**63), "9" * 4000, "9" * 5000, "1e-400"),
    *('""', '"\\u0000"', '"a\\u0000b"', '"\\ud800"', '"\\udfff\\ud800"', '"\\r\\n\\u001b[2J"'),
    *('"<|end_of_sentence|></think>"', '"../../etc/passwd"', '"%s%n{0}{{7*7}}"', json.dumps(LONG)),
    *("[]", "[[]]", "[null]", '[""]', "[1e999]", "[-1]", f"[{2**63}]", "[0.5]", '["\\u0000"]'),
    *("{}", '{"": null}', '{"\\u0000": 1}', '{"a": {"b": [{}]}}', '{"type": "object"}'),
    "[" * DEEP + "]" * DEEP,
    '{"a":' * DEEP + "1" + "}" * DEEP,
    "[" + ",".join(["0"] * 3000) + "]",
    "[" + ",".join(['"a"'] * 3000) + "]",
)

USER = {"role": "user", "content": "x"}
# A request of each kind that is served, quickly; a hostile value replaces or joins one field.
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [USER], "max_tokens": 2},
    "/v1/completions": {"prompt": "x", "max_tokens": 2},
    "/v1/chat/completions/render": {"messages": [USER]},
    "/v1/responses": {"input": "x", "max_output_tokens": 2},
    "/v1/embeddings": {"input": "x"},
    "/v1/rerank": {"query": "x", "documents": ["y"]},
    "/v1/score": {"text_1": "x", "text_2": "y"},
    "/v1/tokenize": {"prompt": "x"},
    "/v1/detokenize": {"tokens": [5]},
    "/v1/abort_requests": {"request_ids": ["x"]},
}
# Values within a field that holds others.
INSIDE = {
    "/v1/chat/completions": (
        '"messages": [%s]',
        '"messages": [{"role": "user", "content": %s}]',
        '"messages": [{"role": %s, "content": "x"}]',
        '"messages": [{"role": "user", "content": [{"type": "text", "text": %s}]}]',
        '"messages": [{"role": "assistant", "content": null, "tool_calls": [%s]}]',
        '"messages": [{"role": "tool", "content": "x", "tool_call_id": %s}]',
        '"stream": true, "stream_options": {"include_usage": %s}',
        '"logit_bias": {"5": %s}',
        '"chat_template_kwargs": {"x": %s}',
        '"tools": [{"type": "function", "function": %s}]',
        '"response_format": {"type": "json_schema", "json_schema": %s}',
    ),
    "/v1/responses": (
        '"input": [%s]',
        '"input": [{"role": "user", "content": %s}]',
        '"input": [{"type": %s}]',
        '"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": %s}]',
        '"input": [{"type": "function_call_output", "call_id": %s, "output": "x"}]',
        '"input": [{"type": "reasoning", "content": %s}]',
        '"input": "x", "stream": true, "metadata": {"a": %s}',
        '"input": "x", "text": {"format": %s}',
        '"input": "x", "tools": [%s]',
    ),
}
# Whole bodies.
BODIES = (
    *(b"", b"{", b"[]", b"null", b"5", b'"x"', b"{}{}", b'{"a":1,}', b"{'a': 1}", b"\xff\xfe{}"),
    *("{}".encode(code) for code in ("utf-16", "utf-32", "utf-8-sig")),
    *(b"\x00", b'{"\x00": 1}', b'{"prompt": "\x00"}', b'{"prompt": "\xed\xa0\x80"}', b"\xf5"),
    *(b"[" * 100_000, b'{"a":' * 100_000, b"[" * DEEP + b"]" * DEEP, b"9" * 10_000, b'"' * 9),
    b'{"prompt": "x", "prompt": 5}',
    b'{"messages": [{"role": "user", "content": "' + b"x" * 300_000 + b'"}]}',
    b"{" + b",".join(b'"k%d":0' % i for i in range(20_000)) + b"}",
)


def cases(document: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Path and body of each case, in an order that mixes nothing."""
    for path, good in GOOD.items():
        for body in BODIES:
            yield path, body
        for name in (*fields_of(document, path), "\\u0000", "\\ud800", "zzz"):
            rest = [f'"{key}": {json.dumps(v)}' for key, v in good.items() if key != name]
            for value in HOSTILE:
                yield path, _body([*rest, f'"{name}": {value}'])
        for form in INSIDE.get(path, ()):
            for value in HOSTILE:
                yield path, _body([form % value, '"temperature": 0'])


def fields_of(document: dict[str, Any], path: str) -> list[str]:
    body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    name = body["schema"]["$ref"].rsplit("/", 1)[1]
    return list(document["components"]["schemas"][name]["properties"])


def _body(fields: list[str]) -> bytes:
    return ("{" + ", ".join(fields) + "}").encode()


def complaint(status: int, text: str, seconds: float, most_seconds: float) -> str | None:
    """What is wrong with an answer to a hostile request, None if nothing is."""
    if seconds > most_seconds:
        return f"took {seconds:.1f} s"
    if status >= 500:
        return f"status {status}: {text[:200]}"
    if status >= 400:
        error = json.loads(text)["error"]
        if set(error) != {"message", "type", "param", "code"} or len(error["message"]) > 500:
            return f"an error in another form: {text[:200]}"
        if "Traceback" in text or 'File "' in text or ".py" in error["message"]:
            return f"tells of our insides: {text[:200]}"
    return None


def run_schemathesis(url: str, report: Path, key: str, *options: str) -> dict[str, Any]:
    """Its report on the server at `url` (which ends with /openapi.json), as JSON.

    `positive_data_acceptance` is left out: what fields say together (a prompt that fits the model,
    stream_options only with stream) is more than a schema can.
    """
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", url]
    command += ["--header", f"Authorization: Bearer {key}", "--continue-on-failure", "--no-color"]
    command += ["--checks", "all", "--exclude-checks", "positive_data_acceptance,ignored_auth"]
    command += ["--generation-allow-x00", "true", "--generation-database", "none"]
    command += ["--report-json-path", str(report), *options]
    done = subprocess.run(
        command, cwd=report.parent, capture_output=True, text=True, env=os.environ, timeout=1800
    )
    found = json.loads(report.read_text()) if report.exists() else {}
    return {"returncode": done.returncode, "output": done.stdout + done.stderr, "report": found}
