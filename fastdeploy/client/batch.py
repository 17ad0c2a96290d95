"""`fastdeploy run-batch -i in.jsonl -o out.jsonl`: OpenAI's batch files, on a server or an engine.

A line asks: `{"custom_id", "method": "POST", "url": "/v1/chat/completions", "body"}`; a line of the
output answers: `{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}`.
Lines come out as they get done. Every line of the input has one in the output, whatever happens to
it; only failures of the server itself (no answer, 429, 5xx) are tried again first.

Answers collect in `out.jsonl.part`, each written whole and kept if this process dies: the same
command goes on where it was. The file gets its name when all are there.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ernie.settings import ConfigError, check_bounds, option, required
from fastdeploy.client.command import read
from fastdeploy.client.http import Client, ServerError

URLS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
)
SHORT = {"-i": "--input-file", "-o": "--output-file"}
MOST_WAIT_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Where the lines come from and where they go."""

    input_file: str = required("File of requests, one a line (also -i).")
    output_file: str = required("File for the answers (also -o).")
    base_url: str | None = option(None, "Address of a server; none: one is run for this batch.")
    api_key: str | None = option(None, "Key; none: FD_API_KEY of the environment.")
    model: str | None = option(None, "Model to serve, without base_url.")
    serve_flags: str = option("", "Flags of that server, as `fastdeploy serve` takes them.")
    max_concurrency: int = option(64, "Requests at the same time at most.", least=1)
    max_tries: int = option(
        4, "How often a request is sent that the server fails to answer.", least=1
    )

    def __post_init__(self) -> None:
        if (self.base_url is None) == (self.model is None):
            raise ConfigError(
                "give one of base_url (a server that runs) and model (one is started)"
            )
        check_bounds(self)


def main(argv: Sequence[str]) -> int:
    (batch,) = read(argv, [Batch], "fastdeploy run-batch", __doc__.splitlines()[0], SHORT)
    lines = read_lines(Path(batch.input_file))
    if batch.base_url is not None:
        return _report(asyncio.run(run(batch, lines, batch.base_url)), batch)
    with started_server(str(batch.model), batch.serve_flags.split()) as address:
        return _report(asyncio.run(run(batch, lines, address)), batch)


def _report(failed: int, batch: Batch) -> int:
    sys.stderr.write(f"{batch.output_file} is complete; {failed} requests failed\n")
    return 1 if failed else 0


def read_lines(path: Path) -> list[tuple[str, Any]]:
    """`(custom_id, the line's object or an error's text)`, in order.

    Raises ConfigError for what makes answers ambiguous: a line without a custom_id, or with that of
    an earlier one.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    lines: dict[str, Any] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name = entry["custom_id"]
        except (ValueError, TypeError, KeyError):
            raise ConfigError(
                f"{path}, line {number} is no JSON object with a custom_id; mend or remove it"
            ) from None
        if not isinstance(name, str) or name in lines:
            raise ConfigError(
                f"{path}, line {number}: custom_id={name!r} must be a text of its own"
            )
        lines[name] = entry
    return list(lines.items())


async def run(batch: Batch, lines: list[tuple[str, Any]], address: str) -> int:
    """Answer all lines that have no answer yet; returns how many have failed, of all."""
    output = Path(batch.output_file)
    part = output.with_name(output.name + ".part")
    failed_by_name = _answered(part)
    if unknown := failed_by_name.keys() - {name for name, _ in lines}:
        raise ConfigError(
            f"{part} answers {sorted(unknown)[0]!r}, which {batch.input_file} does not ask: it is "
            "of another run; remove it, or give another output_file"
        )
    missing = [(name, entry) for name, entry in lines if name not in failed_by_name]
    if failed_by_name:
        done = len(lines) - len(missing)
        sys.stderr.write(f"{part} has {done} of {len(lines)} answers; going on\n")
    client = Client(address, batch.api_key)
    queue = iter(missing)
    with part.open("a", encoding="utf-8", errors="backslashreplace") as file:  # as JSON escapes

        async def work() -> None:
            for name, entry in queue:  # shared: each takes the next
                answer = await _answer(client, entry, batch.max_tries)
                _write(file, {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": name, **answer})
                failed_by_name[name] = _is_failed(answer)
                _show_progress(len(failed_by_name), len(lines))

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(batch.max_concurrency, len(missing))):
                    group.create_task(work())
        finally:
            await client.close()
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, output)
    return sum(failed_by_name[name] for name, _ in lines)


def _answered(part: Path) -> dict[str, bool]:
    """Whether each answer in the file is a failure; a last line that was cut off is removed."""
    if not part.exists():
        return {}
    content = part.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with part.open("r+b") as file:
            file.truncate(len(whole))
    answers = [json.loads(line) for line in whole.decode().split("\n") if line]
    return {answer["custom_id"]: _is_failed(answer) for answer in answers}


def _is_failed(answer: dict[str, Any]) -> bool:
    return answer["error"] is not None or answer["response"]["status_code"] >= 400


async def _answer(client: Client, entry: dict[str, Any], max_tries: int) -> dict[str, Any]:
    url, body = entry.get("url"), entry.get("body")
    if entry.get("method", "POST") != "POST" or url not in URLS or not isinstance(body, dict):
        message = f"a line needs method POST, one of the urls {', '.join(URLS)}, and a body"
        return {"response": None, "error": {"code": "invalid_request", "message": message}}
    if body.get("stream"):
        message = "a batch cannot be streamed; leave out stream"
        return {"response": None, "error": {"code": "invalid_request", "message": message}}
    for tries in range(1, max_tries + 1):
        try:
            found = await client.post(url, body)
            return {"response": _response(200, found), "error": None}
        except ServerError as error:
            is_passing = error.status in (0, 429) or error.status >= 500
            if not is_passing or tries == max_tries:
                return _failure(error)
            wait_s = 0.5 * 2**tries if error.retry_after_s is None else error.retry_after_s
        await asyncio.sleep(min(wait_s, MOST_WAIT_S))
    raise AssertionError("the last try returns")


def _failure(error: ServerError) -> dict[str, Any]:
    if error.status == 0:
        return {"response": None, "error": {"code": "no_answer", "message": str(error)}}
    return {"response": _response(error.status, {"error": {"message": str(error)}}), "error": None}


def _response(status: int, body: dict[str, Any]) -> dict[str, Any]:
    return {"status_code": status, "request_id": body.get("id"), "body": body}


def _write(file: TextIO, answer: dict[str, Any]) -> None:
    file.write(json.dumps(answer, ensure_ascii=False) + "\n")
    file.flush()


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{done}/{total} requests" + ("\n" if done == total else ""))


@contextmanager
def started_server(model: str, flags: Sequence[str]) -> Iterator[str]:
    """The address of a server of our own on a free port of loopback. Raises ServerError."""
    command = [sys.executable, "-m", "fastdeploy.entrypoints.openai.api_server", "--model", model]
    command += ["--host", "127.0.0.1", "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        greeting = process.stdout.readline()
        if " served at " not in greeting:
            raise ServerError(f"the server for {model} did not start; its own words are above")
        yield greeting.split(" served at ")[1].split()[0]
    finally:
        process.terminate()
        process.wait()
