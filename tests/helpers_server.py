"""The server for tests: the published command as a process, and the app in this one."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from fastdeploy.config import EngineConfig, ServerConfig
from fastdeploy.server.app import create_app
from fastdeploy.server.engine_process import EngineProcess
from fastdeploy.server.link import EngineEnd
from fastdeploy.server.supervisor import Child

MAX_LEN = 256


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen
    url: str
    greeting: list[str]


def start_server(
    folder: Path, *flags: str, max_len: int = MAX_LEN, environment: Mapping[str, str] = {}
) -> Server:
    """The published command as a process; returns when it says where it listens."""
    command = [sys.executable, "-m", "fastdeploy.entrypoints.openai.api_server"]
    command += ["--model", str(folder), "--port", "0", "--dtype", "float32"]
    command += ["--max-model-len", str(max_len), "--block-size", "8", *flags]
    paths = [environment.get("PYTHONPATH", ""), *sys.path]
    variables = {**environment, "PYTHONPATH": os.pathsep.join([p for p in paths if p])}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | variables,
    )
    assert process.stdout is not None and process.stderr is not None
    greeting = [process.stdout.readline()]
    if " served at " not in greeting[0]:
        process.kill()
        pytest.fail(f"the server did not start: {greeting[0]}{process.stderr.read()}")
    greeting.append(process.stdout.readline())
    return Server(process, greeting[0].split(" served at ")[1].split()[0], greeting)


def stop_server(server: Server) -> int:
    server.process.send_signal(signal.SIGTERM)
    server.process.communicate(timeout=60)
    return server.process.returncode


class ThreadedEngine:
    """The engine's process as a thread of this one: the same, a second earlier."""

    pid = 0

    def __init__(self, end: socket.socket) -> None:
        self.process, self.status = EngineProcess(EngineEnd(end)), None
        self.end = end
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        self.status = self.process.run()
        self.end.shutdown(socket.SHUT_RDWR)

    def poll(self) -> int | None:
        return self.status

    def kill(self) -> None:
        """A thread cannot be; it ends with its link."""

    def send_signal(self, sig: int) -> None:
        """It takes none."""


def spawn_thread() -> Child:
    ours, theirs = socket.socketpair()
    return Child(ThreadedEngine(theirs), ours)


def wait_until(claim: Callable[[], bool], patience_s: float = 60) -> None:
    deadline = time.monotonic() + patience_s
    while not claim():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


@contextlib.contextmanager
def app_client(
    engine: EngineConfig, server: ServerConfig | None = None, **options: Any
) -> Iterator[TestClient]:
    """A client of an app whose engine is a thread of this process and ready."""
    app = create_app(engine, server or ServerConfig(), spawn_thread)
    with TestClient(app, **options) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        yield client
