"""Hosts that are not as one would wish: few files, no IPv6, no home, a clock that jumps."""

from __future__ import annotations

import errno
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest
from helpers_server import start_server, stop_server

from ernie.settings import ConfigError
from fastdeploy.config import ServerConfig
from fastdeploy.server.listener import _bound_socket

# An hour ahead and an hour behind, in turns, from the first look at the clock on.
JUMPING_CLOCK = """
import itertools, time
real, jumps = time.time, itertools.cycle((3600, -3600))
time.time = lambda: real() + next(jumps)
"""


def test_too_few_open_files_are_refused_with_the_remedy(folder: Path) -> None:
    command = [sys.executable, "-m", "fastdeploy.entrypoints.openai.api_server"]
    limited = ["sh", "-c", 'ulimit -n 256 && exec "$@"', "sh", *command]
    done = subprocess.run(
        [*limited, "--model", str(folder), "--port", "0", "--max-concurrency", "300"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 2, done.stderr
    assert "the limit is 256; raise it (ulimit -n), or use max_concurrency=" in done.stderr


def test_a_host_without_ipv6_is_told_so(monkeypatch) -> None:
    def refused(family: int, *_: int) -> None:
        assert family == socket.AF_INET6
        raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")

    monkeypatch.setattr(socket, "socket", refused)
    with pytest.raises(ConfigError, match="::1 port 8000: Address family not supported"):
        _bound_socket(ServerConfig(host="::1", port=8000))


def test_it_serves_without_a_home_and_while_the_clock_jumps(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(JUMPING_CLOCK)
    server = start_server(
        folder,
        "--timeout",
        "30",
        environment={
            "HOME": "/proc/no-home",
            "XDG_CACHE_HOME": "/proc/no-cache",
            "PYTHONPATH": str(tmp_path),
        },
    )
    try:
        client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
        asked = {"model": "x", "prompt": "Hello", "max_tokens": 16, "temperature": 0}
        asked |= {"extra_body": {"ignore_eos": True}}
        text = client.completions.create(**asked).choices[0].text
        events = list(client.completions.create(**asked, stream=True))
        assert "".join(c.text for event in events for c in event.choices) == text
        assert events[-1].choices[0].finish_reason == "length"
        stamps = {client.completions.create(**asked).created for _ in range(4)}
        assert max(stamps) - min(stamps) > 3600, "the clock did not jump"
        metrics = httpx.get(server.url.removesuffix("/v1") + "/metrics").text
        seconds = [
            float(line.rpartition(" ")[2])
            for line in metrics.splitlines()
            if "_seconds_sum" in line.partition("{")[0]
        ]
        assert seconds and all(0 <= s < 60 for s in seconds), seconds
    finally:
        assert stop_server(server) == 0
