"""What a model of the family is: the fields of the released `config.json`, and what follows from
them.

Field names are those of the published files, so that reading one is assignment, not translation.
Keys of a file that say nothing about the network (names of classes, training switches, versions)
are kept in `extra` and written back on save.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ernie.nested_config import from_nested, to_nested
from ernie.settings import ConfigError
from ernie.vision.config import MARKERS, VisionConfig


@dataclass(frozen=True, kw_only=True)
class ErnieConfig:
    """One network of the ERNIE 4.5 family.

    Sizes are in elements. The `moe_*` fields are None for a dense model; for the multimodal models
    `moe_num_experts` and `moe_intermediate_size` are pairs (text bank, vision bank).
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int = 103424
    head_dim: int = 128
    max_position_embeddings: int = 131072
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5
    use_bias: bool = False
    tie_word_embeddings: bool = True
    hidden_act: str = "silu"
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = 0

    moe_num_experts: int | tuple[int, ...] | None = None
    moe_k: int | None = None
    moe_intermediate_size: int | tuple[int, ...] | None = None
    moe_num_shared_experts: int = 0
    moe_layer_start_index: int | tuple[int, ...] = 0
    moe_layer_end_index: int | tuple[int, ...] = -1
    moe_layer_interval: int = 1
    moe_norm_min: float = 1e-12
    num_nextn_predict_layers: int = 0

    rope_3d: bool = False
    freq_allocation: int = 20
    im_patch_id: int | None = None  # the placeholder of images and of videos
    image_start_token_id: int | None = None
    image_end_token_id: int | None = None
    video_start_token_id: int | None = None
    video_end_token_id: int | None = None
    video_token_id: int | None = None  # another placeholder of videos, which transformers has
    vision_config: VisionConfig | None = None

    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide "
                f"num_attention_heads={self.num_attention_heads}; key heads serve equal groups"
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"head_dim={self.head_dim} is odd; rotary embedding turns pairs: use an even one"
            )
        if self.hidden_act != "silu":
            raise ConfigError(
                f"hidden_act={self.hidden_act!r} is not part of the family; only 'silu' is"
            )
        if self.is_moe and not 0 < (self.moe_k or 0) <= min(self.experts_per_bank):
            raise ConfigError(
                f"moe_k={self.moe_k} of moe_num_experts={self.moe_num_experts} cannot be chosen"
            )
        counts, has_vision = self.experts_per_bank, self.vision_config is not None
        if (
            len(set(counts)) > 1
            or (has_vision and len(counts) != 2)
            or len(counts) > 1 + has_vision
        ):
            raise ConfigError(
                f"moe_num_experts={list(counts)} is not part of the family; give one number for a "
                "text model, two equal ones (text, vision) for one with a vision_config"
            )
        if has_vision and not self.rope_3d:
            raise ConfigError("rope_3d=false does not go with a vision_config; use true")

    # --- derived sizes ---

    @property
    def is_moe(self) -> bool:
        return bool(self.moe_num_experts)

    @property
    def experts_per_bank(self) -> tuple[int, ...]:
        """Number of routed experts of each bank: `(64,)` for text models, `(64, 64)` with vision
        experts.
        """
        return _as_tuple(self.moe_num_experts) if self.is_moe else ()

    @property
    def expert_sizes(self) -> tuple[int, ...]:
        """Intermediate size of the experts of each bank."""
        sizes = _as_tuple(self.moe_intermediate_size)
        return (
            sizes
            if len(sizes) == len(self.experts_per_bank)
            else sizes * len(self.experts_per_bank)
        )

    @property
    def shared_size(self) -> int:
        """Intermediate size of the shared expert; 0 when there is none. It counts in *text* expert
        sizes.
        """
        return self.expert_sizes[0] * (self.moe_num_shared_experts or 0) if self.is_moe else 0

    @property
    def q_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return () if self.eos_token_id is None else _as_tuple(self.eos_token_id)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` has routed experts. Source: the published configuration classes."""
        if not self.is_moe or (layer + 1) % self.moe_layer_interval:
            return False
        start, end = (
            min(_as_tuple(self.moe_layer_start_index)),
            max(_as_tuple(self.moe_layer_end_index)),
        )
        return start <= layer and (end == -1 or layer <= end)

    # --- cost accounting ---

    def num_params(self, *, active: bool = False, mtp: bool = False) -> int:
        """Parameters of the network, multi-token-prediction block only with `mtp`.

        `active` counts what one text token meets: k experts instead of all, the head but not the
        embedding look-up of an untied model. The shared embedding of a tied model counts once.
        """
        h, bias = self.hidden_size, int(self.use_bias)

        def mlp(size: int) -> int:
            return 3 * h * size + bias * (2 * size + h)

        attention = (
            2 * h * self.q_size + 2 * h * self.kv_size + bias * (self.q_size + 2 * self.kv_size + h)
        )
        dense_layer = attention + 2 * h + mlp(self.intermediate_size)
        total = h  # the final norm
        for layer in range(self.num_hidden_layers):
            if not self.is_moe_layer(layer):
                total += dense_layer
                continue
            banks = zip(self.experts_per_bank, self.expert_sizes)
            if active:
                router = self.experts_per_bank[0] * (h + 1)
                routed = (self.moe_k or 0) * 3 * h * self.expert_sizes[0] + router
            else:
                routed = sum(n * (3 * h * size + h + 1) for n, size in banks)
            total += attention + 2 * h + routed + (mlp(self.shared_size) if self.shared_size else 0)
        total += self.vocab_size * h * (1 if self.tie_word_embeddings or active else 2)
        if mtp:
            total += self.num_nextn_predict_layers * (2 * h + 2 * h * h + dense_layer)
        if self.vision_config and not active:
            total += self.vision_config.num_params + self._num_resampler_params
        return total

    @property
    def _num_resampler_params(self) -> int:
        """Spatial and temporal two-layer networks with LayerNorm, projection to the hidden size,
        RMSNorm.
        """
        vision = self.vision_config
        assert vision is not None
        wide = vision.embed_dim * vision.spatial_merge_size**2
        spatial = 2 * (wide * wide + wide) + 2 * wide
        temporal = (2 * wide * wide + wide) + (wide * wide + wide) + 2 * wide
        return spatial + temporal + wide * self.hidden_size + self.hidden_size + self.hidden_size

    def flops_per_token(self, context_tokens: int) -> float:
        """Floating point operations of one forward pass of a token that sees `context_tokens`."""
        products = self.num_params(active=True) - self.hidden_size
        attention = 2 * self.num_hidden_layers * self.q_size * context_tokens
        return 2.0 * (products + attention)

    def kv_bytes_per_token(self, bytes_per_element: int) -> int:
        """Memory of one token's keys and values over all layers."""
        return 2 * self.num_hidden_layers * self.kv_size * bytes_per_element

    # --- config.json ---

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], origin: str = "config.json") -> ErnieConfig:
        """Read the mapping of a `config.json` of either published layout, or of transformers 5.

        Raises ConfigError for another architecture, missing sizes or a rotary scaling that the
        family does not have.
        """
        raw = dict(raw)
        model_type = raw.get("model_type", "ernie4_5")
        if not str(model_type).startswith("ernie4_5"):
            raise ConfigError(
                f"{origin}: model_type {model_type!r} is not of the ERNIE 4.5 family (ernie4_5...)"
            )
        if isinstance(raw.get("text_config"), Mapping):
            raw = from_nested(raw, origin)
        _unpack_rope(raw, origin)
        reads_pictures = isinstance(raw.get("vision_config"), Mapping)
        for key, only in (_ONLY | (_ONLY_WITH_PICTURES if reads_pictures else {})).items():
            if raw.get(key, only) not in (only, None):
                raise ConfigError(f"{origin}: {key}={raw[key]} is not supported; use {only}")
        names = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        given = {k: _freeze(v) for k, v in raw.items() if k in names and v is not None}
        missing = [
            f.name
            for f in dataclasses.fields(cls)
            if f.default is f.default_factory is dataclasses.MISSING and f.name not in given
        ]
        if missing:
            raise ConfigError(
                f"{origin} lacks {', '.join(missing)}; every model of the family states them"
            )
        if "head_dim" not in given:
            given["head_dim"] = given["hidden_size"] // given["num_attention_heads"]
        if isinstance(given.get("vision_config"), Mapping):
            given["vision_config"] = VisionConfig.from_dict(given["vision_config"], origin)
            given = MARKERS | given
        if not raw.get("quantization_config"):  # as some tools say that there is none
            raw.pop("quantization_config", None)
        return cls(**given, extra={k: v for k, v in raw.items() if k not in names})

    @classmethod
    def from_folder(cls, folder: str | Path) -> ErnieConfig:
        path = Path(folder) / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"{folder} holds no config.json; give the folder of a saved model"
            ) from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{path} is not JSON ({error}); it must be the model's configuration"
            ) from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{path} holds a {type(raw).__name__}; it must hold an object")
        return cls.from_dict(raw, str(path))

    def to_dict(self) -> dict[str, Any]:
        """The mapping to write as `config.json`: the published keys, MoE and vision ones only where
        used.
        """
        values = dataclasses.asdict(self)
        extra = dict(values.pop("extra"))
        if not self.is_moe:
            values = {k: v for k, v in values.items() if not k.startswith("moe_")}
        if self.vision_config:
            tower = values["vision_config"]
            values["vision_config"] = tower.pop("extra") | tower
        else:
            for key in ("rope_3d", "freq_allocation", "vision_config", *MARKERS):
                values.pop(key)
        if not self.num_nextn_predict_layers:
            values.pop("num_nextn_predict_layers")
        kind = (
            "ernie4_5_moe_vl"
            if self.vision_config
            else "ernie4_5_moe"
            if self.is_moe
            else "ernie4_5"
        )
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return (
            {"model_type": kind, "architectures": [_ARCHITECTURES[kind]], "torch_dtype": "bfloat16"}
            | extra
            | values
        )

    def to_nested_dict(self) -> dict[str, Any]:
        """`to_dict` of a multimodal model, as transformers 5 writes it."""
        layers = range(self.num_hidden_layers)
        return to_nested(self.to_dict(), [self.is_moe_layer(i) for i in layers])


# Keys that would mean another network, and the value that the family has.
_ONLY = {
    "compression_ratio": 1.0,
    "moe_group_experts": False,
    "moe_use_token_type_bias": False,
    "mm_vocab_size": 0,
}
# Keys that say nothing of a model of text, where ERNIEKit writes its defaults of them.
_ONLY_WITH_PICTURES = {
    "moe_use_hard_gate": True,
    "spatial_conv_size": 2,
    "temporal_conv_size": 2,
    "use_temporal_conv": True,
}

_ARCHITECTURES = {
    "ernie4_5": "Ernie4_5ForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "ernie4_5_moe_vl": "Ernie4_5_VLMoeForConditionalGeneration",
}


def _unpack_rope(raw: dict[str, Any], origin: str) -> None:
    """transformers 5 nests `rope_theta`; older files have `rope_scaling`, which it adds to that.
    Only the default kind exists.
    """
    nested: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        given = raw.get(key) or {}
        kind = given.get("rope_type", given.get("type", "default"))
        if kind != "default" or given.get("factor", 1) != 1:
            raise ConfigError(
                f"{origin}: {key}={given} is not supported; the family's rotary scaling is "
                "'default', without a factor"
            )
        nested |= given
    if "rope_theta" in nested:
        raw["rope_theta"] = nested["rope_theta"]
    if "mrope_section" in nested:
        *sides, time = nested["mrope_section"]
        if len(sides) != 2 or sides[0] != sides[1]:
            raise ConfigError(
                f"{origin}: mrope_section={nested['mrope_section']} is not supported; give pairs "
                "for height, width and time, with as many for width as for height"
            )
        raw.setdefault("freq_allocation", time)


def _freeze(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_tuple(value: Any) -> tuple:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
