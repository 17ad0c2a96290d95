"""The inference form of a model computes what the plain one does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from ernie import kernels
from ernie.attention import packed_causal
from ernie.config import ErnieConfig
from ernie.fused import Shard, fuse, shallow_copy
from ernie.kernels import reference
from ernie.layers import Linear
from ernie.model import ErnieModel
from ernie.models import TINY
from ernie.moe.experts import Experts
from ernie.quant.scheme import SCHEMES, Scheme, read_scheme
from ernie.settings import ConfigError

IDS = torch.arange(37) * 5 % 191
BIASED = dataclasses.replace(TINY["tiny-dense"], use_bias=True)
CONFIGS = {**TINY, "with biases": BIASED}


def random_model(config: ErnieConfig, dtype: torch.dtype = torch.float32) -> ErnieModel:
    model = ErnieModel(config, dtype=dtype)
    model.init_weights(seed=1, std=0.3)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith((".bias", "norm.weight", "correction_bias")):
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_the_plain_model(name: str, dtype: torch.dtype) -> None:
    plain = random_model(CONFIGS[name], dtype)
    expected = plain.logits(IDS)
    fused = fuse(shallow_copy(plain))
    assert largest_difference(fused.logits(IDS), expected) < 2e-5
    assert torch.equal(plain.logits(IDS), expected), "fusing a copy has changed the original"


def test_draft_heads_equal_the_plain_ones() -> None:
    plain = random_model(TINY["tiny-moe"])
    fused = fuse(shallow_copy(plain))
    positions, bounds = torch.arange(36), torch.tensor([0, 36], dtype=torch.int32)
    drafts = [
        model.hidden_after_next(
            IDS[1:], model.hidden(IDS[:-1], positions, packed_causal(bounds)), positions,
            packed_causal(bounds),
        )
        for model in (plain, fused)
    ]  # fmt: skip
    assert largest_difference(drafts[1], drafts[0]) < 2e-5


def quantised_by_hand(model: ErnieModel, scheme: Scheme) -> ErnieModel:
    """The plain model with every weight replaced by what its integers stand for."""
    for name, parameter in model.named_parameters():
        is_head = parameter is model.head_weight
        bits = scheme.head if is_head else scheme.dense
        bits = scheme.experts if ".experts." in name else bits
        bits = scheme.vision_experts if ".vision_experts." in name else bits
        if bits and parameter.dim() > 1 and ("_proj" in name or is_head) and "mtp" not in name:
            parameter.data = kernels.quantize(parameter.data, bits).dequantized()
    return model


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", TINY)
def test_quantised_model_equals_its_dequantised_twin(
    name: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = random_model(dataclasses.replace(TINY[name], tie_word_embeddings=False))
    logits = fuse(shallow_copy(plain), SCHEMES[scheme]).logits(IDS)
    twin = quantised_by_hand(plain, SCHEMES[scheme])
    exact = twin.logits(IDS)
    round_rows(twin, monkeypatch)
    rounded = twin.logits(IDS)
    # One activation that falls on the other side of a half changes its row, and those after it.
    assert float((logits - rounded).abs().amax(-1).median()) < 1e-4
    assert float((exact - rounded).abs().amax(-1).median()) > 1e-2, "rounding is not felt"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", TINY)
def test_quantised_logits_are_off_by_the_rounding_of_activations_alone(
    name: str, scheme: str
) -> None:
    """Beside a float32 model of the same values. A product rounds its rows, which costs the share
    `lost` of them; the products on the way to the logits, four in each layer and the head, round
    independently, so that the shares add up by their squares. The residual goes around all of them
    but the head: what is found is a little less. In the median over rows, for an expert that is
    chosen otherwise changes a row and those after it.
    """
    model = ErnieModel(
        dataclasses.replace(TINY[name], tie_word_embeddings=False), dtype=torch.float32
    )
    model.init_weights(seed=1, std=0.1)
    rows = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0))
    lost = float((reference.rounded_rows(rows) - rows).norm() / rows.norm())
    bound = lost * (4 * model.config.num_hidden_layers + 1) ** 0.5
    got = fuse(shallow_copy(model), SCHEMES[scheme]).logits(IDS)
    twin = quantised_by_hand(model, SCHEMES[scheme])

    def error() -> float:
        exact = twin.logits(IDS)
        return float(((got - exact).norm(dim=-1) / exact.norm(dim=-1)).median())

    assert bound / 4 < error() < bound, f"{error():.4f}, bound {bound:.4f}"
    for parameter_name, parameter in twin.named_parameters():
        if "_proj" in parameter_name or parameter is twin.head_weight:
            parameter.data *= 1.02
    assert error() > bound, f"scales wrong by 2% are not felt: {error():.4f}, bound {bound:.4f}"


MIXED = {
    "quantization": "mix_quant", "dense_quant_type": "wint8", "moe_quant_type": "wint4",
    "image_moe_quant_type": "wint8",
}  # fmt: skip


@pytest.mark.parametrize("name", [*SCHEMES, "image_moe_quant_type"])
def test_quantised_model_reads_pictures_as_its_dequantised_twin(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both banks are quantised, the tower is not; both are felt.

    An activation that falls on the other side of a half changes its row and those after it, which
    is chance: of some pictures one has hardly any. A mistake is in all of them.
    """
    scheme = SCHEMES[name] if name in SCHEMES else read_scheme(MIXED, has_experts=True)
    assert scheme is not None
    plain = random_model(dataclasses.replace(TINY["tiny-vl"], tie_word_embeddings=False))
    ids = torch.tensor([5, 9, *[201, *[200] * 20, 202], 7, 30, 31])
    quantised, twin = fuse(shallow_copy(plain), scheme), quantised_by_hand(plain, scheme)
    bounds, prompts = torch.tensor([0, len(ids)], dtype=torch.int32), []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 256, (80, 588), dtype=torch.uint8, generator=generator)
        prompts.append(plain.prompt(ids, pixels, [(1, 4, 20)]))
        read, prompt = quantised.prompt(ids, pixels, [(1, 4, 20)]), prompts[-1]
        assert prompt.embeds is not None and read.embeds is not None
        assert torch.equal(prompt.embeds.rows_LD, read.embeds.rows_LD), "the tower is another"

    def logits(model: ErnieModel) -> torch.Tensor:
        with torch.no_grad():
            read = [model.read(prompt, packed_causal(bounds)) for prompt in prompts]
        return torch.stack([model.head(hidden_TD) for hidden_TD in read])

    with torch.no_grad():
        exact, got = logits(plain), logits(quantised)
        round_rows(twin, monkeypatch)
        medians = (got - logits(twin)).abs().amax(-1).median(-1).values
    assert float(medians.min()) < 1e-4, f"{medians}"
    assert float((exact - got).abs().amax(-1).min()) > 1e-2, "quantisation is not felt"


def round_rows(model: ErnieModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the products of a plain model round their rows, as those with integers do."""
    monkeypatch.setattr(kernels, "linear", rounding(kernels.linear))  # of the head
    for module in model.modules():
        if isinstance(module, Linear | Experts):
            module.product = rounding(module.product)


def rounding(product: Callable) -> Callable:
    return lambda x, *rest: product(reference.rounded_rows(x), *rest)


def test_ranks_together_equal_the_whole() -> None:
    config = dataclasses.replace(
        TINY["tiny-moe"], num_attention_heads=6, num_key_value_heads=2, vocab_size=210
    )
    plain = random_model(config)
    ranks = [fuse(shallow_copy(plain), None, Shard(rank, 2)) for rank in range(2)]
    x = torch.randn(7, config.hidden_size)
    rotary, attend = plain.rotary(torch.arange(7)), packed_causal(torch.tensor([0, 7]).int())
    for i, block in enumerate(plain.model.layers):
        expected, _ = block(x, rotary, attend)
        halves = [rank.model.layers[i] for rank in ranks]
        middle = sum(half.self_attention(x, rotary, attend) for half in halves)
        out = sum(half.mlp(middle, half.post_norm) for half in halves)
        assert largest_difference(out, expected) < 2e-5, f"layer {i}"
    logits = torch.cat([rank.fused_head(x) for rank in ranks], -1)
    assert largest_difference(logits, plain.head(x)) < 2e-5


def test_sizes_that_ranks_cannot_share_are_refused() -> None:
    with pytest.raises(ConfigError, match="does not divide num_key_value_heads=1"):
        fuse(random_model(TINY["tiny-moe"]), None, Shard(0, 2))


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_one_expert_of_a_packed_weight_is_the_expert_packed(bits: int | None) -> None:
    weight = torch.randn(3, 22, 40)
    kept = kernels.quantize(weight, bits) if bits else weight
    alone = [kernels.quantize(one, bits) if bits else one for one in weight]
    x, stacked = torch.randn(5, 40), kernels.pack(kept, parts=2)
    for i, one in enumerate(alone):
        product = kernels.project(x, kernels.expert(stacked, i))
        assert torch.equal(product, kernels.project(x, kernels.pack(one, parts=2))), f"expert {i}"
