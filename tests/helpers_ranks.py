"""Networks whose sizes two processes can share, and two processes that share one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

import ernie
from ernie.model import ErnieModel
from ernie.models import TINY
from fastdeploy.config import EngineConfig
from fastdeploy.engine.loading import start_ranks
from fastdeploy.engine.ranks import Ranks

EVEN = {
    "even-dense": replace(TINY["tiny-dense"], vocab_size=200, num_nextn_predict_layers=1),
    "even-moe": replace(
        TINY["tiny-moe"], num_attention_heads=6, num_key_value_heads=2, vocab_size=212
    ),
    "even-vl": replace(
        TINY["tiny-vl"],
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=212,
        num_nextn_predict_layers=1,
    ),
}


@contextlib.contextmanager
def two_ranks(model: ErnieModel, folder: Path) -> Iterator[tuple[Ranks, ErnieModel]]:
    """Two processes that share a model, which is saved in `folder`, and this one's slice."""
    ernie.save(model, folder)
    config = EngineConfig(model=str(folder), dtype="float32", tensor_parallel_size=2)
    part, ranks = start_ranks(config, torch.device("cpu"))
    try:
        yield ranks, part
    finally:
        ranks.stop()
