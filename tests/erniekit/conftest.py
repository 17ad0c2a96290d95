"""Tiny models with a tokenizer, and small data files, made once."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import ernie
from ernie.models import TINY
from ernie.tokenizer import Tokenizer
from tests.helpers_tokenizer import sentencepiece_folder
from tests.helpers_vision import vl_folder, vl_marks


def write_lines(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def dialogues(count: int, salt: str = "") -> list[dict]:
    """Short dialogues of different lengths."""
    return [
        {"src": [f"What is {salt}{i}?"], "tgt": ["It is " + "one and " * (i % 7) + f"{i}."]}
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A function from "tiny-dense", "tiny-moe" or "tiny-vl" to a folder with a random model."""
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        path = root / name
        if not path.exists():
            has_vision = TINY[name].vision_config is not None
            (vl_folder if has_vision else sentencepiece_folder)(path)
            tokenizer = Tokenizer.from_folder(path)
            marks: dict[str, Any] = vl_marks(tokenizer) if has_vision else {}
            config = dataclasses.replace(TINY[name], vocab_size=tokenizer.vocab_size, **marks)
            model = ernie.ErnieModel(config, dtype=torch.float32)
            model.init_weights(seed=1)
            model.tokenizer = tokenizer
            ernie.save(model, path)
        return path

    return folder


@pytest.fixture(scope="session")
def grouped(tiny, tmp_path_factory) -> Path:
    """A folder with "tiny-moe" that takes 4 of its 8 experts, which can be grouped by that."""
    path = tmp_path_factory.mktemp("grouped") / "tiny-moe"
    shutil.copytree(tiny("tiny-moe"), path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"moe_k": 4}))
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder with train.jsonl and eval.jsonl."""
    root = tmp_path_factory.mktemp("data")
    write_lines(root / "train.jsonl", dialogues(40))
    write_lines(root / "eval.jsonl", dialogues(8, salt="about "))
    return root


def preferences(count: int, salt: str = "") -> list[dict]:
    """Plain answers are preferred to the same ones with more words around them."""
    return [
        {
            "src": [f"What is {salt}{i}?"],
            "tgt": [],
            "response": [f"It is {i}.", f"Well, now. It is {'one and ' * (i % 5)}{i}. I hope so."],
            "sort": [1, 0],
        }
        for i in range(count)
    ]


def judgements(count: int, salt: str = "") -> list[dict]:
    """The same answers, one of them a record."""
    return [
        {
            "src": record["src"],
            "tgt": [],
            "response": record["response"][i % 2],
            "label": i % 2 == 0,
        }
        for i, record in enumerate(preferences(count, salt))
    ]
