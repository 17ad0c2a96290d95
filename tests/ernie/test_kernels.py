"""Every kernel against its definition in `ernie.kernels.reference`, on each instruction set found
here."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial

import pytest
import torch

from ernie import kernels
from ernie.kernels import dispatch, reference
from ernie.kernels.cpu import build, ops, products
from tests.helpers_isa import forget

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def fresh():
    """The choices that are made once per process, made anew in the test and after it."""
    forget()
    yield
    forget()


def rand(*shape: int, dtype: torch.dtype = F32, grad: bool = False) -> torch.Tensor:
    return torch.randn(shape).to(dtype).requires_grad_(grad)


def sliced(rows: int, width: int, at: int = 3) -> torch.Tensor:
    """Columns of a wider tensor."""
    return rand(rows, 2 * width + at)[:, at : at + width].requires_grad_()


def with_values(x: torch.Tensor, values: dict[int, float]) -> torch.Tensor:
    """Some columns of all rows but the first."""
    for column, value in values.items():
        x[1:, column] = value
    return x


INFINITIES = {7: float("-inf"), 20_000: float("inf"), 32_999: float("inf")}
NO_NUMBERS = {5: float("inf"), 16_390: float("nan"), 32_998: float("nan")}


def bounds(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def counts(*rows: int) -> torch.Tensor:
    return torch.tensor(rows)


def angles(tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    turn = torch.randn(tokens, width // 2) * 3
    return turn.cos(), turn.sin()


def qkv(tokens: int, heads: int, groups: int, width: int, one_tensor: bool = False) -> tuple:
    if one_tensor:
        wide = rand(tokens, (heads + 2 * groups) * width)
        parts = wide.split([heads * width, groups * width, groups * width], 1)
        return tuple(p.unflatten(1, (-1, width)).detach().requires_grad_() for p in parts)
    return tuple(rand(tokens, n, width, grad=True) for n in (heads, groups, groups))


# Operation and arguments; tensors that require grad have their gradients compared, too.
CASES = {
    "linear one row": lambda: ("linear", rand(1, 96), rand(40, 96, dtype=BF16)),
    "linear odd": lambda: ("linear", rand(7, 77, grad=True), rand(13, 77, grad=True), rand(13)),
    "linear odd bf16": lambda: ("linear", rand(23, 77, grad=True), rand(15, 77, dtype=BF16)),
    "linear bf16 trained": lambda: (
        "linear",
        rand(5, 64, grad=True),
        rand(9, 64, dtype=BF16, grad=True),
        rand(9, dtype=BF16, grad=True),
    ),
    "linear narrow": lambda: ("linear", rand(3, 5), rand(2, 5, dtype=BF16)),
    "linear slice": lambda: ("linear", sliced(9, 128), rand(33, 128)),
    "linear many rows": lambda: ("linear", rand(300, 512, grad=True), rand(70, 512, dtype=BF16)),
    "linear thousand rows": lambda: (
        "linear",
        rand(1000, 48, grad=True),
        rand(70, 48, dtype=BF16),
        rand(70),
    ),
    "linear bf16 rows": lambda: ("linear", rand(4, 64, dtype=BF16), rand(9, 64, dtype=BF16)),
    "linear f16 weight": lambda: ("linear", rand(4, 64), rand(9, 64, dtype=F16)),
    "linear no rows": lambda: ("linear", rand(0, 64, grad=True), rand(9, 64, grad=True)),
    "grouped": lambda: (
        "grouped_linear",
        rand(12, 40, grad=True),
        rand(5, 18, 40, grad=True),
        counts(1, 0, 7, 4, 0),
    ),
    "grouped bf16": lambda: (
        "grouped_linear",
        rand(90, 64, grad=True),
        rand(3, 22, 64, dtype=BF16),
        counts(60, 29, 1),
    ),
    "linear wide": lambda: ("linear", rand(203, 530, grad=True), rand(301, 530, grad=True)),
    "linear tall": lambda: ("linear", rand(1100, 70, grad=True), rand(260, 70, grad=True)),
    "grouped uneven": lambda: (
        "grouped_linear",
        rand(421, 77, grad=True),
        rand(5, 131, 77, grad=True),
        counts(300, 0, 1, 97, 23),
    ),
    "grouped empty": lambda: (
        "grouped_linear",
        rand(0, 16, grad=True),
        rand(2, 8, 16, grad=True),
        counts(0, 0),
    ),
    "rms_norm": lambda: ("rms_norm", rand(70, 100, grad=True), rand(100, grad=True), 1e-5),
    "rms_norm bf16 weight": lambda: (
        "rms_norm",
        rand(3, 64, grad=True),
        rand(64, dtype=BF16),
        1e-5,
    ),
    "rms_norm slice": lambda: ("rms_norm", sliced(5, 33), rand(33, grad=True), 1e-6),
    "rms_norm bf16": lambda: ("rms_norm", rand(5, 33, dtype=BF16), rand(33), 1e-6),
    "rms_norm no rows": lambda: ("rms_norm", rand(0, 33, grad=True), rand(33, grad=True), 1e-6),
    "rows gradient": lambda: ("rows_gradient", sliced(70, 301).detach(), rand(301, 130)),
    "rows gradient bf16": lambda: ("rows_gradient", rand(9, 33, dtype=BF16), rand(33, 40)),
    "rotate": lambda: ("rotate", rand(37, 3, 20, grad=True), *angles(37, 20)),
    "rotate slice": lambda: ("rotate", qkv(9, 4, 2, 16, one_tensor=True)[1], *angles(9, 16)),
    "rotate bf16": lambda: ("rotate", rand(9, 2, 16, dtype=BF16), *angles(9, 16)),
    "rotate halves": lambda: ("rotate_halves", rand(37, 3, 20, grad=True), *angles(37, 20)),
    "rotate halves slice": lambda: (
        "rotate_halves",
        qkv(9, 4, 2, 80, one_tensor=True)[1],
        *angles(9, 80),
    ),
    "quick gelu": lambda: ("quick_gelu", (rand(37, 333) * 3).requires_grad_()),
    "quick gelu many": lambda: ("quick_gelu", rand(90, 1000, grad=True)),
    "quick gelu slice": lambda: ("quick_gelu", sliced(9, 37)),
    "squares": lambda: (
        "squares",
        [rand(3, 5), rand(7, dtype=BF16), rand(0), rand(50, 4001, dtype=BF16), rand(50, 4001)],
    ),
    "argmax": lambda: ("argmax", rand(3, 50_001)),
    "argmax of many": lambda: ("argmax", rand(30, 50_001)),
    "argmax of equals": lambda: ("argmax", rand(9, 40_000).mul_(2).round_()),
    "argmax infinities": lambda: ("argmax", with_values(rand(4, 33_000), INFINITIES)),
    "argmax without numbers": lambda: ("argmax", with_values(rand(4, 33_000), NO_NUMBERS)),
    "argmax slice": lambda: ("argmax", sliced(9, 37).detach()),
    "argmax bf16": lambda: ("argmax", rand(3, 301, dtype=BF16)),
    "swiglu": lambda: ("swiglu", rand(9, 1000, grad=True), rand(9, 1000, grad=True)),
    "swiglu slices": lambda: ("swiglu", sliced(9, 37), sliced(9, 37, at=5)),
    "swiglu large values": lambda: ("swiglu", rand(4, 64) * 100, rand(4, 64)),
    "packed": lambda: ("attend_packed", *qkv(281, 4, 2, 64), bounds(10, 0, 70, 200, 1), 0.125),
    "packed wide group": lambda: ("attend_packed", *qkv(150, 16, 2, 128), bounds(150), 0.09),
    "packed one head each": lambda: ("attend_packed", *qkv(192, 3, 3, 16), bounds(65, 64, 63), 0.3),
    "packed slices": lambda: ("attend_packed", *qkv(40, 6, 2, 32, True), bounds(17, 23), 0.2),
    "packed odd width": lambda: ("attend_packed", *qkv(20, 2, 1, 12), bounds(20), 0.3),
    "packed large scores": lambda: ("attend_packed", *qkv(90, 2, 1, 32), bounds(90), 20.0),
    "frames": lambda: ("attend_whole", *qkv(281, 4, 2, 64), bounds(10, 0, 70, 200, 1), 0.125),
    "frames one head each": lambda: ("attend_whole", *qkv(192, 3, 3, 80), bounds(65, 64, 63), 0.1),
    "frames slices": lambda: ("attend_whole", *qkv(40, 6, 2, 32, True), bounds(17, 23), 0.2),
    "frames odd width": lambda: ("attend_whole", *qkv(20, 2, 1, 12), bounds(7, 13), 0.3),
    "packed empty": lambda: (
        "attend_packed",
        *(t.detach() for t in qkv(0, 2, 1, 32)),
        bounds(0),
        0.2,
    ),
}


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1.6e-2, "atol": 1e-2} if dtype == BF16 else {"rtol": 2e-5, "atol": 5e-5}


def gradients(out: torch.Tensor, args: tuple) -> list[torch.Tensor]:
    wanted = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    if not wanted:
        return []
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return list(torch.autograd.grad(out, wanted, weight))


def function(module, operation: str) -> Callable:
    """`attend_whole` is `attend_packed` where every token sees its whole segment; `rotate_halves`
    is `rotate` of pairs from two halves.
    """
    if operation == "attend_whole":
        return partial(module.attend_packed, causal=False)
    if operation == "rotate_halves":
        return partial(module.rotate, halves=True)
    return getattr(module, operation)


@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_its_definition(case, isa):
    torch.manual_seed(0)
    operation, *args = CASES[case]()
    ours, theirs = (function(module, operation)(*args) for module in (ops, reference))
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, **tolerance(ours.dtype))
    for own, other in zip(gradients(ours, args), gradients(theirs, args)):
        assert own.dtype == other.dtype
        scale = max(1.0, float(other.abs().max())) if other.numel() else 1.0
        torch.testing.assert_close(own / scale, other / scale, **tolerance(own.dtype))


@pytest.mark.parametrize("shape", [(1, 5, 3), (300, 97, 33), (7, 200, 530), (513, 16, 300)])
def test_products_are_added_to_a_sum(shape, isa):
    torch.manual_seed(0)
    num_rows, outputs, width = shape
    left, right, total = sliced(num_rows, outputs), rand(num_rows, width), rand(outputs, width)
    expected = total.clone()
    reference.add_product_(expected, left.detach(), right)
    ops.add_product_(total, left.detach(), right)
    torch.testing.assert_close(total, expected, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("case", CASES)
def test_kernel_repeats_its_bits(case, isa):
    torch.manual_seed(0)
    operation, *args = CASES[case]()
    runs = []
    for _ in range(2):
        out = function(ops, operation)(*args)
        runs.append([out, *gradients(out, args)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("width", [77, 512])
def test_linear_row_does_not_depend_on_other_rows(dtype, width, isa):
    torch.manual_seed(0)
    num_rows = min(200, products.MANY_ROWS[isa] - 1)
    x, weight = rand(num_rows, width), rand(70, width, dtype=dtype)
    whole = ops.linear(x, weight)
    for first, last in ((0, 1), (3, 7), (num_rows // 2, num_rows)):
        assert torch.equal(ops.linear(x[first:last], weight), whole[first:last])
    few = ops.grouped_linear(x[:9], torch.stack([weight, weight]), counts(4, 5))
    assert torch.equal(few, whole[:9])


ADAMW = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("gradient", [F32, BF16])
@pytest.mark.parametrize("moments", [F32, BF16])
def test_adamw_equals_its_definition_bit_for_bit(gradient, moments, isa):
    torch.manual_seed(0)
    start = [rand(10_007), rand(10_007).to(moments) * 0, rand(10_007).to(moments) * 0]
    ours, theirs = ([t.clone() for t in start] for _ in range(2))
    for step in range(1, 6):
        grad = rand(10_007, dtype=gradient) * 0.01
        for module, (parameter, *state) in ((ops, ours), (reference, theirs)):
            update = kernels.AdamWUpdate(**ADAMW, step=step, grad_scale=0.7, seed=12345)
            module.adamw_step(parameter, grad, *state, update)
    for name, own, other in zip(("parameter", "moment", "square"), ours, theirs):
        assert torch.equal(own, other), f"{name}: {(own != other).sum()} of 10007 differ"


@pytest.mark.parametrize("gradient", [F32, BF16])
def test_adamw_of_8_bits_equals_its_definition_bit_for_bit(gradient, isa):
    torch.manual_seed(0)
    start = [rand(10_007), torch.zeros(10_007, dtype=torch.int8)]
    start += [torch.zeros(10_007, dtype=torch.uint8), torch.zeros(2, 40)]
    ours, theirs = ([t.clone() for t in start] for _ in range(2))
    for step in range(1, 6):
        grad = rand(10_007, dtype=gradient) * 0.01
        for module, (parameter, *state) in ((ops, ours), (reference, theirs)):
            update = kernels.AdamWUpdate(**ADAMW, step=step, grad_scale=0.7, seed=12345)
            module.adamw_8bit_step(parameter, grad, *state, update)
    for name, own, other in zip(("parameter", "moment", "square", "scales"), ours, theirs):
        assert torch.equal(own, other), f"{name}: {(own != other).sum()} of 10007 differ"


def test_moments_of_8_bits_are_within_their_bounds_and_right_on_average():
    size, steps = 8192, 1500
    torch.manual_seed(0)
    gradient = rand(size).abs() + 0.1
    state = [torch.zeros(size, dtype=torch.int8), torch.zeros(size, dtype=torch.uint8)]
    parameter, scales = torch.zeros(size), torch.zeros(2, size // 256)
    rates = {**ADAMW, "beta2": 0.999, "learning_rate": 0.0}
    first = kernels.AdamWUpdate(**rates, step=1, seed=3)
    kernels.adamw_8bit_step(parameter, gradient, *state, scales, first)
    for name, codes, scale, exact in zip(
        ("moment", "root"), state, scales, (gradient * 0.1, gradient * 0.001**0.5)
    ):
        gap = ((codes.float().view(-1, 256) * scale[:, None]).flatten() - exact).view(-1, 256)
        worst = (gap.abs().amax(1) / scale).max().item()
        assert worst < 1.001, f"{name} is off by {worst:.4f} of its unit"
    for step in range(2, steps + 1):
        update = kernels.AdamWUpdate(**rates, step=step, seed=3)
        kernels.adamw_8bit_step(parameter, gradient, *state, scales, update)
    roots = (state[1].double().view(-1, 256) * scales[1, :, None]).flatten()
    ratio = float((roots**2).sum() / (gradient.double() ** 2 * (1 - 0.999**steps)).sum())
    assert abs(ratio - 1) < 0.02, f"mean square is {ratio:.4f} of the exact one"


def test_adamw_equals_torch():
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(rand(501))
    ours, moment, square = parameter.detach().clone(), torch.zeros(501), torch.zeros(501)
    peer = torch.optim.AdamW([parameter], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 8):
        parameter.grad = rand(501)
        peer.step()
        update = kernels.AdamWUpdate(**ADAMW, step=step)
        kernels.adamw_step(ours, parameter.grad, moment, square, update)
    torch.testing.assert_close(ours, parameter.detach(), rtol=1e-6, atol=1e-7)


def test_bfloat16_moments_follow_small_updates_on_average():
    # Each update of the square is 1/1000 of its final value: rounding to nearest would stop at a
    # quarter.
    size, steps = 8192, 1500
    parameter, gradient = torch.zeros(size), torch.full((size,), 0.5)
    moment, square = torch.zeros(size, dtype=BF16), torch.zeros(size, dtype=BF16)
    rates = {**ADAMW, "beta2": 0.999, "learning_rate": 0.0}
    for step in range(1, steps + 1):
        update = kernels.AdamWUpdate(**rates, step=step, seed=3)
        kernels.adamw_step(parameter, gradient, moment, square, update)
    exact = 0.25 * (1 - 0.999**steps)
    mean = float(square.double().mean())
    assert abs(mean / exact - 1) < 2e-3, f"mean square {mean}, exact {exact}"


@pytest.mark.parametrize("compiler", ["/nonexistent/c++", "false"])
def test_without_a_compiler_plain_torch_runs_and_one_warning_says_why(
    compiler, monkeypatch, caplog, fresh
):
    monkeypatch.setenv("CXX", compiler)
    x, weight = rand(3, 8), rand(4, 8, dtype=BF16)
    for _ in range(2):
        assert torch.equal(kernels.linear(x, weight), reference.linear(x, weight))
        kernels.swiglu(x, x)
    assert len(caplog.records) == 1
    assert compiler in caplog.text
    assert all("reference" in line and compiler in line for line in kernels.report().values())


def test_report_names_module_and_instruction_set(isa):
    assert kernels.report()["linear"] == f"ernie.kernels.cpu.products [{isa}]"
    assert set(kernels.report()) == set(dispatch.OPERATIONS)
    assert set(dispatch.OPERATIONS) < set(kernels.__all__)


def test_unknown_instruction_set_is_refused_by_name(monkeypatch, fresh):
    monkeypatch.setenv("ERNIE_CPU_ISA", "avx9000")
    assert "ERNIE_CPU_ISA=avx9000" in ops.available()
    assert "scalar" in ops.available()


def test_library_goes_to_the_temporary_folder_where_home_is_read_only(monkeypatch, tmp_path):
    (tmp_path / "home").write_text("a file, so that no folder can be made in it")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert build._cache_folder().parent == tmp_path


OPENMP_RUNTIMES = """
import torch
from ernie.kernels.cpu import ops
ops.linear(torch.rand(64, 512), torch.rand(512, 512))
maps = open("/proc/self/maps").read().splitlines()
print(*{line.split()[-1] for line in maps if "omp" in line.rpartition("/")[2]}, sep="\\n")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_only_torchs_openmp_runtime_is_loaded():
    # In a process of its own: other packages of a test run bring runtimes that they never start.
    command = [sys.executable, "-c", OPENMP_RUNTIMES]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    runtimes = done.stdout.split()
    assert len(runtimes) == 1, runtimes
    assert "torch" in runtimes[0]
