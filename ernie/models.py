"""The released models as data, and tiny ones of the same kinds for tests.

A new size is one entry here and one line in `tests/golden/param_counts.json`.
Source: the published `config.json` files and model cards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ernie.config import ErnieConfig
from ernie.vision.config import MARKERS, VisionConfig


@dataclass(frozen=True)
class Model:
    """A released model."""

    config: ErnieConfig
    description: str


_0_3B = ErnieConfig(
    hidden_size=1024,
    num_hidden_layers=18,
    num_attention_heads=16,
    num_key_value_heads=2,
    intermediate_size=3072,
)

_21B = ErnieConfig(
    hidden_size=2560,
    num_hidden_layers=28,
    num_attention_heads=20,
    num_key_value_heads=4,
    intermediate_size=12288,
    moe_num_experts=64,
    moe_k=6,
    moe_intermediate_size=1536,
    moe_num_shared_experts=2,
    moe_layer_start_index=1,
    moe_layer_end_index=27,
    num_nextn_predict_layers=1,
)

_300B = ErnieConfig(
    hidden_size=8192,
    num_hidden_layers=54,
    num_attention_heads=64,
    num_key_value_heads=8,
    intermediate_size=28672,
    tie_word_embeddings=False,
    moe_num_experts=64,
    moe_k=8,
    moe_intermediate_size=3584,
    moe_layer_start_index=3,
    moe_layer_end_index=53,
    num_nextn_predict_layers=1,
)

_VISION: dict[str, Any] = {
    **MARKERS,
    "rope_3d": True,
    "vision_config": VisionConfig(),
    "num_nextn_predict_layers": 0,
    "moe_num_experts": (64, 64),
}

_VL_28B = replace(
    _21B,
    moe_intermediate_size=(1536, 512),
    moe_layer_start_index=(1, 1),
    moe_layer_end_index=(29, 28),
    **_VISION,
)
_VL_424B = replace(
    _300B,
    moe_intermediate_size=(3584, 1536),
    moe_layer_start_index=(3, 3),
    moe_layer_end_index=(53, 53),
    **_VISION,
)

MODELS: dict[str, Model] = {
    "ERNIE-4.5-0.3B-Base": Model(_0_3B, "dense text model, pre-trained"),
    "ERNIE-4.5-0.3B": Model(_0_3B, "dense text model, post-trained"),
    "ERNIE-4.5-21B-A3B-Base": Model(_21B, "MoE text model, pre-trained"),
    "ERNIE-4.5-21B-A3B": Model(_21B, "MoE text model, post-trained"),
    "ERNIE-4.5-300B-A47B-Base": Model(_300B, "MoE text model, pre-trained"),
    "ERNIE-4.5-300B-A47B": Model(_300B, "MoE text model, post-trained"),
    "ERNIE-4.5-VL-28B-A3B-Base": Model(_VL_28B, "text, image and video, pre-trained"),
    "ERNIE-4.5-VL-28B-A3B": Model(_VL_28B, "text, image and video, post-trained"),
    "ERNIE-4.5-VL-424B-A47B-Base": Model(_VL_424B, "text, image and video, pre-trained"),
    "ERNIE-4.5-VL-424B-A47B": Model(_VL_424B, "text, image and video, post-trained"),
    "ERNIE-4.5-21B-A3B-Thinking": Model(
        replace(_21B, num_nextn_predict_layers=0), "MoE text model that reasons first"
    ),
    "ERNIE-4.5-VL-28B-A3B-Thinking": Model(_VL_28B, "multimodal model that reasons first"),
}

# Networks of the same kinds, small enough for a test: odd sizes on purpose.
TINY: dict[str, ErnieConfig] = {
    "tiny-dense": ErnieConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=88,
        vocab_size=199,
        max_position_embeddings=512,
    ),
    "tiny-moe": ErnieConfig(
        hidden_size=40,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=72,
        vocab_size=211,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        moe_num_experts=8,
        moe_k=3,
        moe_intermediate_size=24,
        moe_num_shared_experts=2,
        moe_layer_start_index=1,
        num_nextn_predict_layers=1,
    ),
    "tiny-vl": ErnieConfig(
        hidden_size=40,
        num_hidden_layers=3,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=72,
        vocab_size=211,
        max_position_embeddings=512,
        moe_num_experts=(8, 8),
        moe_k=3,
        moe_intermediate_size=(24, 10),
        moe_num_shared_experts=2,
        moe_layer_start_index=(1, 1),
        moe_layer_end_index=(2, 2),
        rope_3d=True,
        freq_allocation=2,
        im_patch_id=200,
        image_start_token_id=201,
        image_end_token_id=202,
        video_start_token_id=203,
        video_end_token_id=204,
        video_token_id=205,
        vision_config=VisionConfig(depth=2, embed_dim=16, mlp_ratio=3, num_heads=2),
    ),
}
