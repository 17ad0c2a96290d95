"""The fused operations of serving against their definition in `ernie.kernels.reference`, on each
instruction set found here, and what they promise about bits."""

from __future__ import annotations

import itertools

import pytest
import torch

from ernie import kernels
from ernie.kernels import reference
from ernie.kernels.cpu import build, ops
from tests.helpers_isa import forget, isas_found

BF16, F32 = torch.bfloat16, torch.float32
FORMATS = ("float32", "bfloat16", "int8", "int6", "int4")
ROWS = (1, 2, 3, 5, 7, 16, 33, 130)
# Widths and outputs, odd ones among them.
SHAPES = ((32, 16), (48, 17), (64, 48), (96, 100), (200, 17), (576, 100), (1024, 48), (33, 5))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def a_weight(name: str, *shape: int):
    """A weight as `pack` takes it, of one of FORMATS."""
    weight = torch.randn(shape) / shape[-1] ** 0.5
    if name.startswith("int"):
        return reference.quantize(weight, int(name.removeprefix("int")))
    return weight.to(getattr(torch, name))


def both_packed(name: str, *shape: int, parts: int = 1):
    weight = a_weight(name, *shape)
    return ops.pack(weight, parts=parts), reference.pack(weight, parts=parts)


def rms_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative to the size of what is wanted: a value of x at the border between two integers may
    be rounded either way."""
    return (
        ((found.double() - wanted.double()).square().mean() / wanted.square().mean()).sqrt().item()
    )


def limit(name: str) -> float:
    return 2e-3 if name.startswith("int") else 2e-6


@pytest.mark.parametrize("name", FORMATS)
def test_project_equals_reference(isa, name):
    for (width, outputs), rows in itertools.product(SHAPES, ROWS):
        ours, theirs = both_packed(name, outputs, width)
        x = torch.randn(rows, width)
        found, wanted = ops.project(x, ours), reference.project(x, theirs)
        assert rms_error(found, wanted) < 2e-6, (width, outputs, rows, rms_error(found, wanted))


@pytest.mark.parametrize("name", FORMATS)
def test_project_with_all_parts_equals_reference(isa, name):
    for rows, parts, norm_dtype in ((1, 1, F32), (3, 2, BF16), (40, 3, F32)):
        width, outputs = 200, 48 * parts - 3 * parts
        ours, theirs = both_packed(name, outputs, width, parts=parts)
        x, bias = torch.randn(rows, 2 * width)[:, 5 : width + 5], torch.randn(outputs)
        options = {
            "norm": (torch.randn(width).to(norm_dtype), 1e-5),
            "residual_TO": torch.randn(rows, outputs + 1)[:, 1:],
        }
        found = ops.project(x, ours, bias, **options)
        wanted = reference.project(x, theirs, bias, **options)
        assert rms_error(found, wanted) < limit(name), (rows, parts, rms_error(found, wanted))


@pytest.mark.parametrize("name", FORMATS)
def test_mlp_equals_reference(isa, name):
    for rows, width, inner in ((1, 64, 48), (2, 100, 33), (17, 576, 160), (130, 64, 200)):
        gate_up, ref_gate_up = both_packed(name, 2 * inner, width, parts=2)
        down, ref_down = both_packed(name, width, inner)
        x = torch.randn(rows, width)
        for options in (
            {},
            {"norm": (torch.randn(width), 1e-5), "residual_TD": torch.randn(rows, width)},
        ):
            found = ops.mlp(x, gate_up, down, **options)
            wanted = reference.mlp(x, ref_gate_up, ref_down, **options)
            assert rms_error(found, wanted) < limit(name), (rows, width, rms_error(found, wanted))


def a_moe(name: str, shared_name: str | None, experts: int, width: int, inner: int):
    """The arguments of `moe` behind x, for us and for the reference."""
    router, bias = torch.randn(experts, width) / width**0.5, torch.rand(experts) / experts
    bias[0] = -1  # never chosen
    gate_up, down = (
        both_packed(name, experts, 2 * inner, width, parts=2),
        both_packed(name, experts, width, inner),
    )
    shared = (None, None)
    if shared_name:
        shared_gate_up = both_packed(shared_name, 4 * inner, width, parts=2)
        shared = tuple(zip(shared_gate_up, both_packed(shared_name, width, 2 * inner)))
    return [(router, bias, gate_up[i], down[i], shared[i]) for i in range(2)]


@pytest.mark.parametrize(
    ("name", "shared_name"),
    [*((f, f) for f in FORMATS), ("int4", "int8"), ("int4", None), ("bfloat16", "int8")],
)
def test_moe_equals_reference(isa, name, shared_name):
    for rows, width, inner in ((1, 64, 32), (2, 96, 20), (3, 200, 48), (70, 64, 48)):
        ours, theirs = a_moe(name, shared_name, 9, width, inner)
        x = torch.randn(rows, width)
        options = {"top_k": 3, "norm_min": 1e-12}
        if rows != 2:
            options |= {
                "norm": (torch.rand(width) + 0.5, 1e-5),
                "residual_TD": torch.randn(rows, width),
            }
        found = ops.moe(x, *ours, **options)
        wanted = reference.moe(x, *theirs, **options)
        error = rms_error(found, wanted)
        assert error < (2e-6 if name == shared_name == "float32" else limit("int8")), (rows, error)


def test_moe_takes_the_smaller_index_among_equals(isa):
    ours, theirs = a_moe("float32", None, 6, 64, 32)
    router, bias = torch.zeros_like(ours[0]), torch.zeros(6)
    x = torch.randn(4, 64)
    found = ops.moe(x, router, bias, *ours[2:], top_k=2, norm_min=1e-12)
    wanted = reference.moe(x, router, bias, *theirs[2:], top_k=2, norm_min=1e-12)
    assert rms_error(found, wanted) < 2e-6, rms_error(found, wanted)


def calls(name: str):
    """Every fused operation over the rows of an x of width 192."""
    width, inner = 192, 80
    norm = (torch.rand(width) + 0.5, 1e-5)
    wide, bias = ops.pack(a_weight(name, 260, width)), torch.randn(260)
    gate_up, down = (
        ops.pack(a_weight(name, 2 * inner, width), parts=2),
        ops.pack(a_weight(name, width, inner)),
    )
    experts = a_moe(name, name, 7, width, 48)[0]
    return {
        "project": lambda x: ops.project(x, wide, bias, norm=norm),
        "mlp": lambda x: ops.mlp(x, gate_up, down, norm=norm, residual_TD=x),
        "moe": lambda x: ops.moe(x, *experts, top_k=2, norm_min=1e-12, norm=norm, residual_TD=x),
    }


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_does_not_depend_on_the_rows_beside_it(isa, name):
    x = torch.randn(300, 192)
    for operation, call in calls(name).items():
        whole = call(x)
        for first, count in ((0, 1), (7, 1), (2, 2), (100, 3), (40, 8), (5, 33), (150, 150)):
            some = call(x[first : first + count])
            different = (some != whole[first : first + count]).sum().item()
            assert not different, f"{operation}: {different} values of {count} rows"


@pytest.mark.parametrize("name", FORMATS)
def test_threads_do_not_change_bits(isa, name):
    threads = torch.get_num_threads()
    try:
        for operation, call in calls(name).items():
            for rows in (1, 5, 300):
                x, outs = torch.randn(rows, 192), []
                for count in (1, 2, 3):
                    torch.set_num_threads(count)
                    outs.append(call(x))
                assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2]), operation
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_quantize_equals_reference(isa, bits, dtype):
    for shape in ((5, 16), (17, 33), (3, 20, 96), (64, 1024)):
        weight = torch.randn(shape).to(dtype)
        weight[..., 1, :] = 0
        weight[..., 2, :32] = 0
        found, wanted = ops.quantize(weight, bits), reference.quantize(weight, bits)
        assert found.shape == wanted.shape and found.data.dtype == wanted.data.dtype
        assert found.data.shape == wanted.data.shape
        # The best of two scales that are as good as each other depends on the order of a sum.
        same = (found.integers() == wanted.integers()).float().mean().item()
        assert same > (0.99999 if bits == 8 else 0.998), (shape, same)
        errors = [(q.dequantized() - weight.float()).square().mean() for q in (found, wanted)]
        assert abs(errors[0] / errors[1] - 1) < 1e-4, (shape, errors)


def test_every_integer_comes_through(isa):
    """Rows that pick out one column each, of weights with all integers of a format."""
    width = 256
    for bits in (8, 6, 4):
        least = -(2 ** (bits - 1))
        data = torch.arange(least, -least).to(torch.int8).repeat(20, width // -least // 2)
        scales = None
        if bits == 4:
            data = torch.arange(width // 2).repeat(20, 1).mul(2).add(1).to(torch.uint8)
        if bits != 8:
            scales = (
                torch.arange(-80, 80)
                .view(20, 8)
                .mul(127)
                .div(80, rounding_mode="trunc")
                .to(torch.int8)
            )
        weight = kernels.QuantTensor(bits, data, torch.rand(20) + 0.5, scales, width)
        found = ops.project(torch.eye(width), ops.pack(weight))
        wanted = weight.dequantized().T
        error = (found - wanted).abs().max().item() / wanted.abs().max().item()
        assert error < 1e-6, (bits, error)


@pytest.mark.parametrize("name", ["int8", "int6", "int4"])
def test_largest_sums_do_not_overflow(isa, name):
    width = 512
    for sign in (1, -1):
        if name == "int8":
            data, scales = torch.full((16, width), sign * -128).to(torch.int8), None
        elif name == "int6":
            data = torch.full((16, width), -32 if sign == 1 else 31).to(torch.int8)
            scales = torch.full((16, width // 32), -127, dtype=torch.int8)
        else:
            data = torch.full((16, width // 2), 0 if sign == 1 else 255, dtype=torch.uint8)
            scales = torch.full((16, width // 32), -127, dtype=torch.int8)
        weight = kernels.QuantTensor(int(name[3:]), data, torch.ones(16), scales, width)
        for x in (torch.ones(5, width), -torch.ones(5, width)):
            found, wanted = ops.project(x, ops.pack(weight)), x @ weight.dequantized().T
            assert torch.allclose(found, wanted, rtol=1e-6), (found - wanted).abs().max()


@pytest.mark.parametrize("name", FORMATS)
def test_not_finite_rows_stay_so_and_spoil_no_other(isa, name):
    weight = ops.pack(a_weight(name, 40, 128))
    x = torch.randn(4, 128)
    wanted = ops.project(x, weight)
    x[1, 70], x[2, 3] = float("nan"), float("inf")
    found = ops.project(x, weight)
    assert not found[1].isfinite().any() and not found[2].isfinite().any()
    assert torch.equal(found[[0, 3]], wanted[[0, 3]])


@pytest.mark.parametrize("name", ["bfloat16", "int4"])
def test_bfloat16_rows_give_bfloat16(isa, name):
    gate_up, ref_gate_up = both_packed(name, 64, 96, parts=2)
    down, ref_down = both_packed(name, 96, 32)
    x = torch.randn(3, 96, dtype=BF16)
    found, wanted = ops.mlp(x, gate_up, down), reference.mlp(x, ref_gate_up, ref_down)
    assert found.dtype == BF16 and rms_error(found, wanted) < 2e-2, rms_error(found, wanted)


def test_no_rows_give_no_rows(isa):
    weight = ops.pack(a_weight("int4", 32, 64))
    assert ops.project(torch.randn(0, 64), weight).shape == (0, 32)
    experts = a_moe("int8", "int8", 4, 64, 32)[0]
    assert ops.moe(torch.randn(0, 64), *experts, top_k=2, norm_min=1e-12).shape == (0, 64)


def test_instruction_sets_agree_on_integers(monkeypatch):
    """Integers are summed exactly, so only the order of 16 float sums may differ."""
    x, weights = torch.randn(9, 320), [a_weight(name, 80, 320) for name in ("int8", "int4")]
    outs = []
    for name in isas_found():
        monkeypatch.setenv("ERNIE_CPU_ISA", name)
        forget()
        if not ops.available():
            outs.append(torch.cat([ops.project(x, ops.pack(w)) for w in weights]))
    forget()
    for out in outs[1:]:
        assert rms_error(out, outs[0]) < 3e-7, rms_error(out, outs[0])


def test_pack_gives_what_a_product_reads():
    build.library()
    weight = a_weight("int4", 96, 1024)
    packed = kernels.pack(weight)
    assert packed.shape == (96, 1024) and packed.format == "int4"
    assert 1 <= packed.num_bytes / weight.num_bytes < 1.01, packed.num_bytes / weight.num_bytes
