"""With `batch_invariant`, a row's bits from the GPU kernels are the same in every batch.

On a GPU, or in Triton's interpreter (tests/conftest.py asks for it), where this shows that nothing
is decided by the number of rows; that tiles of one shape add in one order is the hardware's part.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="there are no wheels of it for this platform")

from ernie import kernels
from ernie.kernels import dispatch, reference
from ernie.kernels.gpu import ops
from tests.helpers_triton import make_products_placeless

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.gpu if ON_GPU else []
ROWS = [slice(20, 21), slice(0, 3), slice(17, 69)]


@pytest.fixture(autouse=True)
def invariant(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    if not ON_GPU:
        make_products_placeless(monkeypatch)
    kernels.batch_invariant(True, "cuda")
    yield
    kernels.batch_invariant(False)


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def packed(bits: int, *shape: int, dtype: torch.dtype) -> kernels.PackedWeight:
    weight = rand(*shape, dtype=dtype) / shape[-1] ** 0.5
    return ops.pack(reference.quantize(weight, bits) if bits else weight)


def same(whole: Tensor, part: Tensor, what: object) -> None:
    assert torch.equal(part, whole), f"{what}: {float((part - whole).float().abs().max()):.2g}"


FORMS = [(0, torch.float32), (0, torch.bfloat16), (8, torch.bfloat16), (4, torch.bfloat16)]


@pytest.mark.parametrize(("bits", "dtype"), FORMS)
def test_products_of_a_row_do_not_depend_on_the_others(bits: int, dtype: torch.dtype) -> None:
    # Wide enough for the columns to be shared out among programs, where that is allowed.
    width, outputs = (1088, 40) if bits == 4 else (96, 70)
    weight = packed(bits, outputs, width, dtype=dtype)
    gate_up, down = (packed(bits, *shape, dtype=dtype) for shape in ((96, width), (width, 48)))
    x, residual, bias = rand(69, width, dtype=dtype), rand(69, outputs, dtype=dtype), rand(outputs)
    norm = (rand(width), 1e-5)
    whole = ops.project(x, weight, bias, norm=norm, residual_TO=residual)
    whole_mlp = ops.mlp(x, gate_up, down, norm=norm, residual_TD=x)
    for rows in ROWS:
        part = ops.project(x[rows], weight, bias, norm=norm, residual_TO=residual[rows])
        same(whole[rows], part, rows)
        same(whole_mlp[rows], ops.mlp(x[rows], gate_up, down, norm=norm, residual_TD=x[rows]), rows)


def test_experts_of_a_row_do_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from ernie.kernels.gpu import experts

    monkeypatch.setattr(experts, "_has_grouped", lambda device: True)  # and yet not torch's product
    monkeypatch.setattr(experts, "GROUPED_ROWS", 8)
    num, top_k, hidden, size = 4, 2, 64, 32
    bits, dtype = FORMS[1]
    gate_up = packed(bits, num, 2 * size, hidden, dtype=dtype)
    down = packed(bits, num, hidden, size, dtype=dtype)
    shared = tuple(packed(bits, *s, dtype=dtype) for s in ((2 * size, hidden), (hidden, size)))
    x, router, bias = rand(69, hidden, dtype=dtype), rand(num, hidden), rand(num) * 0.1

    def mixed(rows: slice) -> Tensor:
        settings = {"top_k": top_k, "norm_min": 1e-12, "residual_TD": x[rows]}
        return ops.moe(x[rows], router, bias, gate_up, down, shared, **settings)

    whole = mixed(slice(0, 69))
    for rows in ROWS:
        same(whole[rows], mixed(rows), rows)


@pytest.mark.parametrize("cache", [torch.float32, torch.int8])
def test_attention_of_a_token_does_not_depend_on_cuts_and_neighbours(cache: torch.dtype) -> None:
    """A text of 300 tokens read at once, in chunks beside another text, and token by token."""
    heads, groups, width, positions, length = 8, 2, 16, 16, 300
    k, v = (
        reference._cached_rows(rand(40 * positions, groups, width), cache).unflatten(0, (40, -1))
        for _ in range(2)
    )
    table = torch.randperm(40, device=DEVICE)[: -(-length // positions)].int()[None]
    other = torch.randint(0, 40, table.shape, dtype=torch.int32, device=DEVICE)
    q, q_other = rand(length, heads, width), rand(90, heads, width)

    def attend(start: int, stop: int, beside: int) -> Tensor:
        """Tokens start .. stop - 1, behind so many of the other text's."""
        queries = torch.cat((q_other[:beside], q[start:stop]))
        bounds = torch.tensor([0, beside, len(queries)], dtype=torch.int32, device=DEVICE)
        lens = torch.tensor([beside, stop], dtype=torch.int32, device=DEVICE)
        out = ops.attend_paged(queries, k, v, torch.cat((other, table)), bounds, lens, 0.25)
        return out[beside:]

    whole = attend(0, length, 0)
    for start, stop, beside in ((0, 100, 3), (100, 300, 90), (299, 300, 0), (150, 151, 1)):
        same(whole[start:stop], attend(start, stop, beside), (start, stop, beside))


def test_a_gpu_without_kernels_refuses_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch._modules.cache_clear()
    with monkeypatch.context() as patch:
        patch.setenv("ERNIE_KERNELS", "reference")
        with pytest.raises(ValueError, match="does not have here: ERNIE_KERNELS=reference; leave"):
            kernels.batch_invariant(True, "cuda")
    dispatch._modules.cache_clear()
