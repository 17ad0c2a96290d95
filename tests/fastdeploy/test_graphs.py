"""Decode steps that are padded to recorded shapes give what unpadded ones give."""

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
from fastdeploy.engine.graphs import GPU_PADDING, DecodeGraphs, graph_shapes, program_shapes
from fastdeploy.engine.loading import make_engine
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
    return make_engine(fuse(model), config)


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
    assert engine.runner.graphs.replays.keys() == {(size, size) for size in (1, 2, 3, 4, 5)}


def watched(graphs: DecodeGraphs) -> list[tuple[int, int]]:
    """The shapes of the steps that run from now on, in their order."""
    graphs.record_all()
    shapes: list[tuple[int, int]] = []  # texts and rows
    for shape, replay in graphs.replays.items():
        graphs.replays[shape] = lambda s=shape, replay=replay: (shapes.append(s), replay())[1]
    return shapes


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
def test_padded_decode_steps_choose_the_same_tokens(name):
    engine = engine_of(name)
    graphs = engine.runner.record_decoding(as_it_is, graph_shapes(5, 1), GPU_PADDING)
    shapes = watched(graphs)
    assert tokens_of(engine) == tokens_of(unrecorded(name))
    every = {(size, size) for size in (1, 2, 4, 5)}
    assert set(shapes) == every, "every shape was to be used, with padding and without"


def drafting(engine: Engine, most: int) -> Engine:
    """Guesses of different lengths, right at first and wrong at the end, for some of the texts."""
    wanted = tokens_of(unrecorded("tiny-dense"))

    def guess(schedule) -> None:
        for part in schedule.parts:
            request, done = part.request, part.request.num_output
            count = min(most, request.max_output - done - 1, (done + int(request.id)) % (most + 2))
            if part.chooses and request.id in wanted and count > 0:
                request.draft_ids = [*wanted[request.id][done : done + count - 1], 3]

    engine.drafter = guess
    return engine


@pytest.mark.parametrize("padding", [1, GPU_PADDING, 99])
def test_steps_with_drafts_choose_the_same_tokens(padding):
    """Rows of padding are no text's, whatever lies in the cache where nothing was written."""
    engine = drafting(engine_of("tiny-dense"), 3)
    make = program_shapes if padding == 1 else graph_shapes
    graphs = engine.runner.record_decoding(as_it_is, make(5, 4), padding)
    shapes = watched(graphs)
    steps: list[tuple[int, int]] = []
    run = graphs.run
    graphs.run = lambda batch, shape: (
        steps.append((len(batch.lens_S), len(batch.token_ids_T))),
        run(batch, shape),
    )[1]
    assert tokens_of(engine) == tokens_of(unrecorded("tiny-dense"))
    stats = engine.stats()
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens, f"{stats}"
    padded = {
        (size > texts, rows > tokens)
        for (size, rows), (texts, tokens) in zip(shapes, steps, strict=True)
    }
    uneven = [step for step in steps if step[1] % step[0]]
    assert uneven, f"no step had texts with different numbers of drafts: {steps}"
    if padding == 1:
        assert padded == {(False, False)}
    else:
        assert (True, True) in padded and (False, True) not in padded, f"{padded}"


@pytest.mark.parametrize("method", ["ngram", "mtp"])
def test_programs_with_drafts_choose_the_same_tokens(method):
    name = "tiny-moe" if method == "mtp" else "tiny-dense"
    speculation = {"method": method, "num_speculative_tokens": 3}
    engine = engine_of(name, speculative_config=speculation)
    assert tokens_of(engine) == tokens_of(unrecorded(name))
    assert any(rows > size for size, rows in engine.runner.graphs.replays), "no draft was recorded"


def test_padding_past_the_last_block_reads_nothing_wild():
    """A text at the limit of the model's length, padded by drafts that it has no room for."""
    prompts, found = ([*range(3, 60)], [5]), []
    for engine in (unrecorded("tiny-dense"), engine_of("tiny-dense")):
        if engine.runner.graphs is not None:
            engine.runner.record_decoding(as_it_is, graph_shapes(5, 4), 99).record_all()
            engine.drafter = lambda schedule: [
                part.request.draft_ids.extend([1, 2, 3])
                for part in schedule.parts
                if part.chooses and part.request.id == "1" and part.request.num_output < 5
            ]
        for i, prompt in enumerate(prompts):
            engine.add(str(i), prompt, SamplingParams(temperature=0, max_tokens=7, ignore_eos=True))
        tokens = {}
        while engine.has_work:
            for output in engine.step():
                tokens.setdefault(output.request_id, []).append(output.token)
        found.append(tokens)
    assert found[0] == found[1]


def test_padding_stores_nothing():
    engine = engine_of("tiny-dense")
    engine.runner.record_decoding(as_it_is, graph_shapes(5, 1), GPU_PADDING)
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


def test_shapes_reach_the_largest_batch():
    assert graph_shapes(1, 1) == [(1, 1)]
    plain = [(size, size) for size in (1, 2, 4, 8)]
    assert graph_shapes(8, 3) == [*plain, (2, 3), (3, 6), (5, 12), (9, 24)]
    assert [size for size, _ in graph_shapes(50, 1)] == [1, 2, 4, 8, 16, 32, 48, 50]
    assert program_shapes(3, 1) == [(1, 1), (2, 2), (3, 3)]
    assert program_shapes(2, 3) == [(1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (2, 4), (2, 5), (2, 6)]
    assert max(rows for _, rows in program_shapes(64, 20)) == 16


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
@pytest.mark.parametrize("speculation", [None, {"method": "ngram", "num_speculative_tokens": 3}])
def test_recorded_decode_steps_choose_the_same_tokens(name, speculation):
    recorded = tokens_of(engine_of(name, "cuda", speculative_config=speculation))
    plain = engine_of(name, "cuda", speculative_config=speculation, use_cudagraph=False)
    assert recorded == tokens_of(plain)
