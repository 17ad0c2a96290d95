"""A tiny model folder with a real tokenizer, and a server that serves it."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import helpers_tokenizer

import ernie
from ernie.model import ErnieModel
from ernie.models import TINY
from fastdeploy import LLM

ROOT = Path(__file__).parents[2]
MAX_LEN = 256


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random dense model in float32 with a SentencePiece tokenizer of ERNIE's kind."""
    path = helpers_tokenizer.sentencepiece_folder(tmp_path_factory.mktemp("models") / "tiny")
    size = ernie.Tokenizer.from_folder(path).vocab_size
    model = ErnieModel(
        dataclasses.replace(TINY["tiny-dense"], vocab_size=size), dtype=torch.float32
    )
    model.init_weights(seed=3, std=0.3)
    ernie.save(model, path)
    return path


@pytest.fixture(scope="session")
def llm(folder: Path) -> LLM:
    return LLM(
        str(folder), dtype="float32", max_model_len=MAX_LEN, block_size=8, enable_logprob=True
    )


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen
    url: str
    greeting: list[str]


def start_server(folder: Path, *flags: str) -> Server:
    """The published command as a process; returns when it says where it listens."""
    command = [sys.executable, "-m", "fastdeploy.entrypoints.openai.api_server"]
    command += ["--model", str(folder), "--port", "0", "--dtype", "float32"]
    command += ["--max-model-len", str(MAX_LEN), "--block-size", "8", *flags]
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


@pytest.fixture(scope="session")
def server(folder: Path) -> Iterator[Server]:
    running = start_server(folder, "--enable-logprob", "--max-num-seqs", "4")
    yield running
    assert stop_server(running) == 0
