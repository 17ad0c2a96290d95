"""`fastdeploy chat` and `complete` as programs before a scripted server, and the small commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers_page import Upstream, running
from helpers_server import Server, wait_until

import ernie
from fastdeploy import cli


@pytest.fixture
def scripted() -> Iterator[tuple[Upstream, str]]:
    upstream = Upstream()
    with running(upstream.app()) as url:
        yield upstream, url


def started(*words: str) -> subprocess.Popen:
    """A command with Ctrl-C as at a terminal, even if whoever runs the tests has it ignored."""
    command = [sys.executable, "-m", "fastdeploy.cli", *words]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    pipe = subprocess.PIPE
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment
        )
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_conversation_remembers_forgets_and_is_saved(scripted, tmp_path: Path) -> None:
    upstream, url = scripted
    upstream.script = [{"reasoning_content": "Hm."}, {"content": "Hi "}, {"content": "there."}]
    saved = tmp_path / "talk.json"
    lines = ["/system Be brief.", "Hello", f"/save {saved}", "Again", "/reset", "New", "/exit"]
    chat = started("chat", "--base-url", url, "--temperature", "0.5")
    out, err = chat.communicate("\n".join(lines) + "\n", timeout=30)
    assert chat.returncode == 0 and err == "", err
    assert out.count("Hm.\n\nHi there.\n") == 3
    contents = [[m["content"] for m in body["messages"]] for body in upstream.bodies]
    first = ["Be brief.", "Hello"]
    assert contents == [first, [*first, "Hi there.", "Again"], ["Be brief.", "New"]]
    assert upstream.bodies[0]["temperature"] == 0.5 and "top_p" not in upstream.bodies[0]
    messages = json.loads(saved.read_text())["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant"]


def test_ctrl_c_ends_the_answer_only(scripted) -> None:
    upstream, url = scripted
    upstream.script = [{"content": "Begun"}, 60.0]
    chat = started("chat", "--base-url", url)
    assert chat.stdin is not None and chat.stdout is not None
    chat.stdin.write("Hello\n")
    chat.stdin.flush()
    seen = ""
    while not seen.endswith("Begun"):
        seen += chat.stdout.read(1)
    chat.send_signal(signal.SIGINT)
    wait_until(lambda: upstream.num_left == 1)
    upstream.script = [{"content": "Fine."}]
    out, err = chat.communicate("And now?\n", timeout=30)
    assert chat.returncode == 0 and "Fine." in out, (out, err)
    said = [m["content"] for m in upstream.bodies[1]["messages"]]
    assert said == ["Hello", "Begun", "And now?"]


def test_a_refusal_is_shown_and_the_question_forgotten(scripted) -> None:
    upstream, url = scripted
    upstream.refusal = (400, "too long")
    chat = started("chat", "--base-url", url)
    _, err = chat.communicate("Hello\nHello again\n", timeout=30)
    assert chat.returncode == 0 and err == "too long\ntoo long\n"
    assert len(upstream.bodies[1]["messages"]) == 1


def test_complete_writes_what_the_server_says(server: Server) -> None:
    flags = ["--base-url", server.url, "--max-tokens", "8", "--temperature", "0"]
    outs = []
    for prompt in ("The quick", "-"):
        program = started("complete", "--prompt", prompt, *flags)
        out, err = program.communicate("The quick", timeout=30)
        assert program.returncode == 0, err
        outs.append(out)
    assert outs[0] == outs[1] != "\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["chat", "--base-url", "http://127.0.0.1:1"], "no server answers at http://127.0.0.1:1"),
        (["complete", "--base-url", "http://x"], "prompt is not set"),
        (["tokenizer", "--model", "/no/such", "--vocab-size"], "/no/such"),
        (["collect-env", "now"], "takes no flags"),
        (["chta"], "did you mean 'chat'?"),
    ],
)
def test_a_mistake_is_said_in_a_sentence(words: list[str], message: str, capsys) -> None:
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err


def test_the_tokenizer_is_shown_at_work(folder: Path, capsys) -> None:
    tokenizer = ernie.Tokenizer.from_folder(folder)
    ids = tokenizer.encode("The quick fox")
    assert cli.main(["tokenizer", "--model", str(folder), "--encode", "The quick fox"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[0]) for line in lines[:-1]] == ids
    assert lines[-1] == f"{len(ids)} tokens"
    words = ",".join(map(str, ids))
    assert cli.main(["tokenizer", "--model", str(folder), "--decode", words]) == 0
    assert capsys.readouterr().out == "The quick fox\n"


def test_the_environment_is_described(capsys) -> None:
    assert cli.main(["collect-env"]) == 0
    out = capsys.readouterr().out
    for name in ("python", "torch", "processors", "cuda"):
        assert f"\n{name} " in f"\n{out}", name
