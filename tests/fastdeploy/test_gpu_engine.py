"""A whole engine on the kernels of GPUs: there, or in Triton's interpreter instead of the CPU's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="there are no wheels of it for this platform")

from ernie import kernels
from ernie.fused import fuse
from ernie.kernels import dispatch
from ernie.kernels.gpu import sampling
from ernie.model import ErnieModel
from ernie.models import TINY
from fastdeploy.config import EngineConfig
from fastdeploy.engine import runner
from fastdeploy.engine.loading import make_engine
from fastdeploy.sampling import SamplingParams
from tests.helpers_triton import make_products_placeless

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.gpu if ON_GPU else []
PROMPT, OTHER = [5, 9, 4, 30, 7, 7, 31, 2, 11], [8, 40, 3]
DRAWN = {"temperature": 0.9, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.3, "seed": 3}


@pytest.fixture
def by_gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    caches = (dispatch._modules, dispatch._chosen)
    if not ON_GPU:
        make_products_placeless(monkeypatch)
        monkeypatch.setattr(sampling, "CHUNK", 256)
        monkeypatch.setitem(dispatch.BACKENDS, "cpu", ("ernie.kernels.gpu.ops",))
        # Programs of the CPU are made of the CPU's kernels.
        monkeypatch.setattr(runner, "program_shapes", lambda *most: [(1, 1)])
    for cached in caches:
        cached.cache_clear()
    yield
    kernels.batch_invariant(False)
    monkeypatch.undo()
    for cached in caches:
        cached.cache_clear()


def answers(texts: list[list[int]], params: dict, **settings) -> tuple[list[list[int]], list]:
    """Tokens of each text, and the raw logits before the first one's."""
    model = ErnieModel(TINY["tiny-dense"], dtype=torch.float32, device=DEVICE)
    model.init_weights(seed=1, std=0.3)
    config = EngineConfig(
        model="", max_model_len=32, max_num_seqs=3, block_size=4, num_gpu_blocks_override=30,
        use_cudagraph=False if ON_GPU else None, **settings,
    )  # fmt: skip
    config = config.resolved(max_positions=64, device_type=DEVICE)
    engine, seen, found = make_engine(fuse(model), config), [], {}
    engine.runner.graphs = None
    sample = engine.sampler.__call__

    def spy(logits_RV, parts, masks):
        if parts[0].request.id == "0" and parts[0].chooses:
            seen.append(logits_RV[parts[0].num_logits - 1].clone())
        return sample(logits_RV, parts, masks)

    engine.sampler = spy
    for i, text in enumerate(texts):
        engine.add(str(i), text, SamplingParams(max_tokens=2, **params))
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request_id, []).append(output.token)
    return [found[str(i)] for i in range(len(texts))], seen


@pytest.fixture(scope="module")
def by_the_cpu() -> list[list[int]]:
    return answers([PROMPT, OTHER], DRAWN)[0]


@pytest.mark.skipif(ON_GPU, reason="compares with the CPU's engine")
def test_gpu_kernels_draw_the_tokens_of_the_cpu(by_the_cpu, by_gpu_kernels) -> None:
    assert answers([PROMPT, OTHER], DRAWN)[0] == by_the_cpu


def test_batch_invariant_engine_gives_the_same_bits(by_gpu_kernels) -> None:
    kernels.batch_invariant(True, DEVICE)
    (alone,), expected = answers([PROMPT], {"temperature": 0})
    beside, found = answers([PROMPT, OTHER], {"temperature": 0}, max_num_batched_tokens=4)
    assert beside[0] == alone
    for own, other in zip(found, expected, strict=True):
        assert torch.equal(own, other), float((own - other).abs().max())
