"""The published server command as a process, for tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

MAX_LEN = 256


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen
    url: str
    greeting: list[str]


def start_server(folder: Path, *flags: str, max_len: int = MAX_LEN) -> Server:
    """The published command as a process; returns when it says where it listens."""
    command = [sys.executable, "-m", "fastdeploy.entrypoints.openai.api_server"]
    command += ["--model", str(folder), "--port", "0", "--dtype", "float32"]
    command += ["--max-model-len", str(max_len), "--block-size", "8", *flags]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([p for p in sys.path if p])}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
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
    server.process.communicate(timeout=20)
    return server.process.returncode
