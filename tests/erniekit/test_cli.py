"""The command line: what the system refuses, a dialogue with a server that fails, ways to start."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from erniekit import serve
from erniekit.cli import main
from erniekit.config import run_from
from tests.helpers_faults import forked_runs

ROOT = Path(__file__).parents[2]


def refused(number: int, path: str | None = "some/file") -> OSError:
    return OSError(number, os.strerror(number), *([path] if path else []))


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (refused(errno.EACCES), 2, "some/file: Permission denied; change its permissions, or"),
        (refused(errno.EROFS), 2, "some/file: Read-only file system; give a path on a disk that"),
        (refused(errno.ENOENT), 2, "some/file: No such file or directory; give a path that exists"),
        (refused(errno.ELOOP), 2, "give another path"),
        (refused(errno.ENOSPC), 3, "some/file: No space left on device; make room and start again"),
        (refused(errno.EDQUOT, None), 3, "; make room and start again"),
        (refused(errno.EACCES, None), 2, ": Permission denied; change its permissions"),
    ],
    ids=str,
)
def test_what_the_system_refuses_is_one_sentence(error, status, told, monkeypatch, capsys) -> None:
    def run(words: list[str]) -> int:
        raise error

    monkeypatch.setattr("erniekit.convert.run_quantize", run)
    assert main(["quantize", "a", "b"]) == status
    shown = capsys.readouterr().err
    assert shown.startswith("erniekit quantize: ") and told in shown and shown.count("\n") == 1


@pytest.mark.parametrize(
    "error", [OSError("no number"), refused(errno.ENOTCONN, None), refused(errno.EBADF, None)]
)
def test_errors_that_are_no_matter_of_files_keep_their_traceback(error, monkeypatch) -> None:
    def run(words: list[str]) -> int:
        raise error

    monkeypatch.setattr("erniekit.convert.run_quantize", run)
    with pytest.raises(OSError) as raised:
        main(["quantize", "a", "b"])
    assert raised.value is error


def test_a_full_disk_ends_every_verb_with_3(tiny, tmp_path: Path) -> None:
    model = str(tiny("tiny-dense"))
    with forked_runs() as runs:
        for name, words in {
            "quantize": [model, str(tmp_path / "q")],
            "merge": [model, model, str(tmp_path / "m")],
            "export-gguf": [model, str(tmp_path / "x.gguf")],
        }.items():
            ended = runs.run([name, *words], tmp_path, at=3, fault="full")
            assert ended.status == 3 and "Traceback" not in ended.told, ended.told
            assert "No space left on device; make room and start again" in ended.told


@contextmanager
def scripted(*replies: str) -> Iterator[tuple[int, list[list[str]]]]:
    """The port of a server of these replies, one a request, and what it was asked: `loading`,
    `broken` off in the middle, `failed` there, or an answer.
    """
    left, asked = list(replies), []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append([message["content"] for message in body["messages"]])
            reply = left.pop(0)
            if reply == "loading":
                error = {"error": {"message": "the model\nis loading", "code": 503}}
                self.answer(503, "application/json", json.dumps(error))
                return
            events = [{"choices": [{"index": 0, "delta": {"content": reply}}]}]
            if reply == "failed":
                events.append({"error": {"message": "the engine is gone"}})
            lines = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
            self.answer(200, "text/event-stream", lines, missing=9 * (reply == "broken"))

        def answer(self, status: int, kind: str, text: str, missing: int = 0) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(text) + missing))
            self.end_headers()
            self.wfile.write(text.encode())
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port, asked
        server.shutdown()


def test_a_dialogue_goes_on_after_what_the_server_refuses(monkeypatch, capsys) -> None:
    typed = b"a\nb\nc\nd\n\xff\ne\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
    with scripted("loading", "one", "broken", "failed", "two") as (port, asked):
        assert main(["chat", f"port={port}"]) == 0
    refused, *broken, unsent = [line for line in capsys.readouterr().err.splitlines() if line]
    assert refused == "the server refused: the model is loading"
    assert broken[0].startswith("the server broke off (") and broken[0].endswith("when it is back")
    assert broken[1:] == ["the server broke off: the engine is gone"]
    assert unsent.startswith("not sent, for it is not UTF-8 text")
    assert asked == [["a"], ["b"], ["b", "one", "c"], ["b", "one", "d"], ["b", "one", "e"]]


def test_commands_to_copy_are_quoted(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"erniekit export \S+=BASE 'output_dir=.*'"):
        serve.served_model(run_from({"output_dir": str(folder)}))


@pytest.mark.parametrize("package", ["erniekit", "fastdeploy"])
def test_a_package_is_a_command_that_ctrl_c_ends_quietly(package: str) -> None:
    command = [sys.executable, "-m", package]
    done = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage: " in done.stdout
    code = (  # the first import of the command line is where Ctrl-C arrives
        "import importlib.abc, runpy, sys\n"
        "class Interrupted(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == '{package}.cli': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        f"runpy.run_module('{package}', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr == ""
