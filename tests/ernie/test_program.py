"""A recorded program gives, with new inputs, the bits that running the function again gives."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ernie import kernels
from ernie.fused import fuse
from ernie.kernels.cpu.program import NotRecordable, record
from ernie.model import ErnieModel
from ernie.models import TINY
from ernie.quant.scheme import read_scheme
from fastdeploy.engine.batch import Batch
from fastdeploy.engine.cache import KVCache, PagedAttend

pytestmark = pytest.mark.skipif(not kernels.is_compiled("cpu"), reason="no compiled kernels here")


@pytest.mark.parametrize("scheme", [None, "wint8", "wint4"])
@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
def test_a_decode_step_replayed_with_new_inputs_gives_the_same_bits(name, scheme):
    config = dataclasses.replace(TINY[name], head_dim=16)  # a width that the kernels take
    model = ErnieModel(config, dtype=torch.float32)
    model.init_weights(seed=1, std=0.2)
    fuse(model, scheme and read_scheme(scheme, has_experts=name == "tiny-moe"))
    cache = KVCache.allocate(model.config, 6, 4, torch.float32, torch.device("cpu"))
    inputs = Batch(
        token_ids_T=torch.tensor([5, 6]),
        positions_T=torch.tensor([0, 0]),
        slots_T=torch.tensor([0, 8]),
        cu_seqlens_S1=torch.tensor([0, 1, 2], dtype=torch.int32),
        lens_S=torch.tensor([1, 1], dtype=torch.int32),
        tables_SM=torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
        rows_R=torch.tensor([0, 1]),
        adapters=None,
    )

    def step():
        hidden_TD = model.hidden(inputs.token_ids_T, inputs.positions_T, PagedAttend(cache, inputs))
        return model.head(hidden_TD)

    with torch.inference_mode():
        recorded, program = record(step)
        for position in range(1, 7):
            inputs.token_ids_T.add_(position)
            inputs.positions_T.add_(1)
            inputs.slots_T.add_(1)
            inputs.lens_S.add_(1)
            program.run()
            replayed = recorded.clone()
            assert torch.equal(replayed, step()), f"position {position}"


@pytest.fixture(params=[2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_threads_that_stay_together_give_the_same_bits_every_time(threads):
    up, down = kernels.pack(torch.randn(2048, 512), parts=2), kernels.pack(torch.randn(512, 1024))
    square = kernels.pack(kernels.quantize(torch.randn(512, 512), 8))
    x, norm = torch.randn(2, 512), (torch.ones(512), 1e-5)

    def function():
        y = x
        for _ in range(6):
            y = kernels.project(kernels.mlp(y, up, down, norm=norm), square, norm=norm)
        return y

    with torch.inference_mode():
        result, program = record(function)
        for _ in range(30):
            x.normal_()
            program.run()
            replayed = result.clone()
            assert torch.equal(replayed, function()), f"{threads} threads"


def test_operations_of_torch_between_the_calls_are_done_again():
    weight = kernels.pack(torch.randn(7, 32))
    x = torch.randn(3, 32)

    def function():
        y = kernels.project(x, weight).relu()
        y[0] += 1
        return y[:, :4] @ y[:, 3:].T

    with torch.inference_mode():
        result, program = record(function)
        x.normal_()
        expected = function()
        program.run()
    assert torch.equal(result, expected)


def test_what_python_decides_by_a_value_cannot_be_recorded():
    x = torch.ones(2)
    with pytest.raises(NotRecordable, match="item gives values to Python"):
        record(lambda: x * 2 if x.sum().item() else x)
    with pytest.raises(NotRecordable, match="number to Python"):
        record(lambda: x * 2 if x.sum() else x)
    with pytest.raises(NotRecordable, match="tolist gives values to Python"):
        record(lambda: x + len(x.tolist()))
    with pytest.raises(NotRecordable, match="ernie_quantize is not made to be recorded"):
        record(lambda: kernels.quantize(torch.ones(4, 32), 8))
