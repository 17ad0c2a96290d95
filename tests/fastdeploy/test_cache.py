"""The key/value cache in every dtype, and batch-invariant serving: what logits depend on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ernie import kernels
from ernie.model import ErnieModel
from ernie.models import TINY
from ernie.settings import ConfigError
from fastdeploy import LLM, SamplingParams

PROMPT = [(5 * i + 2) % 89 for i in range(45)]
OTHERS = [[(7 * i + j) % 97 for i in range(9 + 6 * j)] for j in range(4)]
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
SMALL = {"max_model_len": 96, "block_size": 8}


def random_model(name: str, dtype: torch.dtype = torch.float32) -> ErnieModel:
    model = ErnieModel(TINY[name], dtype=dtype)
    model.init_weights(seed=1, std=0.3)
    return model


def logits_of_prompt(llm: LLM, others: list[list[int]] = []) -> Tensor:  # noqa: B006
    """Logits `(12, V)` that chose the tokens after PROMPT, while `others` are worked on too."""
    seen: list[Tensor] = []
    sample = llm.engine.sampler.__call__

    def spy(logits_RV: Tensor, parts: Any, masks: Any) -> Any:
        row = 0
        for part in parts:
            if part.chooses and part.request.id.endswith("-0-0"):
                seen.append(logits_RV[row + part.num_logits - 1].clone())
            row += part.num_logits
        return sample(logits_RV, parts, masks)

    llm.engine.sampler = spy  # type: ignore[assignment]
    llm.generate([PROMPT, *others], GREEDY, use_tqdm=False)
    return torch.stack(seen)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(
    ("dtype", "bound"), [("float16", 6e-3), ("bfloat16", 5e-2), ("int8", 0.15)]
)
def test_narrow_caches_are_near_the_float32_one(name: str, dtype: str, bound: float) -> None:
    model = random_model(name)
    wide, narrow = (LLM(model, **SMALL, kv_cache_dtype=kind) for kind in ("float32", dtype))
    expected, found = logits_of_prompt(wide)[0], logits_of_prompt(narrow)[0]
    error = float((found - expected).norm() / expected.norm())
    assert 1e-6 < error < bound, f"{error:.5f}"
    cache = narrow.engine.runner.cache.keys_LBPGr
    width = TINY[name].head_dim
    assert cache.dtype == getattr(torch, dtype)
    assert cache.shape[-1] == (width + 4 if dtype == "int8" else width)


def test_the_cache_has_two_bytes_beside_bfloat16_weights() -> None:
    plain, half = random_model("tiny-dense"), random_model("tiny-dense", torch.bfloat16)
    kinds = [LLM(m, **SMALL).engine.runner.cache.keys_LBPGr.dtype for m in (plain, half)]
    assert kinds == [torch.float32, torch.float16]


def test_a_scheme_that_names_a_cache_gives_it() -> None:
    model = random_model("tiny-dense")
    scheme = (
        '{"quantization": "mix_quant", "dense_quant_type": "wint8", "kv_cache_quant_type": "int8"}'
    )
    assert (
        LLM(model, **SMALL, quantization=scheme).engine.runner.cache.keys_LBPGr.dtype == torch.int8
    )
    with pytest.raises(ConfigError, match="the quantisation says int8"):
        LLM(model, **SMALL, quantization=scheme, kv_cache_dtype="float32")


@pytest.fixture
def invariant_mode() -> Iterator[None]:
    yield
    kernels.batch_invariant(False)


@pytest.mark.parametrize("quantization", ["none", "wint8"])
@pytest.mark.parametrize("name", TINY)
def test_batch_invariant_logits_are_the_same_bits_whatever_stands_beside(
    name: str, quantization: str, invariant_mode: None
) -> None:
    model = random_model(name)

    def logits(others: list[list[int]] = [], rounds: int = 1, **settings: Any) -> Tensor:  # noqa: B006
        config = {**SMALL, "batch_invariant": True, "quantization": quantization, **settings}
        llm = LLM(model, **config)
        for _ in range(rounds - 1):
            llm.generate([PROMPT, *others], GREEDY, use_tqdm=False)
        return logits_of_prompt(llm, others)

    alone = logits()
    for what, found in {
        "neighbours": logits(OTHERS),
        "chunks of 1": logits(max_num_seqs=1, max_num_batched_tokens=1),
        "chunks of 13": logits(OTHERS, max_num_batched_tokens=13),
        "other blocks": logits(OTHERS, block_size=3),
        "prefix hits": logits(OTHERS, rounds=2),
        "preemption": logits(OTHERS, num_gpu_blocks_override=13),
    }.items():
        assert torch.equal(found, alone), f"{what}: {float((found - alone).abs().max())}"


def test_each_engine_of_a_process_keeps_its_own_mode(invariant_mode: None) -> None:
    model = random_model("tiny-dense")
    modes = (True, False)
    engines = [LLM(model, **SMALL, batch_invariant=mode) for mode in modes]
    seen: list[bool] = []
    for llm in engines:
        embedding = llm.engine.runner.model.model.embed_tokens
        embedding.register_forward_hook(lambda *_: seen.append(kernels.is_batch_invariant()))
    for mode, llm in [*zip(modes, engines)] * 2:
        seen.clear()
        llm.generate([PROMPT, *OTHERS], GREEDY, use_tqdm=False)
        assert set(seen) == {mode}


def test_batch_invariance_excludes_adapters() -> None:
    with pytest.raises(ConfigError, match="batch_invariant with enable_lora"):
        LLM(random_model("tiny-dense"), **SMALL, batch_invariant=True, enable_lora=True)
