"""Quantised folders: what is read serves exactly like what was quantised at load."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ernie
from ernie import kernels
from ernie.checkpoint.folder import CheckpointError
from ernie.checkpoint.quantized import write_quantized
from ernie.fused import Shard, fuse, shallow_copy
from ernie.kernels import QuantTensor, reference
from ernie.model import ErnieModel
from ernie.models import TINY
from ernie.quant.scheme import SCHEMES, read_scheme
from ernie.settings import ConfigError
from fastdeploy import LLM, SamplingParams

IDS = torch.arange(23) * 5 % 191
MIXED = '{"quantization": "mix_quant", "dense_quant_type": "none", "moe_quant_type": "wint4"}'
BANKS = MIXED.replace("}", ', "image_moe_quant_type": "wint8"}')


@pytest.fixture(params=TINY)
def plain_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model = ErnieModel(TINY[request.param], dtype=torch.bfloat16)
    model.init_weights(seed=1, std=0.3)
    ernie.save(model, tmp_path / "plain")
    return tmp_path / "plain"


@pytest.mark.parametrize("quantization", [*SCHEMES, MIXED, BANKS])
def test_folder_serves_like_quantising_at_load(plain_folder: Path, quantization: str) -> None:
    folder = plain_folder.parent / "quantised"
    write_quantized(plain_folder, folder, quantization)
    plain = ernie.load(plain_folder)
    scheme = read_scheme(quantization, has_experts=plain.config.is_moe)
    assert scheme is not None
    expected = fuse(plain, scheme).logits(IDS)
    read = fuse(ernie.load(folder, keep_integers=True))
    assert torch.equal(read.logits(IDS), expected)
    config = json.loads((folder / "config.json").read_text())
    bits = 8 if quantization == BANKS else scheme.experts
    assert config["quantization_config"].pop("vision_experts") == bits
    if bits == scheme.experts:  # folders that do not say it have one number for both banks
        (folder / "config.json").write_text(json.dumps(config))
        assert torch.equal(fuse(ernie.load(folder, keep_integers=True)).logits(IDS), expected)


def test_load_without_integers_gives_their_values(plain_folder: Path) -> None:
    folder = plain_folder.parent / "quantised"
    write_quantized(plain_folder, folder, "wint4_all")
    plain = dict(ernie.load(plain_folder, dtype=torch.float32).named_parameters())
    for name, value in ernie.load(folder, dtype=torch.float32).named_parameters():
        original = plain.get(name, plain["model.embed_tokens.weight"])
        bits = 6 if name == "lm_head.weight" else 4
        if ("_proj" in name and "linear_proj" not in name) or name == "lm_head.weight":
            original = kernels.quantize(original, bits).dequantized()
        assert torch.equal(value, original), name


def test_what_is_made_of_the_values_is_a_plain_model(plain_folder: Path) -> None:
    folder, again = plain_folder.parent / "quantised", plain_folder.parent / "again"
    write_quantized(plain_folder, folder, "wint8")
    with pytest.raises(CheckpointError, match="is quantised already"):
        write_quantized(folder, again, "wint4")
    model = ernie.load(folder, dtype=torch.float32)
    kept = {name for name, p in model.named_parameters() if p.dtype != torch.float32}
    assert not kept
    ernie.save(model, again)
    assert torch.equal(ernie.load(again, dtype=torch.float32).logits(IDS), model.logits(IDS))
    assert "quantization_config" not in json.loads((again / "config.json").read_text())


def test_quantised_folder_in_the_engine(plain_folder: Path) -> None:
    folder = plain_folder.parent / "quantised"
    write_quantized(plain_folder, folder, "wint8")
    params = SamplingParams(max_tokens=8, temperature=0)
    answers = [
        llm.generate([IDS.tolist()], params, use_tqdm=False)[0].outputs.token_ids
        for llm in (
            LLM(str(folder), max_model_len=64),
            LLM(str(plain_folder), max_model_len=64, quantization="wint8"),
        )
    ]
    assert answers[0] == answers[1]
    with pytest.raises(ConfigError, match="quantised already; leave it out"):
        LLM(str(folder), max_model_len=64, quantization="wint8")
    with pytest.raises(CheckpointError, match="quantised already"):
        write_quantized(folder, folder.parent / "again", "wint4")


def test_ranks_of_integers_together_equal_the_whole() -> None:
    config = dataclasses.replace(
        TINY["tiny-dense"],
        hidden_size=64,
        num_attention_heads=8,
        intermediate_size=128,
        vocab_size=198,
    )
    model = ErnieModel(config, dtype=torch.float32)
    model.init_weights(seed=1)
    for module in model.modules():
        if isinstance(weight := getattr(module, "weight", None), torch.Tensor) and (
            weight.dim() == 2 and weight is not model.head_weight
        ):
            del module.weight
            module.weight = reference.quantize(weight.detach(), 4)
    whole = fuse(shallow_copy(model))
    ranks = [fuse(shallow_copy(model), None, Shard(rank, 2)) for rank in range(2)]
    x = torch.randn(5, config.hidden_size)
    norm = whole.model.layers[0].post_norm
    expected = whole.model.layers[0].mlp(x, norm)
    out = sum(rank.model.layers[0].mlp(x, norm) for rank in ranks)
    assert float((out - expected).abs().max()) < 1e-4


def test_slices_of_columns_end_at_groups() -> None:
    weight = reference.quantize(torch.randn(4, 48), 4)
    with pytest.raises(ValueError, match="multiple of 32"):
        weight.chunk(2, -1)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("dim", [-1, -2])
def test_chunks_hold_the_values_of_the_whole(bits: int, dim: int) -> None:
    weight = reference.quantize(torch.randn(3, 8, 128), bits)
    parts = weight.chunk(2, dim)
    joined = torch.cat([part.dequantized() for part in parts], dim)
    assert torch.equal(joined, weight.dequantized())
    if dim == -2:
        assert torch.equal(QuantTensor.cat(parts).dequantized(), weight.dequantized())


def test_integers_in_a_plain_folder_are_refused(plain_folder: Path) -> None:
    file = plain_folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight .* is int8"):
        ernie.load(plain_folder)


def test_folder_of_another_program_is_refused(plain_folder: Path) -> None:
    file = plain_folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(CheckpointError, match="another program"):
        ernie.load(plain_folder)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("int3", "int3.* is not known; use one of wint8"),
        ("{", "is not a JSON object"),
        ('{"quantization": "w4a8"}', "w4a8.* is not known"),
        ('{"quantization": "wint8", "moe_quant_type": "wint4"}', "wint8 has 8 bits.*=wint4"),
        ('{"quantization": "wint8", "kv_cache_quant_type": "fp4"}', "kv_cache_quant_type='fp4'"),
        ('{"quantization": "mix_quant", "dense_quant_type": "fp8"}', "dense_quant_type='fp8'"),
        ('{"quantization": "mix_quant", "bits": 4}', "bits"),
    ],
)
def test_unknown_schemes_are_refused_in_a_sentence(given: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_scheme(given, has_experts=True)


def test_wint4_means_experts_only_where_there_are_experts() -> None:
    assert read_scheme("wint4", has_experts=True) == SCHEMES["wint4"]
    assert read_scheme("wint4", has_experts=False) == SCHEMES["wint4_all"]
    for has_experts in (True, False):
        named = read_scheme("wint4", has_experts=has_experts)
        assert read_scheme('{"quantization": "wint4"}', has_experts=has_experts) == named


def test_a_named_scheme_takes_a_form_of_the_cache() -> None:
    given = '{"quantization": "wint4", "moe_quant_type": "wint4", "kv_cache_quant_type": "int8"}'
    wanted = dataclasses.replace(SCHEMES["wint4"], kv_cache="int8")
    assert read_scheme(given, has_experts=True) == wanted
