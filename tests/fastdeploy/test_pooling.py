"""Vectors from the engine equal those of a plain forward, however the prompts are scheduled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ernie
from ernie.attention import packed_causal
from ernie.model import ErnieModel
from fastdeploy import LLM, SamplingParams
from fastdeploy.engine.request import Order
from fastdeploy.errors import RequestError
from fastdeploy.vectors import cosine, shaped

SHARED = [(7 * i + 3) % 97 for i in range(24)]
PROMPTS = [[5], SHARED[:16], SHARED, [*SHARED, 11, 12], [9] * 40, SHARED[:17]]
ENOUGH = {"block_size": 8, "num_gpu_blocks_override": 100, "max_num_seqs": 4}
ROWS: dict[str, dict[str, Any]] = {
    "whole prompts": {"block_size": 8},
    "chunks of 5": {**ENOUGH, "max_num_batched_tokens": 5},
    "little room": {**ENOUGH, "num_gpu_blocks_override": 13, "max_num_batched_tokens": 30},
    "no prefix cache": {**ENOUGH, "enable_prefix_caching": False},
    "n-gram drafts beside": {
        **ENOUGH,
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3},
    },
}


@pytest.fixture(scope="module")
def plain(folder: Path) -> ErnieModel:
    return ernie.load(folder, dtype=torch.float32)


@torch.inference_mode()
def expected(model: ErnieModel, ids: list[int], pooling: str) -> torch.Tensor:
    """The definition: one forward over the whole prompt, norm, then mean or last."""
    cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
    hidden = model.hidden(torch.tensor(ids), torch.arange(len(ids)), packed_causal(cu_seqlens))
    states = model.model.norm(hidden)
    return states.mean(0) if pooling == "mean" else states[-1]


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_equal_a_plain_forward(
    folder: Path, plain: ErnieModel, name: str, pooling: str
) -> None:
    llm = LLM(str(folder), dtype="float32", max_model_len=64, **ROWS[name])
    for round_ in range(2):  # the second one finds the first one's blocks
        vectors = llm.embed(PROMPTS, pooling=pooling, normalize=False)
        for ids, vector in zip(PROMPTS, vectors):
            difference = (torch.tensor(vector) - expected(plain, ids, pooling)).abs().max()
            assert difference < 2e-4, f"round {round_}, {len(ids)} tokens: off by {difference:.2e}"
    assert llm.engine.scheduler.running == [] and llm.engine.requests == {}
    llm.engine.scheduler.check()
    hits = llm.engine.stats().num_hit_tokens
    assert (hits > 0) == (pooling == "last" and name != "no prefix cache"), f"{hits} hits"


def test_texts_and_vectors_in_one_engine(folder: Path, plain: ErnieModel) -> None:
    """Preemptions are forced while texts grow beside; neither kind disturbs the other."""
    llm = LLM(
        str(folder),
        dtype="float32",
        max_model_len=64,
        block_size=4,
        num_gpu_blocks_override=20,
        max_num_seqs=6,
        max_num_batched_tokens=9,
    )
    greedy = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    alone = llm.generate(PROMPTS[1], greedy)[0].outputs.token_ids
    engine = llm.engine
    for i in range(2):
        engine.add(f"text {i}", PROMPTS[1], greedy)
    for i, ids in enumerate(PROMPTS):
        order = Order(priority=i % 2 * -1)
        engine.add(f"vector {i}", ids, SamplingParams(pooling="mean"), order)
    texts: dict[str, list[int]] = {}
    vectors = {}
    while engine.has_work:
        for output in engine.step():
            if output.vector is not None:
                vectors[output.request_id] = output.vector
            else:
                assert output.token is not None
                texts.setdefault(output.request_id, []).append(output.token)
        engine.scheduler.check()
    assert engine.stats().num_preemptions > 0
    assert texts == {"text 0": alone, "text 1": alone}
    for i, ids in enumerate(PROMPTS):
        difference = torch.tensor(vectors[f"vector {i}"]) - expected(plain, ids, "mean")
        assert difference.abs().max() < 2e-4, f"prompt {i}: {difference.abs().max():.2e}"


def test_vectors_are_cut_and_then_scaled(llm: LLM) -> None:
    (whole,) = llm.embed("Hello", normalize=False)
    (cut,) = llm.embed("Hello", dimensions=5)
    assert cut == pytest.approx(shaped(whole[:5], None, True)) and len(cut) == 5
    assert cosine(cut, cut) == pytest.approx(1) and cosine([1, 0], [0, 2]) == 0
    assert shaped([0.0, 0.0], None, True) == [0.0, 0.0]
    with pytest.raises(RequestError, match=f"this model's vectors have {len(whole)}"):
        llm.embed("Hello", dimensions=len(whole) + 1)
    with pytest.raises(RequestError, match=r"use LLM\.embed"):
        llm.generate("Hello", SamplingParams(pooling="last"))
    with pytest.raises(RequestError, match="use mean or last"):
        llm.embed("Hello", pooling="max")
    with pytest.raises(RequestError, match="pooling=None; use mean or last"):
        llm.embed("Hello", pooling=None)
