"""Decode steps that are padded to recorded sizes give what unpadded ones give."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ernie.fused import fuse
from ernie.model import ErnieModel
from ernie.models import TINY
from ernie.settings import ConfigError
from fastdeploy.config import EngineConfig
from fastdeploy.engine.core import Engine
from fastdeploy.engine.graphs import graph_sizes, program_sizes
from fastdeploy.sampling import SamplingParams

PROMPTS = ([5], [8, 9, 10], list(range(3, 25)), [40, 41], [7] * 9)


def engine_of(name: str, device: str = "cpu", **settings) -> Engine:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = ErnieModel(TINY[name], dtype=dtype, device=device)
    model.init_weights(seed=1, std=0.2)
    config = EngineConfig(
        model="", max_model_len=64, max_num_seqs=5, block_size=8, num_gpu_blocks_override=60,
        **settings,
    )  # fmt: skip
    config = config.resolved(max_positions=64, device_type=device)
    return Engine(fuse(model), config)


def tokens_of(engine: Engine) -> dict[str, list[int]]:
    """Texts that begin together and end one after the other, so that batches of all sizes occur."""
    found: dict[str, list[int]] = {}
    for i, prompt in enumerate(PROMPTS):
        engine.add(str(i), prompt, SamplingParams(temperature=0, max_tokens=4 + 3 * i))
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request_id, []).append(output.token)
    return found


def as_it_is(forward, batch):
    """In place of a recording: runs the padded step when it is replayed."""
    return lambda: forward(batch)


def unrecorded(name: str) -> Engine:
    engine = engine_of(name)
    engine.runner.graphs = None
    return engine


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
def test_programs_choose_the_same_tokens(name):
    engine = engine_of(name)  # the MoE's heads are of a width that cannot be recorded
    assert tokens_of(engine) == tokens_of(unrecorded(name))
    assert engine.runner.graphs is not None
    assert engine.runner.graphs.replays.keys() == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
def test_padded_decode_steps_choose_the_same_tokens(name):
    engine, sizes = engine_of(name), []
    graphs = engine.runner.record_decoding(as_it_is, graph_sizes(5))
    graphs.record_all()
    for size, replay in graphs.replays.items():
        graphs.replays[size] = lambda size=size, replay=replay: (sizes.append(size), replay())[1]
    assert tokens_of(engine) == tokens_of(unrecorded(name))
    assert set(sizes) == {1, 2, 4, 5}, "every size was to be used, with padding and without"


def test_padding_stores_nothing():
    engine = engine_of("tiny-dense")
    engine.runner.record_decoding(as_it_is, graph_sizes(5))
    cache = engine.runner.cache
    engine.add("a", [4, 5, 6], SamplingParams(temperature=0, max_tokens=9))
    for text in ("b", "c"):
        engine.add(text, [9, 8], SamplingParams(temperature=0, max_tokens=2))
    for _ in range(3):
        engine.step()
    before = cache.keys_LBPGr.clone()
    engine.step()  # one text is left
    changed = (before.nan_to_num() != cache.keys_LBPGr.nan_to_num()).flatten(3).any(-1)
    assert int(changed.any(0).sum()) == 1, "a step of one text writes one slot"


def test_sizes_reach_the_largest_batch():
    assert graph_sizes(1) == [1]
    assert graph_sizes(8) == [1, 2, 4, 8]
    assert graph_sizes(50) == [1, 2, 4, 8, 16, 32, 48, 50]
    assert program_sizes(3) == [1, 2, 3]


def test_graphs_need_one_gpu():
    config = EngineConfig(model="", max_model_len=64)
    assert config.resolved(max_positions=64, device_type="cpu").use_cudagraph is False
    assert config.resolved(max_positions=64, device_type="cuda").use_cudagraph is True
    shared = dataclasses.replace(config, tensor_parallel_size=2)
    assert shared.resolved(max_positions=64, device_type="cuda").use_cudagraph is False
    asked = dataclasses.replace(config, use_cudagraph=True)
    with pytest.raises(ConfigError, match="use_cudagraph needs one GPU, this is cpu"):
        asked.resolved(max_positions=64, device_type="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
def test_recorded_decode_steps_choose_the_same_tokens(name):
    recorded = tokens_of(engine_of(name, "cuda"))
    assert recorded == tokens_of(engine_of(name, "cuda", use_cudagraph=False))
