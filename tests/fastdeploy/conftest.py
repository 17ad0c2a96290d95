"""A tiny model folder with a real tokenizer, and a server that serves it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "faults"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import helpers_tokenizer
from helpers_server import MAX_LEN, Server, start_server, stop_server

from fastdeploy import LLM


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random dense model in float32 with a SentencePiece tokenizer of ERNIE's kind."""
    return helpers_tokenizer.random_model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def llm(folder: Path) -> LLM:
    return LLM(
        str(folder), dtype="float32", max_model_len=MAX_LEN, block_size=8, enable_logprob=True
    )


@pytest.fixture(scope="session")
def server(folder: Path) -> Iterator[Server]:
    running = start_server(folder, "--enable-logprob", "--max-num-seqs", "4")
    yield running
    assert stop_server(running) == 0
