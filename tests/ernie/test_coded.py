"""bfloat16 weights in 12 bits: packed, they are what they were to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ernie import kernels
from ernie.kernels import PackedWeight
from ernie.kernels.cpu import build, fused, ops

LANES, UNIT = 16, 64


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def coded_everywhere(monkeypatch):
    """Also where plain words are faster."""
    monkeypatch.setattr(fused, "CODED_ISAS", tuple(build.ISA_FLAGS))


def with_escapes(*shape: int) -> Tensor:
    """Normal weights, among them a few whose high bytes are rare."""
    weight = (torch.randn(shape) / shape[-1] ** 0.5).bfloat16()
    flat = weight.view(-1)
    rare = torch.tensor(
        [1e30, -1e30, 3e-39, -1e-40, -0.0, 2.0**-100, -(2.0**-60)], dtype=torch.bfloat16
    )
    flat[torch.randperm(len(flat))[: len(flat) // 200]] = rare[
        torch.arange(len(flat) // 200) % len(rare)
    ]
    return weight


def is_coded(packed: PackedWeight) -> bool:
    return packed.handle.format == fused.CODED


def unpacked(packed: PackedWeight) -> Tensor:
    """The bits of a coded weight, from its bytes by the description at the top of coded.h."""
    memory, handle = packed.tensors["blocks"].numpy(), packed.handle
    width, groups = handle.width, -(-handle.width // 32)
    num_blocks, size = -(-handle.outputs // LANES), UNIT + groups * 4 * 3 * UNIT
    out = np.zeros((handle.experts, handle.parts, num_blocks * LANES, width), np.uint16)
    for i in range(handle.experts * num_blocks * handle.parts):
        block = memory[i * size : (i + 1) * size]
        table, (count, offset) = block[:16], block[16:32].view(np.int64)
        units = block[UNIT:].reshape(-1, 3, UNIT)
        codes = np.stack((units[:, 2] & 15, units[:, 2] >> 4), 1)
        words = units[:, :2].astype(np.uint16) | table[codes].astype(np.uint16) << 8
        # of three units: which of the two, four rows, columns 0-1 or 2-3, one row, one column
        rows = words.reshape(-1, 2, 4, 2, 4, 2).transpose(2, 4, 0, 1, 3, 5).reshape(LANES, -1)
        rows = rows[:, :width].copy()
        escapes = memory[i * size + offset :][: count * 8].view(np.uint32).reshape(-1, 2)
        assert not rows[escapes[:, 0] % LANES, escapes[:, 0] // LANES].any()
        rows[escapes[:, 0] % LANES, escapes[:, 0] // LANES] = escapes[:, 1] >> 16
        expert, rest = divmod(i, num_blocks * handle.parts)
        b, part = divmod(rest, handle.parts)
        out[expert, part, b * LANES : (b + 1) * LANES] = rows
    bits = out[:, :, : handle.outputs].reshape(packed.shape)
    return torch.from_numpy(bits.view(np.int16))


def test_every_value_comes_back_to_the_bit(isa, monkeypatch):
    monkeypatch.setattr(fused, "MOST_ESCAPES", 1)
    all_values = torch.arange(1 << 16).to(torch.int16)[torch.randperm(1 << 16)]
    for shape in ((64, 1024), (1, 65536), (65536, 1), (4, 256, 64)):
        weight = all_values.view(shape).view(torch.bfloat16)
        packed = ops.pack(weight)
        assert is_coded(packed)
        assert torch.equal(unpacked(packed), weight.view(torch.int16)), shape


def test_weights_of_all_shapes_come_back_to_the_bit(isa):
    for shape, parts in (((17, 33), 1), (((100, 576)), 2), ((3, 66, 200), 2), ((3, 5, 40), 1)):
        weight = with_escapes(*shape)
        packed = ops.pack(weight, parts=parts)
        assert is_coded(packed)
        assert torch.equal(unpacked(packed), weight.view(torch.int16)), shape


def test_products_with_escapes_equal_the_reference(isa):
    for outputs, width in ((17, 33), (100, 576), (64, 8192)):
        weight = with_escapes(outputs, width).nan_to_num()
        weight[weight.abs() > 1e20] = 300  # or nothing beside them would count
        packed = ops.pack(weight)
        assert is_coded(packed)
        whole = torch.randn(40, width)
        product = ops.project(whole, packed)
        wanted = (whole.double() @ weight.double().T).float()
        error = ((product - wanted).norm() / wanted.norm()).item()
        assert error < 3e-6, (outputs, width, error)
        for rows in (1, 2, 3, 4, 5, 8, 9, 20):
            some = ops.project(whole[3 : 3 + rows], packed)
            assert torch.equal(some, product[3 : 3 + rows]), f"{rows} rows of {outputs} outputs"


def test_one_weight_that_is_not_finite_spoils_its_output_alone(isa):
    weight = with_escapes(40, 128)
    x = torch.randn(3, 128)
    wanted = ops.project(x, ops.pack(weight))
    weight[7, 5], weight[20, 100] = float("nan"), float("inf")
    packed = ops.pack(weight)
    assert is_coded(packed)
    found = ops.project(x, packed)
    assert found[:, 7].isnan().all() and found[:, 20].isinf().all()
    others = [i for i in range(40) if i not in (7, 20)]
    assert torch.equal(found[:, others], wanted[:, others])


def test_an_expert_keeps_its_escapes(isa):
    weight = with_escapes(3, 44, 64)
    stacked, x = kernels.pack(weight, parts=2), torch.randn(5, 64)
    assert is_coded(stacked)
    for i in range(3):
        one = kernels.pack(weight[i], parts=2)
        found, wanted = kernels.expert(stacked, i), kernels.project(x, one)
        assert torch.equal(kernels.project(x, found), wanted), f"expert {i}"


def test_weights_are_coded_where_that_is_smaller(isa):
    weight = (torch.randn(256, 1024) / 32).bfloat16()
    assert ops.pack(weight).num_bytes / (2 * weight.numel()) < 0.76
    wild = (torch.randn(100, 576) * torch.randn(100, 576).mul(15).exp()).bfloat16()
    plain = ops.pack(wild)
    assert not is_coded(plain) and plain.num_bytes == 2 * 112 * 576
    x = torch.randn(9, 576)
    wanted = x.double() @ wild.double().T
    for rows in (1, 2, 3, 4, 9):
        found = ops.project(x[:rows], plain)
        error = ((found - wanted[:rows]).norm() / wanted[:rows].norm()).item()
        assert error < 1e-6, (rows, error)
