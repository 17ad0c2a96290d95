"""Configs: published parameter counts, built modules, config.json round trips, refusals."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import Ernie4_5_VLMoeConfig

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


CONFIGS = {k: m.config for k, m in MODELS.items()} | TINY


@pytest.mark.parametrize("name", CONFIGS)
def test_count_equals_that_of_the_built_model(name: str) -> None:
    model = ErnieModel(CONFIGS[name], device="meta")
    assert sum(p.numel() for p in model.parameters()) == CONFIGS[name].num_params(mtp=True)


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
        ({"rope_scaling": {"rope_type": "yarn"}}, "rotary scaling is 'default'"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "yarn"}},
            "rope_scaling={'type': 'yarn'} is not supported",
        ),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling={'factor': 2.0} is not supported"),
        ({"moe_k": 9, "moe_num_experts": 8, "moe_intermediate_size": 4}, "moe_k=9"),
        ({"hidden_size": None}, "lacks hidden_size"),
    ],
)
def test_wrong_configs_are_refused_in_one_sentence(change: dict, words: str) -> None:
    raw = TINY["tiny-dense"].to_dict() | change
    with pytest.raises(ConfigError, match=words):
        ErnieConfig.from_dict(raw)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"moe_num_experts": [64, 32]}, r"moe_num_experts=\[64, 32\]"),
        ({"moe_num_experts": 64}, "two equal ones"),
        ({"vision_config": None}, "one number for a text model"),
        ({"rope_3d": False}, "rope_3d=false"),
        ({"use_temporal_conv": False}, "use_temporal_conv=False is not supported; use True"),
        ({"mm_vocab_size": 8192}, "mm_vocab_size=8192"),
        ({"vision_config": {"hidden_act": "gelu"}}, "vision_config.hidden_act='gelu'"),
        ({"vision_config": {"num_heads": 7}}, "num_heads=7"),
        ({"rope_scaling": {"mrope_section": [20, 24, 20]}}, r"mrope_section=\[20, 24, 20\]"),
        (
            {"text_config": {"num_hidden_layers": 3, "mlp_layer_types": ["sparse", "dense"] * 2}},
            "mlp_layer_types must name 3 layers",
        ),
    ],
)
def test_wrong_multimodal_configs_are_refused_in_one_sentence(change: dict, words: str) -> None:
    raw = MODELS["ERNIE-4.5-VL-28B-A3B"].config.to_dict() | change
    with pytest.raises(ConfigError, match=words):
        ErnieConfig.from_dict(raw)


def test_what_is_of_pictures_is_not_asked_of_a_model_of_text() -> None:
    """ERNIEKit writes its defaults of these keys beside full training of models of text."""
    text = TINY["tiny-moe"].to_dict()
    for key, value in {"moe_use_hard_gate": False, "use_temporal_conv": False}.items():
        assert ErnieConfig.from_dict(text | {key: value}).extra[key] is value
        with pytest.raises(ConfigError, match=f"{key}=False is not supported; use True"):
            ErnieConfig.from_dict(PUBLISHED_VL | {key: value})


# Keys and values of ERNIE-4.5-VL-28B-A3B-PT, with what says nothing about the network.
PUBLISHED_TOWER = {
    "attn_implementation": "eager", "attn_sep": True, "depth": 32, "embed_dim": 1280,
    "hidden_act": "quick_gelu", "hidden_size": 1280, "in_channels": 3, "in_chans": 3,
    "mlp_ratio": 4, "model_type": "DFNRope_vision_transformer", "num_heads": 16,
    "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
    "vit_first_fwd_bsz": 128,
}  # fmt: skip
PUBLISHED_VL = {
    "model_type": "ernie4_5_moe_vl", "hidden_size": 2560, "num_hidden_layers": 28,
    "num_attention_heads": 20, "num_key_value_heads": 4, "intermediate_size": 12288,
    "vocab_size": 103424, "head_dim": 128, "max_position_embeddings": 131072,
    "rope_theta": 500000, "rms_norm_eps": 1e-5, "use_bias": False, "tie_word_embeddings": True,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "moe_num_experts": [64, 64], "moe_k": 6, "moe_intermediate_size": [1536, 512],
    "moe_num_shared_experts": 2, "moe_layer_start_index": [1, 1],
    "moe_layer_end_index": [29, 28], "moe_layer_interval": 1, "moe_gate": "topk",
    "moe_use_aux_free": True, "moe_norm_min": 1e-12, "moe_use_hard_gate": True,
    "im_patch_id": 100295, "image_start_token_id": 101304, "image_end_token_id": 101305,
    "video_start_token_id": 101306, "video_end_token_id": 101307, "rope_3d": True,
    "freq_allocation": 20, "rope_scaling": {"type": "default", "mrope_section": [22, 22, 20]},
    "spatial_conv_size": 2, "temporal_conv_size": 2, "use_temporal_conv": True,
    "pixel_hidden_size": 1280, "mm_vocab_size": 0, "vision_config": PUBLISHED_TOWER,
}  # fmt: skip


def test_published_multimodal_config_is_read_as_the_model_of_the_table() -> None:
    config = ErnieConfig.from_dict(PUBLISHED_VL)
    assert config == MODELS["ERNIE-4.5-VL-28B-A3B"].config
    no_shared = ErnieConfig.from_dict({**PUBLISHED_VL, "moe_num_shared_experts": None})
    assert no_shared.shared_size == 0
    written = config.to_dict()
    tower = written.pop("vision_config")
    assert tower.items() >= PUBLISHED_TOWER.items(), "keys of the tower are lost"
    rest = {k: v for k, v in PUBLISHED_VL.items() if k != "vision_config"}
    assert written.items() >= rest.items()


def test_transformers_and_the_table_mean_the_same_model() -> None:
    """Its defaults are ERNIE-4.5-VL-28B-A3B; it takes our nested form of the published config."""
    last = {"moe_layer_end_index": (27, 27)}
    config = replace(MODELS["ERNIE-4.5-VL-28B-A3B"].config, **last)
    theirs = Ernie4_5_VLMoeConfig()
    ours = ErnieConfig.from_dict(json.loads(json.dumps(theirs.to_dict())))
    assert replace(ours, bos_token_id=1, eos_token_id=2, pad_token_id=0) == config
    nested = ErnieConfig.from_dict(PUBLISHED_VL).to_nested_dict()
    again = Ernie4_5_VLMoeConfig(**json.loads(json.dumps(nested)))
    for part in ("text_config", "vision_config"):
        wanted, given = getattr(theirs, part).to_dict(), getattr(again, part).to_dict()
        given["rope_parameters"].pop("mrope_section", None)  # the default, which it leaves out
        named = {"bos_token_id", "eos_token_id", "pad_token_id"}
        differ = {k for k in wanted if wanted[k] != given.get(k)} - named
        assert not differ, f"{part}: {[(k, wanted[k], given.get(k)) for k in differ]}"
    assert again.video_token_id == theirs.video_token_id


@pytest.mark.parametrize("name", [n for n, c in CONFIGS.items() if c.vision_config])
def test_nested_config_round_trip_gives_the_same_network(name: str) -> None:
    config = CONFIGS[name]
    again = ErnieConfig.from_dict(config.to_nested_dict())
    last = (config.num_hidden_layers - 1,) * 2  # the last layer may be named by a larger number
    assert again == replace(config, moe_layer_end_index=last)


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
