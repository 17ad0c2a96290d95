"""The command line of the server, and what may be imported without what."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from importlib import metadata

import httpx
import pytest
from helpers_server import start_server

from fastdeploy import cli

HEAVY = ("torch", "fastapi", "uvicorn", "pydantic", "prometheus_client", "starlette", "openai")


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_the_engine_imports_without_web_libraries() -> None:
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in HEAVY if name != "torch")
    done = run(
        f"import sys; {blocked}; import importlib, pkgutil, fastdeploy, fastdeploy.engine as e\n"
        "names = [m.name for m in pkgutil.iter_modules(e.__path__)]\n"
        "assert 'core' in names and 'loading' in names\n"
        "for name in names: importlib.import_module('fastdeploy.engine.' + name)\n"
        "fastdeploy.LLM, fastdeploy.SamplingParams"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", ["cli.main(['serve', '--help'])", "cli.main(['--help'])"])
def test_help_needs_no_torch(verb: str) -> None:
    done = run(
        "import sys\nfrom fastdeploy import cli\n"
        f"try: {verb}\nexcept SystemExit: pass\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not loaded, loaded"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "/no/such/model"], "/no/such/model"),
        ([], "model is not set"),
        (["--modle", "x"], "unknown flag '--modle'; did you mean '--model'?"),
        (["--model", "x", "--max-modl-len", "5"], "did you mean '--max-model-len'?"),
        (["--model", "x", "--port", "99999"], "port=99999 is not a port"),
        (["--model", "x", "--port", "http"], "port='http'"),
        (["--model", "x", "--host", "0.0.0.0"], "give an api_key"),
        (["--model", "x", "--port"], "--port has no value"),
        (["--model", "x", "--port", "1", "--port", "2"], "--port is given twice"),
        (["--model", "x", "-tp", "two"], "tensor_parallel_size='two'"),
        (["--model", "x", "-tp", "2", "--tensor-parallel-size=2"], "parallel-size is given twice"),
        (["x", "--trust-remote-code"], "no code from a model's folder"),
        (["x", "--metrics-port", "8001"], "/metrics is on the port of the API"),
        (["x", "--workers=4"], "HTTP takes one process"),
        (["--model", "x", "--swap-space=4"], "swap_space='4'"),
        (["--model", "x", "--enable-expert-parallel"], "enable_expert_parallel=True"),
        (["--model", "x", "stray"], "--model is given twice"),
        (["--config", "/no/such.yaml"], "there is no file /no/such.yaml"),
    ],
)
def test_a_wrong_start_is_one_sentence_and_exit_code_2(capsys, monkeypatch, flags, message) -> None:
    monkeypatch.delenv("FD_API_KEY", raising=False)
    assert cli.main(["serve", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error


def test_a_port_that_is_taken(capsys, folder) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", "--model", str(folder), "--port", port]) == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err


def test_the_version_is_that_of_the_project(capsys) -> None:
    for words in (["--version"], ["version"]):
        assert cli.main(words) == 0
        assert capsys.readouterr().out == f"fastdeploy {cli.version()}\n"
    assert cli.version() == metadata.version("ernie-open")
    assert cli.main(["collect-env", "--help"]) == 0
    assert "usage: fastdeploy collect-env" in capsys.readouterr().out


def test_an_unknown_command_is_told_the_known_one(capsys) -> None:
    assert cli.main(["serv"]) == 2
    assert "did you mean 'serve'" in capsys.readouterr().err


def test_a_guarded_server_as_its_flags_describe_it(folder, tmp_path) -> None:
    """Keys, names, quota, ids and JSON lines, through the command that users type."""
    (tmp_path / "keys").write_text("# two\nalice\nbob\n")
    (tmp_path / "serve.yaml").write_text(
        f"api_key_file: {tmp_path / 'keys'}\nserved_model_name: [big, small]\n"
        "max-tokens-per-request: 20\nlog_format: json\nenable_log_requests: true\n"
    )
    running = start_server(folder, "--config", str(tmp_path / "serve.yaml"), "--access-log")
    prompt = {"prompt": "my secret plan", "max_tokens": 5, "ignore_eos": True}
    try:
        with httpx.Client(base_url=running.url, timeout=30) as client:
            assert client.get("/models").status_code == 401
            client.headers["authorization"] = "Bearer bob"
            assert [card["id"] for card in client.get("/models").json()["data"]] == ["big", "small"]
            for model, status in (("big", 200), ("small", 200), ("other", 404)):
                answer = client.post(
                    "/completions",
                    json=prompt | {"model": model},
                    headers={"x-request-id": f"id-{model}"},
                )
                assert answer.status_code == status, answer.text
                assert answer.headers["x-request-id"] == f"id-{model}"
            refused = client.post("/completions", json=prompt | {"model": "big", "n": 5})
            assert refused.status_code == 400
            assert "asks for 25 tokens" in refused.json()["error"]["message"]
    finally:
        running.process.terminate()
        _, log = running.process.communicate(timeout=20)
    assert running.process.returncode == 0
    entries = [json.loads(line) for line in log.splitlines()]
    about = [entry["message"] for entry in entries if entry.get("request_id") == "id-small"]
    text, http = about
    assert "| 5 generated | length | started" in text and "POST /v1/completions 200" in http
    for secret in ("secret", "alice", "bob"):
        assert secret not in log
