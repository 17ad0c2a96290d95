"""Draws and log-probabilities of tokens: every twin against `ernie.kernels.reference`.

The kernels of GPUs run there, or in Triton's interpreter (tests/conftest.py asks for it), which
takes a tenth of a second for each chunk of a row and round: hence few rows, and small chunks.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="there are no wheels of it for this platform")

from ernie.kernels import reference
from ernie.kernels.cpu import sampling as on_cpu
from ernie.kernels.gpu import sampling as on_gpu

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
TWINS = ["cpu", pytest.param("gpu", marks=pytest.mark.gpu if ON_GPU else [])]
NONE = float("nan")
FAR = float("-inf")
# temperature, min_p, top_k, top_p
SETTINGS = [
    (1.0, 0.0, 0, 1.0),
    (0.8, 0.0, 0, 0.8),
    (1.0, 0.0, 7, 1.0),
    (0.6, 0.05, 40, 0.9),
    (3.0, 0.0, 0, 0.99),  # more tokens than the first candidates of the CPU hold
    (1.0, 0.0, 1, 1.0),
]


@pytest.fixture(params=TWINS)
def twin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(on_cpu, "NUM_CANDIDATES", 16)
    if not ON_GPU:
        monkeypatch.setattr(on_gpu, "CHUNK", 64)
    return {"cpu": on_cpu, "gpu": on_gpu}[request.param]


def drawn(module: ModuleType, logits: Tensor, settings: list[tuple], uniform: Tensor) -> list[int]:
    """Row r with settings `r % len(settings)`."""
    rows = torch.arange(len(logits)) % len(settings)
    temperature, min_p, top_k, top_p = torch.tensor(settings, dtype=torch.float64)[rows].T
    device = DEVICE if module is on_gpu else "cpu"
    args = (temperature, min_p, top_k.long(), top_p, uniform)
    return module.draw(logits.to(device), *args).tolist()


def check(twin: ModuleType, logits: Tensor, settings: list[tuple], uniform: Tensor) -> list[int]:
    own, other = (drawn(m, logits, settings, uniform) for m in (twin, reference))
    assert own == other
    return own


def uniforms(rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, dtype=torch.float64, generator=generator)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draw_equals_its_definition(twin: ModuleType, dtype: torch.dtype) -> None:
    rows = len(SETTINGS) if twin is on_gpu and not ON_GPU else 600
    logits = (normal(rows, 150, seed=1) * 3).to(dtype)  # in bfloat16 many are equal
    check(twin, logits, SETTINGS, uniforms(rows))


def test_draw_of_equal_tokens_keeps_the_smallest_ids(twin: ModuleType) -> None:
    """Ties that go on over the chunks of a row."""
    logits = torch.zeros(6, 150)
    logits[:, [3, 90, 140]] = 5.0
    logits[2] = 1.0
    settings = [
        (1.0, 0.0, 2, 1.0), (1.0, 0.0, 3, 1.0), (1.0, 0.0, 70, 1.0),
        (1.0, 0.0, 3, 0.6), (0.2, 0.0, 0, 0.9), (1.0, 0.9, 0, 1.0),
    ]  # fmt: skip
    last = check(twin, logits, settings, torch.full((6,), 1 - 2**-53, dtype=torch.float64))
    # The last of those that are kept; two of three are more than 0.6.
    assert last == [90, 140, 69, 90, 140, 140]
    first = check(twin, logits, settings, torch.zeros(6, dtype=torch.float64))
    assert first == [3, 3, 0, 3, 3, 3]


def test_draw_of_odd_rows(twin: ModuleType) -> None:
    logits = normal(8, 70) * 2
    logits[0] = FAR  # nothing is possible
    logits[1] = NONE
    logits[2, 40] = NONE
    logits[3, 41] = -FAR
    logits[4, :69] = FAR  # one token has everything
    logits[5, ::2] = FAR
    logits[6, 20] = 60.0  # far above all others
    logits[7] = 1e38 * logits[7].sign()  # distances beyond float32
    settings = [(1.0, 0.0, 5, 0.9)]
    tokens = check(twin, logits, settings, uniforms(8))
    assert tokens[:5] == [0, 0, 0, 0, 69] and tokens[6] == 20
    assert tokens[5] % 2 == 1 and logits[7, tokens[7]] > 0


def test_draw_at_the_edges_of_settings(twin: ModuleType) -> None:
    settings = [
        (1e-5, 0.0, 0, 1.0), (1e9, 0.0, 0, 1.0), (1.0, 1.0, 0, 1.0),
        (1.0, 0.0, 1000, 1.0), (1.0, 0.0, 0, 1e-300), (1.0, 0.0, 0, 1 - 2**-53),
    ]  # fmt: skip
    logits = normal(6, 70, seed=3) * 3
    tokens = check(twin, logits, settings, uniforms(6, seed=1))
    for row in (0, 2, 4):
        assert tokens[row] == int(logits[row].argmax())
    assert drawn(twin, logits[:0], settings, uniforms(0)) == []


def test_draw_of_columns_of_a_wider_tensor(twin: ModuleType) -> None:
    logits = normal(3, 90)[:, 5:75]
    check(twin, logits, SETTINGS[:3], uniforms(3))
    assert drawn(twin, logits[:, :1], SETTINGS[:3], uniforms(3)) == [0, 0, 0]


def test_draw_does_not_depend_on_other_rows(twin: ModuleType) -> None:
    logits, uniform = normal(3, 70), uniforms(3)
    together = drawn(twin, logits, SETTINGS[1:4], uniform)
    for r in range(3):
        alone = drawn(twin, logits[r : r + 1], SETTINGS[1 + r : 2 + r], uniform[r : r + 1])
        assert alone == together[r : r + 1]


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS)
def test_draw_from_a_whole_vocabulary(settings: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = normal(2, 103424, seed=5) * 3
    for module in (on_cpu, on_gpu):
        check(module, logits, [settings], uniforms(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logprobs_equal_their_definition(dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(on_gpu, "CHUNK", 64)
    logits = (normal(4, 150) * 5).to(dtype).to(DEVICE)
    logits[1, :70] = FAR
    tokens = torch.tensor([3, 0, 149, 70], device=DEVICE)
    own, other = (m.token_logprobs(logits, tokens) for m in (on_gpu, reference))
    torch.testing.assert_close(own, other)
    assert own[1] == FAR and own.dtype == torch.float32
    assert on_gpu.token_logprobs(logits[:0], tokens[:0]).shape == (0,)
