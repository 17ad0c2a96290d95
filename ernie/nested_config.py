"""The `config.json` of multimodal models as transformers 5 has it, and as the release has it.

transformers nests the language model's keys under `text_config`, names a few things differently and
lists the kind of every layer; the released files are flat. Both are read (`from_nested`), both are
written (`to_nested`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ernie.settings import ConfigError

# Keys of the whole in transformers, and the release's name of each.
_TOP = {
    "image_token_id": "im_patch_id",
    "image_start_token_id": "image_start_token_id",
    "image_end_token_id": "image_end_token_id",
    "video_start_token_id": "video_start_token_id",
    "video_end_token_id": "video_end_token_id",
    "video_token_id": "video_token_id",
    "tie_word_embeddings": "tie_word_embeddings",
}
# Keys of the language model that are the same in both.
_TEXT = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "vocab_size", "max_position_embeddings", "rms_norm_eps", "use_bias",
    "hidden_act", "bos_token_id", "eos_token_id", "pad_token_id", "moe_k", "moe_intermediate_size",
    "moe_num_shared_experts", "moe_norm_min",
)  # fmt: skip
_REPLACED = ("moe_num_experts", "mlp_layer_types", "rope_parameters", "model_type")


def from_nested(raw: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The flat mapping of a nested one, as `ErnieConfig.from_dict` takes it.

    Raises ConfigError for layers that the flat keys cannot say.
    """
    text = dict(raw["text_config"])
    tied = raw.get("tie_word_embeddings", text.pop("tie_word_embeddings", True))
    rest = {
        k: v for k, v in raw.items() if k not in _TOP and k not in ("text_config", "model_type")
    }
    flat = {k: v for k, v in text.items() if k not in _REPLACED} | rest
    flat |= {ours: raw[theirs] for theirs, ours in _TOP.items() if theirs in raw}
    experts, rope = text.get("moe_num_experts", 64), text.get("rope_parameters") or {}
    first, last = _moe_layers(text, origin)
    return flat | {
        "model_type": "ernie4_5_moe_vl",
        "tie_word_embeddings": tied,
        "moe_num_experts": [experts, experts] if isinstance(experts, int) else experts,
        "moe_layer_start_index": [first, first],
        "moe_layer_end_index": [last, last],
        "rope_3d": True,
        "rope_parameters": rope,
    }


def _moe_layers(text: Mapping[str, Any], origin: str) -> tuple[int, int]:
    """The first and the last layer with experts."""
    count = text.get("num_hidden_layers")
    if count is None:
        raise ConfigError(f"{origin} lacks text_config.num_hidden_layers; every model states it")
    kinds = text.get("mlp_layer_types") or ["dense"] + ["sparse"] * (count - 1)
    layers = [i for i, kind in enumerate(kinds) if kind == "sparse"]
    whole = bool(layers) and layers == list(range(layers[0], layers[-1] + 1))
    if len(kinds) != count or not set(kinds) <= {"dense", "sparse"} or not whole:
        raise ConfigError(
            f"{origin}: mlp_layer_types must name {count} layers 'dense' or 'sparse' with the "
            f"sparse ones in a row, not {', '.join(map(str, kinds))}"
        )
    return layers[0], layers[-1]


def to_nested(flat: Mapping[str, Any], is_moe_layer: list[bool]) -> dict[str, Any]:
    """The nested mapping of what `ErnieConfig.to_dict` gives for a multimodal model."""
    own = {*_TOP.values(), *_TEXT, "moe_num_experts", "rope_theta", "freq_allocation", "rope_3d"}
    own |= {"moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"}
    own |= {"rope_parameters", "rope_scaling"}
    text = {k: flat[k] for k in _TEXT if k in flat}
    time, pairs = flat["freq_allocation"], flat["head_dim"] // 2
    side = (pairs - time) // 2
    text |= {
        "model_type": "ernie4_5_vl_moe_text",
        "moe_num_experts": flat["moe_num_experts"][0],
        "mlp_layer_types": ["sparse" if moe else "dense" for moe in is_moe_layer],
        "tie_word_embeddings": flat["tie_word_embeddings"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": flat["rope_theta"],
            "mrope_section": [side, side, time],
        },
    }
    tower = dict(flat["vision_config"])
    width, ratio = tower.pop("embed_dim"), tower.pop("mlp_ratio")
    tower |= {
        "model_type": "ernie4_5_vl_moe_vision",
        "hidden_size": width,
        "intermediate_size": round(width * ratio),
    }
    top = {theirs: flat[ours] for theirs, ours in _TOP.items() if flat.get(ours) is not None}
    rest = {k: v for k, v in flat.items() if k not in own}
    return rest | top | {
        "model_type": "ernie4_5_vl_moe",
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "text_config": text,
        "vision_config": tower,
    }  # fmt: skip
