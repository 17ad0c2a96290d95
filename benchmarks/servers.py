"""A real server as a process, and clients that do little more than read: for benchmarks of serving.

`Stream` collects the bytes of an answer and looks at them only when it is over, so that the client
takes as little as it can of the processors that are measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import ROOT


@dataclass
class Server:
    process: subprocess.Popen
    host: str
    port: int

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of a GET."""
        try:
            with urllib.request.urlopen(f"http://{self.host}:{self.port}{path}", timeout=10) as got:
                return got.status, got.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        text = self.get("/metrics")[1].decode()
        return sum(
            float(n) for n in re.findall(rf"^fastdeploy:{name}(?:{{.*}})? (.*)$", text, re.M)
        )

    @property
    def is_ready(self) -> bool:
        return self.get("/ready")[0] == 200

    @property
    def engine_pid(self) -> int | None:
        """The process of the engine, found as the server's child."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children else None

    @property
    def num_sockets(self) -> int:
        """Sockets that the API process has open."""
        folder = f"/proc/{self.process.pid}/fd"
        names = [os.path.join(folder, name) for name in os.listdir(folder)]
        return sum(os.readlink(name).startswith("socket:") for name in names)

    def rss_mib(self, pid: int | None = None) -> float:
        """Memory of the API process, or of another one."""
        status = Path(f"/proc/{pid or self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s*(\d+)", status)[0]) / 1024

    def wait_until_ready(self, patience_s: float = 60) -> float:
        """Seconds until /ready says 200."""
        began = time.monotonic()
        while not self.is_ready:
            assert time.monotonic() - began < patience_s, "the server is not ready again"
            time.sleep(0.02)
        return time.monotonic() - began


@contextlib.contextmanager
def serving(model: str | Path, *flags: str, log: Any = None) -> Iterator[Server]:
    """The published command on a free port, ready; stopped at the end, which must be in order."""
    command = [sys.executable, "-m", "fastdeploy.entrypoints.openai.api_server"]
    command += ["--model", str(model), "--port", "0", *flags]
    path = os.pathsep.join([str(ROOT), *(p for p in sys.path if p)])
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://([\d.]+):(\d+)/", process.stdout.readline())
        if not found:
            raise SystemExit(f"the server did not start: {_end_of(log)}")
        yield Server(process, found[1], int(found[2]))
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        finally:
            process.kill()
    assert process.returncode == 0, f"the server ended with status {process.returncode}"


def _end_of(log: Any) -> str:
    return "see above" if log is None else Path(log.name).read_text()[-2000:]


@dataclass
class Stream:
    """One streamed completion, as it came."""

    data: bytearray = field(default_factory=bytearray)
    began: float = 0.0
    first: float | None = None  # when the first token came
    ended: float | None = None
    broke: bool = False  # the connection was cut

    @property
    def status(self) -> int:
        return int(self.data.split(b" ", 2)[1]) if self.data else 0

    @property
    def events(self) -> list[dict[str, Any]]:
        lines = re.findall(rb"^data: (\{.*\})\r?$", self.data, re.M)
        return [json.loads(line) for line in lines]

    @property
    def token_ids(self) -> list[int]:
        """Needs `return_token_ids`."""
        choices = [event["choices"][0] for event in self.events if event.get("choices")]
        return [token for choice in choices for token in choice.get("completion_token_ids", ())]

    @property
    def has_error(self) -> bool:
        return any("error" in event for event in self.events) or self.status >= 500

    @property
    def is_whole(self) -> bool:
        return b"data: [DONE]" in self.data and not self.has_error


def request_of(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode(
    ) + content  # fmt: skip


async def streamed(server: Server, body: dict[str, Any], into: Stream | None = None) -> Stream:
    """Send a completion and read what comes until the connection ends."""
    stream = Stream() if into is None else into
    reader, writer = await asyncio.open_connection(server.host, server.port)
    stream.began = time.monotonic()
    try:
        writer.write(request_of({"stream": True, **body}))
        while data := await reader.read(65536):
            if stream.first is None and b"data: " in data:
                stream.first = time.monotonic()
            stream.data += data
    except ConnectionError:
        stream.broke = True
    finally:
        stream.ended = time.monotonic()
        writer.close()
    return stream
