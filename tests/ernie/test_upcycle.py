"""Upcycling: the mixture of experts answers as the dense model did, and can learn to differ."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import ernie
from ernie.attention import packed_causal
from ernie.checkpoint.folder import CheckpointError
from ernie.checkpoint.upcycle import upcycle
from ernie.settings import ConfigError
from tests.helpers import hf_dense, hf_logits, hf_moe, saved, some_ids


@pytest.mark.parametrize("layout", ["pt", "paddle"])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_shared_experts": 0, "first_moe_layer": 0},
        {"num_shared_experts": 1, "num_experts": 5, "top_k": 5},
        {"num_shared_experts": 3, "top_k": 1, "first_moe_layer": 2, "router_std": 1.0},
    ],
    ids=str,
)
def test_the_function_stays_the_same(shape, layout, tmp_path):
    reference = hf_dense(1, intermediate_size=96)
    saved(reference, tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", layout=layout, **shape)
    model = ernie.load(tmp_path / "moe", dtype=torch.float32)
    assert model.config.is_moe
    assert model.config.moe_layer_start_index == shape.get("first_moe_layer", 1)
    ids = some_ids(23, 199)
    assert (model.logits(ids) - hf_logits(reference, ids)).abs().max() < 1e-4


def test_transformers_reads_the_result(tmp_path):
    reference = hf_dense(2, intermediate_size=96)
    upcycle(saved(reference, tmp_path / "dense"), tmp_path / "moe")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32)
    assert type(model).__name__ == "Ernie4_5_MoeForCausalLM"
    ids = some_ids(23, 199)
    assert (hf_logits(model, ids) - hf_logits(reference, ids)).abs().max() < 1e-4


def test_tokens_spread_over_experts_whose_gradients_differ(tmp_path):
    upcycle(saved(hf_dense(3, intermediate_size=96), tmp_path / "dense"), tmp_path / "moe")
    model = ernie.load(tmp_path / "moe", dtype=torch.float32)
    ids = torch.tensor(some_ids(64, 199))
    routings: list = []
    attend = packed_causal(torch.tensor([0, 64], dtype=torch.int32))
    hidden = model.hidden(ids, torch.arange(64), attend, routings=routings)
    model.head(hidden).logsumexp(-1).sum().backward()
    assert routings[0] is None
    used = routings[1].load_E > 0
    assert used.sum() > 4, routings[1].load_E
    gradients = model.model.layers[1].mlp.experts.down_proj.grad[used].flatten(1)
    gaps = torch.cdist(gradients, gradients) + torch.eye(len(gradients))
    assert (gaps > 1e-3).all(), gaps


def test_the_seed_decides_the_routers(tmp_path):
    saved(hf_dense(4, intermediate_size=96), tmp_path / "dense")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        upcycle(tmp_path / "dense", tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_other_files_and_dtype_come_along(tmp_path):
    folder = saved(hf_dense(5, intermediate_size=96).bfloat16(), tmp_path / "dense")
    (folder / "generation_config.json").write_text('{"top_p": 0.8}')
    upcycle(folder, tmp_path / "moe")
    assert json.loads((tmp_path / "moe" / "generation_config.json").read_text()) == {"top_p": 0.8}
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and config["model_type"] == "ernie4_5_moe"
    assert config["architectures"] == ["Ernie4_5_MoeForCausalLM"]


@pytest.mark.parametrize(
    ("sizes", "options", "words"),
    [
        ({"intermediate_size": 88}, {}, "use one of 0, 1, 3, 7, 10"),
        ({}, {"num_shared_experts": -1}, "num_shared_experts=-1"),
        ({}, {"first_moe_layer": 3}, "use 0 to 2"),
        ({}, {"top_k": 9}, "moe_k=9"),
        ({"use_bias": True}, {}, "use_bias=true"),
    ],
    ids=str,
)
def test_what_cannot_be_dealt_out_is_refused(sizes, options, words, tmp_path):
    saved(hf_dense(6, **{"intermediate_size": 96, **sizes}), tmp_path / "dense")
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        upcycle(tmp_path / "dense", tmp_path / "moe", **options)
    assert words in str(caught.value)
    assert not (tmp_path / "moe").exists()


def test_model_that_has_experts_already(tmp_path):
    saved(hf_moe(7), tmp_path / "source")
    with pytest.raises(CheckpointError, match="moe_num_experts=8"):
        upcycle(tmp_path / "source", tmp_path / "moe")
