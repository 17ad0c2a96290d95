"""Requests that nobody means well: hostile values in every field, bodies that are hardly JSON.

Made from the server's own OpenAPI document, so a new field is attacked without a new line here.
"""

from __future__ import annotations

import base64
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

# Where pictures are taken from: no name that resolves, and one picture that can be read.
DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
PNG = base64.b64decode(DOT)
WIDE = PNG[:16] + b"\x00\x01\x00\x00" * 2 + PNG[24:]  # says that it has 2**32 pixels


def png_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


URLS = (
    *("data:", "data:,", "data:image/png", "data:image/png;base64,", "data:image/png;base64,%00"),
    *("data:;base64,!!!!", "data:image/png;base64," + "A" * 300_000, "data:text/html,<script>"),
    *(png_url(WIDE), png_url(PNG[:40]), png_url(PNG + PNG), png_url(b"GIF89a" + b"\xff" * 99)),
    *("data:image/svg+xml,<svg/>", png_url(b"%!PS-Adobe-3.0 EPSF-3.0\n"), png_url(b"\x00" * 9000)),
    *("file:///etc/passwd", "file:///dev/zero", "/dev/zero", "../../etc/passwd", "file://x/y"),
    *("http://127.0.0.1:1/", "http://[::1]:1/", "http://0:1/", "http://2130706433:1/", "http://["),
    *("http://169.254.169.254/latest/meta-data/", "http://[::ffff:10.0.0.1]/", "https://10.0.0.1/"),
    *("http://127.0.0.1:99999/", "http://user:pw@127.0.0.1/", "http://\u202ex/", "http://a b/"),
    *("http:", "http://", "ftp://x/y", "javascript:alert(1)", "x" * 100_000, DOT, png_url(PNG)),
)

USER = {"role": "user", "content": "x"}
# A request of each kind that is served, quickly; a hostile value replaces or joins one field.
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [USER], "max_tokens": 2},
    "/v1/completions": {"prompt": "x", "max_tokens": 2},
    "/v1/chat/completions/render": {"messages": [USER]},
    "/v1/responses": {"input": "x", "max_output_tokens": 2},
    "/v1/messages": {"messages": [USER], "max_tokens": 2},
    "/v1/messages/count_tokens": {"messages": [USER]},
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
    "/v1/messages": (
        '"max_tokens": 2, "messages": [%s]',
        '"max_tokens": 2, "messages": [{"role": "user", "content": %s}]',
        '"max_tokens": 2, "messages": [{"role": "user", "content": [{"type": %s}]}]',
        '"max_tokens": 2, "messages": [{"role": "assistant", "content": [%s]}]',
        '"max_tokens": 2, "messages": [], "system": [%s]',
        '"max_tokens": 2, "messages": [], "tools": [{"name": "f", "input_schema": %s}]',
    ),
}
# A picture for each way in which one can be sent: bodies around parts, and parts around a value.
_BLOCK = '{"type": "image", "source": {"type": "base64", "media_type": %s, "data": %s}}'
_CHAT = ('"max_tokens": 2, "messages": [{"role": "user", "content": [%s]}]',)
_RESPONSES = (
    '"max_output_tokens": 2, "input": [{"role": "user", "content": [%s]}]',
    '"max_output_tokens": 2, "input": [{"role": "user", "content": [%s]}, {"role": "user", '
    '"content": "x"}], "truncation": "auto"',
    '"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}, '
    '{"type": "function_call_output", "call_id": "a", "output": [%s]}], "max_output_tokens": 2',
)
_MESSAGES = (
    *_CHAT,
    '"max_tokens": 2, "messages": [{"role": "user", "content": "x"}, {"role": "assistant", '
    '"content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}, {"role": "user", '
    '"content": [{"type": "tool_result", "tool_use_id": "a", "content": [%s]}]}]',
)
_BLOCKS = (
    _BLOCK % ('"image/png"', "%s"),
    _BLOCK % ("%s", json.dumps(DOT)),
    '{"type": "image", "source": %s}',
    '{"type": "image", "source": {"type": "url", "url": %s}}',
    '{"type": "image", "source": {"type": %s, "url": "data:,"}}',
)
PICTURES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "/v1/chat/completions": (
        _CHAT,
        (
            '{"type": "image_url", "image_url": {"url": %s}}',
            '{"type": "image_url", "image_url": %s}',
            '{"type": "video_url", "video_url": {"url": %s}}',
        ),
    ),
    "/v1/responses": (
        _RESPONSES,
        (
            '{"type": "input_image", "image_url": %s}',
            '{"type": "input_image", "image_url": "data:,", "detail": %s}',
            '{"type": "input_image", "file_id": %s}',
        ),
    ),
    "/v1/messages": (_MESSAGES, _BLOCKS),
    "/v1/messages/count_tokens": (('"messages": [{"role": "user", "content": [%s]}]',), _BLOCKS),
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
    yield from picture_cases()


def picture_cases() -> Iterator[tuple[str, bytes]]:
    """Those about pictures alone, of which there are more to a server whose model reads them."""
    for path, (bodies, parts) in PICTURES.items():
        for body in bodies:
            for part in parts:
                for value in (*HOSTILE, *map(json.dumps, URLS)):
                    yield path, _body([body % (part % value)])
            for part in (parts[0] % json.dumps(png_url(PNG)), '{"type": "x"}'):
                for many in (17, 3000):
                    yield path, _body([body % ", ".join([part] * many)])


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
