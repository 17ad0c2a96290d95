"""Every GPU kernel against its definition in `ernie.kernels.reference`.

Where there is a GPU the kernels are compiled and run there; elsewhere they run in Triton's
interpreter, on a CPU (tests/conftest.py asks for it).
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton", reason="there are no wheels of it for this platform")

from ernie import kernels
from ernie.kernels import dispatch, reference
from ernie.kernels.gpu import attention, flash, ops
from tests.helpers_triton import make_fp8_rounded

ON_GPU = torch.cuda.is_available()
BF16, F16, F32, I8 = torch.bfloat16, torch.float16, torch.float32, torch.int8

DEVICE = "cuda" if ON_GPU else "cpu"  # tensors are made where the kernels run

pytestmark = pytest.mark.gpu if ON_GPU else []


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def rand(*shape: int, dtype: torch.dtype = F32, grad: bool = False) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_(grad)


def sliced(rows: int, width: int, dtype: torch.dtype = F32) -> torch.Tensor:
    """Columns of a wider tensor."""
    return rand(rows, 2 * width + 3, dtype=dtype)[:, 3 : 3 + width].requires_grad_()


def bounds(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def angles(tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    turn = rand(tokens, width // 2) * 3
    return turn.cos(), turn.sin()


POINTWISE = {
    "norm": lambda t: ("rms_norm", rand(5, 33, dtype=t, grad=True), rand(33, grad=True), 1e-5),
    "norm slice": lambda t: ("rms_norm", sliced(3, 64, t), rand(64, dtype=t, grad=True), 1e-6),
    "norm no rows": lambda t: ("rms_norm", rand(0, 8, dtype=t, grad=True), rand(8), 1e-5),
    "rotate": lambda t: ("rotate", rand(7, 3, 20, dtype=t, grad=True), *angles(7, 20)),
    "rotate slice": lambda t: (
        "rotate",
        sliced(4, 64, t).detach().unflatten(1, (4, 16)).requires_grad_(),
        *angles(4, 16),
    ),
    "rotate halves": lambda t: (
        "rotate_halves",
        rand(7, 3, 20, dtype=t, grad=True),
        *angles(7, 20),
    ),
    "rotate halves slice": lambda t: (
        "rotate_halves",
        sliced(4, 320, t).detach().unflatten(1, (4, 80)).requires_grad_(),
        *angles(4, 80),
    ),
    "swiglu": lambda t: ("swiglu", sliced(3, 37, t), sliced(3, 37, t)),
    "swiglu halves": lambda t: ("swiglu_halves", sliced(3, 74, t)),
    "swiglu wide": lambda t: (
        "swiglu",
        rand(2, 1500, dtype=t, grad=True),
        rand(2, 1500, dtype=t, grad=True),
    ),
}


def close(
    ours: torch.Tensor, theirs: torch.Tensor, computed: torch.dtype, times: float = 1
) -> None:
    """Equal within rounding of the dtype in which they were computed, beside the largest value."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    if not theirs.numel():
        return
    scale = max(1.0, float(theirs.detach().abs().max()))
    # The interpreter cuts numbers off to bfloat16 where a GPU rounds them.
    limit = times * (2e-2 if computed == BF16 else 2e-5) * scale
    error = float((ours.detach().float() - theirs.detach().float()).abs().max())
    assert error <= limit, f"largest error {error:.3g}, allowed {limit:.3g}"


def gradients(out: torch.Tensor, args: tuple) -> list[torch.Tensor]:
    wanted = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    weight = torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape).to(out.dtype)
    return list(torch.autograd.grad(out, wanted, weight)) if wanted else []


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("case", POINTWISE)
def test_pointwise_kernel_equals_its_definition(case, dtype):
    operation, *args = POINTWISE[case](dtype)
    options = {}
    if operation == "rotate_halves":
        operation, options = "rotate", {"halves": True}
    ours, theirs = (getattr(module, operation)(*args, **options) for module in (ops, reference))
    close(ours, theirs, dtype)
    for own, other in zip(gradients(ours, args), gradients(theirs, args), strict=True):
        close(own, other, dtype)


@pytest.mark.parametrize("cache", [F32, BF16, F16, I8])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_cache_write_equals_its_definition(cache, dtype):
    wide = rand(6, 3 * 2 * 20, dtype=dtype)
    k, v = (wide[:, at : at + 40].unflatten(1, (2, 20)) for at in (0, 40))
    k[4] = 0
    slots = torch.tensor([7, -1, 0, 19, 2, 3], device=DEVICE)
    row = reference.cache_width(20, cache)
    ours, theirs = ([rand(4, 5, 2, row).zero_().to(cache) for _ in range(2)] for _ in range(2))
    ops.write_cache(k, v, *ours, slots)
    reference.write_cache(k, v, *theirs, slots)
    for own, other in zip(ours, theirs):
        own, other = (reference._cached_values(c.flatten(0, 1)) for c in (own, other))
        torch.testing.assert_close(own, other, rtol=8e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rotation_in_place_equals_its_definition(dtype):
    wide = rand(5, 6, 16, dtype=dtype)
    own, other = wide.clone()[:, :4], wide.clone()[:, :4]
    ops.rotate_(own, *(tables := angles(5, 16)))
    reference.rotate_(other, *tables)
    close(own, other, dtype)


def paged(dtype, cache, heads, groups, width, positions, lens, news):
    """Arguments of attend_paged with blocks in any order and nonsense past the last ones."""
    q = rand(sum(news), heads, width, dtype=dtype)
    k, v = (
        reference._cached_rows(rand(90 * positions, groups, width), cache).unflatten(0, (90, -1))
        for _ in range(2)
    )
    most = -(-max(lens) // positions) + 1
    tables = torch.randint(0, 90, (len(lens), most), dtype=torch.int32, device=DEVICE)
    for s, length in enumerate(lens):
        tables[s, -(-length // positions) :] = 2**30
    return q, k, v, tables, bounds(*news), torch.tensor(lens, dtype=torch.int32, device=DEVICE), 0.2


PAGED = {
    "decode": (8, 2, 16, 16, [1, 17, 530], [1, 1, 1]),
    "decode, group of 5": (10, 2, 20, 3, [40, 300, 1], [1, 1, 1]),
    "few and none": (4, 4, 16, 5, [40, 7, 270, 3], [5, 0, 2, 1]),
    "few, group of 16": (16, 1, 16, 8, [12, 6], [3, 1]),
    "prompts": (4, 1, 32, 16, [50, 70], [50, 41]),
    "mixed": (10, 2, 16, 7, [300, 90, 5, 64], [1, 90, 0, 2]),
    "blocks of a step": (8, 2, 16, 64, [300, 129, 64, 5], [200, 1, 64, 5]),
    "padding of a graph": (4, 2, 16, 4, [9, 0, 0], [1, 1, 1]),
}


@pytest.mark.parametrize("dtype, cache", [(F32, F32), (BF16, BF16), (F32, I8), (BF16, F16)])
@pytest.mark.parametrize("case", PAGED)
def test_paged_attention_equals_its_definition(case, dtype, cache):
    args = paged(dtype, cache, *PAGED[case])
    close(ops.attend_paged(*args), reference.attend_paged(*args), dtype)


def test_paged_attention_stores_new_rows_first():
    q, k, v, *rest = paged(F32, F32, 4, 2, 16, 4, [9, 4], [3, 1])
    slots = torch.stack([rest[0][0, j // 4].long() * 4 + j % 4 for j in (6, 7, 8)])
    slots = torch.cat([slots, rest[0][1, 0].long()[None] * 4 + 3])
    new = (rand(4, 2, 16), rand(4, 2, 16), slots)
    theirs = reference.attend_paged(q, k.clone(), v.clone(), *rest, new)
    close(ops.attend_paged(q, k, v, *rest, new), theirs, F32)


def test_decoded_token_does_not_depend_on_its_neighbours():
    q, k, v, tables, _, lens, scale = paged(F32, F32, 4, 2, 16, 16, [530, 8, 257], [1, 1, 1])
    whole = ops.attend_paged(q, k, v, tables, bounds(1, 1, 1), lens, scale)
    for s in range(3):
        mine = slice(s, s + 1)
        alone = ops.attend_paged(q[mine], k, v, tables[mine], bounds(1), lens[mine], scale)
        assert torch.equal(alone, whole[mine])


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("lengths", [(40,), (12, 12, 12), (10, 14)])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_of_known_lengths_equals_its_definition(lengths, dtype, causal, monkeypatch):
    monkeypatch.setattr(attention, "LONG", 12)
    monkeypatch.setattr(attention, "LONG_STEP", 16)
    tokens = sum(lengths)
    q = rand(tokens, 6, 16, dtype=dtype, grad=True)
    k, v = (rand(tokens, 2, 16, dtype=dtype, grad=True) for _ in range(2))
    args = (q, k, v, bounds(*lengths), 0.3)
    ours = ops.attend_packed(*args, lengths, causal=causal)
    theirs = reference.attend_packed(*args, causal=causal)
    close(ours, theirs, dtype)
    for own, other in zip(gradients(ours, args), gradients(theirs, args), strict=True):
        close(own, other, dtype)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("width", "groups", "causal"), [(16, 2, True), (80, 6, False)])
def test_packed_attention_equals_its_definition(width, groups, causal, dtype):
    """Of the language model, and of the vision tower."""
    q = rand(23, 6, width, dtype=dtype, grad=True)
    k, v = (rand(23, groups, width, dtype=dtype, grad=True) for _ in range(2))
    args = (q, k, v, bounds(10, 0, 12, 1), 0.3)
    ours, theirs = (m.attend_packed(*args, causal=causal) for m in (ops, reference))
    close(ours, theirs, dtype)
    for own, other in zip(gradients(ours, args), gradients(theirs, args), strict=True):
        close(own, other, dtype)


def packed(shape: tuple[int, ...], bits: int, dtype: torch.dtype) -> tuple:
    """A weight as this device and as the reference packs it."""
    weight = rand(*shape, dtype=dtype) / shape[-1] ** 0.5
    kept = reference.quantize(weight, bits) if bits else weight
    return ops.pack(kept), reference.pack(kept)


def plain_rows(x: torch.Tensor) -> torch.Tensor:
    return x.float()


@pytest.fixture
def unrounded(monkeypatch):
    """The reference as it is on a GPU: activations are not rounded to 8 bits."""
    monkeypatch.setattr(reference, "rounded_rows", plain_rows)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize(
    "rows, outputs, width",
    [(1, 70, 1088), (1, 5, 77), (3, 130, 96), (33, 65, 77), (140, 64, 64), (520, 24, 77)],
)
def test_projection_equals_its_definition(rows, outputs, width, bits, dtype, unrounded):
    ours, theirs = packed((outputs, width), bits, dtype)
    x, residual = rand(rows, width, dtype=dtype), rand(rows, outputs, dtype=dtype)
    bias, norm = rand(outputs), (rand(width, dtype=dtype), 1e-5)
    for given in ((None, {}), (bias, {}), (bias, {"norm": norm, "residual_TO": residual})):
        own, other = (
            m.project(x, w, given[0], **given[1]) for m, w in ((ops, ours), (reference, theirs))
        )
        close(own, other, dtype)


def test_weights_of_six_bits_are_read_as_eight(unrounded):
    kept = reference.quantize(rand(70, 96) / 96**0.5, 6)
    as_eight = reference.quantize(kept.dequantized(), 8)
    x = rand(3, 96)
    close(ops.project(x, ops.pack(kept)), reference.project(x, reference.pack(as_eight)), F32)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("bits", [0, 8, 4])
def test_mlp_equals_its_definition(bits, dtype, unrounded):
    (up, up_r), (down, down_r) = packed((96, 64), bits, dtype), packed((64, 48), bits, dtype)
    x, norm = rand(5, 64, dtype=dtype), (rand(64), 1e-5)
    close(
        ops.mlp(x, up, down, norm=norm, residual_TD=x),
        reference.mlp(x, up_r, down_r, norm=norm, residual_TD=x),
        dtype,
    )


MIXTURES = {  # tokens, experts, choices, hidden size, expert size, shared size
    "one token": (1, 8, 3, 64, 32, 64),
    "a pair each": (4, 8, 2, 48, 20, 0),
    "sorted": (21, 6, 3, 64, 32, 32),
    "one expert": (9, 1, 1, 32, 16, 0),
    "many rows": (70, 2, 2, 32, 16, 8),
    "very many rows": (520, 1, 1, 32, 16, 0),
}


@pytest.fixture
def by_torch(monkeypatch):
    """torch's grouped product wherever torch has it, also without a GPU."""
    from ernie.kernels.gpu import experts

    monkeypatch.setattr(experts, "_has_grouped", lambda device: True)


@pytest.mark.parametrize("bits, dtype", [(0, F32), (0, BF16), (8, F32), (8, BF16), (4, F32)])
@pytest.mark.parametrize("case", MIXTURES)
def test_mixture_of_experts_equals_its_definition(case, bits, dtype, unrounded, by_torch):
    tokens, experts, top_k, hidden, size, shared_size = MIXTURES[case]
    x, norm = rand(tokens, hidden, dtype=dtype), (rand(hidden, dtype=dtype), 1e-5)
    router, bias = rand(experts, hidden) / hidden**0.5, rand(experts) * 0.02
    shapes = [(experts, 2 * size, hidden), (experts, hidden, size)]
    shared = [(2 * shared_size, hidden), (hidden, shared_size)] if shared_size else []
    ours, theirs = zip(*(packed(shape, bits, dtype) for shape in shapes + shared))
    own, other = (
        m.moe(
            x, router, bias, w[0], w[1], tuple(w[2:]) or None,
            top_k=top_k, norm_min=1e-12, norm=norm, residual_TD=x,
        )
        for m, w in ((ops, ours), (reference, theirs))
    )  # fmt: skip
    close(own, other, dtype, times=2 if tokens > 64 else 1)  # more values, a larger extreme


@pytest.mark.parametrize("bits", [0, 8, 4])
def test_expert_of_a_packed_weight_is_a_weight(bits, unrounded):
    ours, theirs = packed((3, 70, 96), bits, F32)
    x = rand(4, 96)
    own = ops.project(x, reference.expert(ours, 2))
    close(own, reference.project(x, reference.expert(theirs, 2)), F32)


def test_equal_scores_choose_the_smaller_index():
    from ernie.kernels.gpu.experts import _choose

    probs = torch.tensor([[0.2, 0.3, 0.3, 0.2], [0.25] * 4], device=DEVICE)
    chosen, weights = _choose(probs.log(), rand(4).zero_(), 3, 1e-12)
    assert chosen.tolist() == [[1, 2, 0], [0, 1, 2]]
    close(
        weights, probs.gather(1, chosen.long()) / probs.gather(1, chosen.long()).sum(1, True), F32
    )


def test_pairs_are_sorted_stably():
    from ernie.kernels.gpu.experts import sorted_by_expert

    experts = torch.randint(0, 5, (300,), dtype=torch.int32, device=DEVICE)
    order, place, ends = sorted_by_expert(experts, 7)
    assert torch.equal(order.long(), experts.argsort(stable=True))
    assert torch.equal(place[order.long()].long(), torch.arange(300, device=DEVICE))
    assert torch.equal(ends.long(), experts.bincount(minlength=7).cumsum(0))


@pytest.mark.parametrize("dtype, weight", [(F32, F32), (BF16, BF16), (F32, BF16)])
@pytest.mark.parametrize("rows", [(1, 0, 7, 4, 0), (40, 29, 1, 0, 20), (0, 0, 0, 0, 0)])
def test_grouped_product_equals_its_definition(rows, dtype, weight):
    x = rand(sum(rows), 40, dtype=dtype, grad=True)
    args = (
        x,
        rand(5, 70, 40, dtype=weight, grad=weight == dtype),
        torch.tensor(rows, device=DEVICE),
    )
    ours, theirs = ops.grouped_linear(*args), reference.grouped_linear(*args)
    close(ours, theirs, dtype)
    if not len(x):
        return
    for own, other in zip(gradients(ours, args), gradients(theirs, args), strict=True):
        close(own, other, dtype)


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="torch lacks it")
def test_grouped_product_by_torch_equals_its_definition(by_torch):
    counts = torch.tensor([3, 0, 18, 7, 0], device=DEVICE)
    args = (rand(28, 40, dtype=BF16, grad=True), rand(5, 72, 40, dtype=BF16, grad=True), counts)
    ours, theirs = ops.grouped_linear(*args), reference.grouped_linear(*args)
    close(ours, theirs, BF16)
    for own, other in zip(gradients(ours, args), gradients(theirs, args), strict=True):
        close(own, other, BF16)


@pytest.fixture
def fp8(monkeypatch):
    if not ON_GPU:
        make_fp8_rounded(monkeypatch)


@pytest.mark.usefixtures("fp8")
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(3, 1030), (70, 40), (2, 5, 64), (0, 8)])
@pytest.mark.parametrize("across", [False, True])
def test_rounding_to_fp8_equals_its_definition_bit_for_bit(across, shape, dtype):
    x = rand(*shape, dtype=dtype) * 10.0 ** torch.randint(-12, 12, (*shape[:-1], 1), device=DEVICE)
    x = x.to(dtype)
    if x.numel():
        x[..., 0, :] = 0
        x[..., -1, -1] *= 3
    x = x.mT if across and shape[0] else x
    ours, theirs = ops.quantize_fp8(x), reference.quantize_fp8(x)
    assert torch.equal(ours.data.view(torch.uint8), theirs.data.view(torch.uint8))
    assert torch.equal(ours.scale, theirs.scale)
    lost = ours.dequantized() - x.float()
    # Half of the last of three bits, or half of the smallest step where a value is small.
    assert bool((lost.abs() <= x.abs() / 16 + ours.scale[..., None] * 2**-10).all())


@pytest.mark.usefixtures("fp8")
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_no_number_stays_none_in_fp8():
    x = torch.ones(3, 40, device=DEVICE)
    x[0, 3], x[1, 5] = float("nan"), float("inf")
    for module in (ops, reference):
        is_number = module.quantize_fp8(x).dequantized().isfinite().all(-1)
        assert is_number.tolist() == [False, False, True]


@pytest.mark.usefixtures("fp8")
@pytest.mark.parametrize("quant", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_products_in_fp8_equal_their_definition(dtype, quant):
    dense = (rand(9, 48, dtype=dtype, grad=True), rand(64, 48, dtype=dtype, grad=True))
    bias = rand(64, dtype=dtype, grad=True)
    counts = torch.tensor([3, 0, 5, 1], device=DEVICE)
    experts = (dense[0], rand(4, 64, 48, dtype=dtype, grad=True), counts)
    for name, args in (("fp8_linear", (*dense, bias)), ("fp8_grouped_linear", experts)):
        outs = [getattr(m, name)(*args, quant_input_grad=quant) for m in (ops, reference)]
        close(*outs, dtype)
        both = (gradients(out, args) for out in outs)
        for own, other in zip(*both, strict=True):
            close(own, other, dtype)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    "tokens, experts, top_k, width", [(37, 7, 3, 40), (5, 4, 1, 1100), (0, 3, 2, 8)]
)
def test_ways_to_experts_and_back_equal_their_definition(tokens, experts, top_k, width, dtype):
    chosen = rand(tokens, experts).topk(top_k).indices
    order, place, counts = ops.sort_pairs(chosen, experts)
    expected = reference.sort_pairs(chosen, experts)
    for name, own, other in zip(("order", "place", "counts"), (order, place, counts), expected):
        assert torch.equal(own.long(), other), name
    x, grad = rand(tokens, width, dtype=dtype), rand(tokens, width, dtype=dtype)
    rows, weights = rand(tokens * top_k, width, dtype=dtype), rand(tokens, top_k)
    assert torch.equal(ops.spread(x, order, top_k), reference.spread(x, expected[0], top_k))
    for given in (None, weights):
        close(ops.combine(rows, place, given), reference.combine(rows, expected[1], given), dtype)
    own = ops.combine_backward(grad, rows, weights, order)
    other = reference.combine_backward(grad, rows, weights, expected[0])
    close(own[0], other[0], dtype)
    close(own[1], other[1], F32)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rows, vocabulary", [(3, 40), (2, 9001), (0, 5)])
def test_cross_entropy_equals_its_definition(rows, vocabulary, dtype):
    logits = (rand(rows, vocabulary) * 5).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), device=DEVICE)
    targets[:1] = logits[:1].argmax(-1)
    own, other = logits.clone(), logits.clone()
    ours, theirs = (
        ops.cross_entropy_(own, targets, 0.5),
        reference.cross_entropy_(other, targets, 0.5),
    )
    close(ours[0], theirs[0], F32)
    assert torch.equal(ours[1], theirs[1])
    close(own, other, dtype)


ADAMW = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def five_updates(module, operation: str, state: list, gradients: list, copied: bool):
    """Parameter, moments and the parameter's bfloat16 copy after as many steps as gradients."""
    parameter, *rest = (t.clone() for t in state)
    short = torch.empty_like(parameter, dtype=BF16) if copied else None
    for step, gradient in enumerate(gradients, 1):
        update = reference.AdamWUpdate(**ADAMW, step=step, grad_scale=0.7, seed=12345)
        getattr(module, operation)(parameter, gradient, *rest, update, short)
    return [parameter, *rest], short


@pytest.mark.parametrize("gradient", [F32, BF16])
@pytest.mark.parametrize("moments", [F32, BF16, I8])
def test_optimizer_step_equals_its_definition_bit_for_bit(moments, gradient):
    size = 5003
    state = [rand(size), rand(size).to(moments) * 0, rand(size).to(moments) * 0]
    operation = "adamw_step"
    if moments == I8:
        operation = "adamw_8bit_step"
        state = [*state[:2], state[2].to(torch.uint8), torch.zeros(2, -(-size // 256)).to(DEVICE)]
    steps = [rand(size, dtype=gradient) * 0.01 for _ in range(5)]
    steps[2][:600] = 0
    ours, own = five_updates(ops, operation, state, steps, True)
    theirs, other = five_updates(reference, operation, state, steps, True)
    for name, a, b in zip(("parameter", "moment", "square", "scales"), ours, theirs):
        assert torch.equal(a, b), f"{name}: {(a != b).sum()} of {a.numel()} differ"
    if ON_GPU:
        assert torch.equal(own, other)
    else:  # the interpreter cuts numbers off to bfloat16
        torch.testing.assert_close(own.float(), other.float(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("total", [F32, BF16])
def test_sums_of_gradients_equal_their_definition_bit_for_bit(total):
    for sums, gradient in (
        (rand(5003, dtype=total), rand(5003, dtype=BF16)),
        (rand(7, 300, dtype=total).mT, rand(7, 300, dtype=BF16).mT),
    ):
        expected = sums.float() + gradient.float()
        ours = ops.float32_sum(sums, gradient)
        assert ours.dtype == F32
        assert torch.equal(ours, expected)
        assert (ours is sums) == (total == F32)


def fake_varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    assert window_size in ((-1, 0), (-1, -1))
    assert enable_gqa
    assert cu_q is cu_k
    assert max_q == max_k >= int(cu_q.diff().max())
    return reference.attend_packed(q, k, v, cu_q, scale, causal=window_size == (-1, 0))


def old_varlen(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False):
    raise AssertionError("cannot scale, so it must not be called")


def test_torchs_varlen_attention_is_used_where_it_can_do_the_work():
    args = (rand(9, 4, 8), rand(9, 2, 8), rand(9, 2, 8), bounds(4, 5), 0.3)
    adapted = attention.adapted_varlen(fake_varlen)
    for causal in (True, False):
        theirs = reference.attend_packed(*args, causal=causal)
        assert torch.equal(adapted(*args[:4], 12, args[4], causal), theirs)
    assert attention.adapted_varlen(old_varlen) is None


def of_version_3(
    q, k_cache, v_cache, *, cache_seqlens, page_table, cu_seqlens_q, max_seqlen_q, softmax_scale,
    causal,
):  # fmt: skip
    assert causal
    assert max_seqlen_q >= int(cu_seqlens_q.diff().max())
    args = (q, k_cache, v_cache, page_table, cu_seqlens_q, cache_seqlens, softmax_scale)
    return reference.attend_paged(*args) + 1  # so that a test sees who answered


def of_version_2(
    q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal=False, block_table=None
):
    assert max_q >= int(cu_q.diff().max())
    assert max_k >= int(cu_k.diff().max())
    if block_table is None:
        return reference.attend_packed(q, k, v, cu_q, softmax_scale, causal=causal) + 1
    assert causal
    assert k.shape[1] % 256 == 0
    lens = cu_k.diff()
    return reference.attend_paged(q, k, v, block_table, cu_q, lens, softmax_scale) + 1


@pytest.fixture(params=[2, 3])
def installed(request, monkeypatch):
    """A module that stands in for FlashAttention of a version."""
    name = flash.VERSIONS[request.param][0]
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.flash_attn_varlen_func = of_version_2
    module.flash_attn_with_kvcache = of_version_3
    monkeypatch.setitem(sys.modules, name, module)
    caches = (flash._found, dispatch._modules, dispatch._chosen)
    for cached in caches:
        cached.cache_clear()
    yield request.param
    for cached in caches:
        cached.cache_clear()


def test_flash_attention_is_picked_up_and_given_what_it_takes(installed):
    assert flash.available() == ""
    lines = kernels.report("cuda")
    assert lines["attend_paged"] == f"ernie.kernels.gpu.flash [FlashAttention {installed}]"
    assert lines["moe"].startswith("ernie.kernels.gpu.experts [triton")
    packed = (rand(9, 4, 16, dtype=BF16), *(rand(9, 2, 16, dtype=BF16) for _ in range(2)))
    packed = (*packed, bounds(4, 5), 0.3)
    for causal in (True, False):
        theirs = reference.attend_packed(*packed, causal=causal) + (installed == 3)
        close(flash.attend_packed(*packed, causal=causal), theirs, BF16)
    for positions, taken in ((256, True), (16, installed == 3)):
        paged_args = paged(BF16, BF16, 4, 2, 16, positions, [50, 70], [50, 41])
        theirs = reference.attend_paged(*paged_args) + taken
        close(flash.attend_paged(*paged_args), theirs, BF16)
    decoding = paged(BF16, BF16, 4, 2, 16, 256, [50, 70], [1, 1])
    close(flash.attend_paged(*decoding), reference.attend_paged(*decoding), BF16)


def test_report_says_what_runs_on_a_gpu():
    lines = kernels.report("cuda")
    assert set(lines) == set(dispatch.OPERATIONS)
    ours = {name for name, line in lines.items() if "reference" not in line}
    assert ours == set(ops.MODULE_BY_OPERATION)
