"""Configs: published parameter counts, built modules, config.json round trips, refusals."""

from __future__ import annotations

import json

import pytest
import torch

from ernie.config import ErnieConfig
from ernie.model import ErnieModel
from ernie.models import MODELS, TINY
from ernie.settings import ConfigError

# Source: parameter counts of the published checkpoints (model cards; tensors summed).
PUBLISHED = {
    "ERNIE-4.5-0.3B": (360_748_032, 0),
    "ERNIE-4.5-21B-A3B": (21_825_437_888, 123_217_920),
    "ERNIE-4.5-300B-A47B": (299_484_163_264, 989_888_512),
    "ERNIE-4.5-VL-28B-A3B": (29_399_294_336, 0),
    "ERNIE-4.5-VL-424B-A47B": (423_526_285_184, 0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    main, mtp = PUBLISHED[name]
    for variant in (name, f"{name}-Base"):
        config = MODELS[variant].config
        assert config.num_params() == main
        assert config.num_params(mtp=True) - main == mtp


def test_active_parameters_are_the_published_ones() -> None:
    assert MODELS["ERNIE-4.5-21B-A3B"].config.num_params(active=True) == 3_352_150_208
    assert MODELS["ERNIE-4.5-300B-A47B"].config.num_params(active=True) == 47_079_337_152


TEXT = {k: m.config for k, m in MODELS.items() if not m.config.vision_config} | TINY


@pytest.mark.parametrize("name", TEXT)
def test_count_equals_that_of_the_built_model(name: str) -> None:
    model = ErnieModel(TEXT[name], device="meta")
    assert sum(p.numel() for p in model.parameters()) == TEXT[name].num_params(mtp=True)


@pytest.mark.parametrize("name", [*MODELS, *TINY])
def test_config_json_round_trip_is_the_identity(name: str, tmp_path) -> None:
    config = TINY.get(name) or MODELS[name].config
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert ErnieConfig.from_folder(tmp_path) == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"num_key_value_heads": 4}, "num_key_value_heads=4 does not divide"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rotary scaling 'yarn'"),
        ({"moe_k": 9, "moe_num_experts": 8, "moe_intermediate_size": 4}, "moe_k=9"),
        ({"hidden_size": None}, "lacks hidden_size"),
    ],
)
def test_wrong_configs_are_refused_in_one_sentence(change: dict, words: str) -> None:
    raw = TINY["tiny-dense"].to_dict() | change
    with pytest.raises(ConfigError, match=words):
        ErnieConfig.from_dict(raw)


def test_router_and_bias_stay_float32_in_a_bfloat16_model() -> None:
    model = ErnieModel(TINY["tiny-moe"], dtype=torch.bfloat16, device="meta")
    kinds = {
        n.rsplit(".", 2)[-2] + "." + n.rsplit(".", 1)[-1]: p.dtype
        for n, p in model.named_parameters()
    }
    assert kinds["gate.weight"] == kinds["moe_statics.e_score_correction_bias"] == torch.float32
    assert kinds["q_proj.weight"] == kinds["experts.down_proj"] == torch.bfloat16


def test_flops_per_token_count_the_products_of_a_forward_pass() -> None:
    config = MODELS["ERNIE-4.5-0.3B"].config
    by_hand = 0
    for _ in range(18):
        by_hand += 2 * 1024 * (2048 + 256 + 256) + 2 * 2048 * 1024 + 3 * 2 * 1024 * 3072
        by_hand += 2 * 2 * 2048 * 100  # scores and sums over 100 keys
    by_hand += 2 * 1024 * 103424
    assert config.flops_per_token(100) == pytest.approx(by_hand, rel=1e-3)
