"""The vision tower's part of a config, and the tokens that stand for pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ernie.settings import ConfigError

# Placeholders and markers of pictures, the same in all multimodal models. The last one is what the
# tokenizer of transformers adds behind the published vocabulary.
MARKERS: dict[str, Any] = {
    "im_patch_id": 100295,
    "image_start_token_id": 101304,
    "image_end_token_id": 101305,
    "video_start_token_id": 101306,
    "video_end_token_id": 101307,
    "video_token_id": 103367,
}


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The vision tower (`vision_config` of the published files)."""

    depth: int = 32
    embed_dim: int = 1280
    mlp_ratio: float = 4
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2

    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if self.embed_dim % (4 * self.num_heads):
            raise ConfigError(
                f"vision_config: num_heads={self.num_heads} gives embed_dim={self.embed_dim} heads "
                "whose width is not a multiple of 4; rows and columns turn pairs of each half"
            )

    @property
    def intermediate_size(self) -> int:
        return round(self.embed_dim * self.mlp_ratio)

    @property
    def patch_elements(self) -> int:
        """Elements of a patch: channels, rows, columns."""
        return self.in_channels * self.patch_size**2

    @property
    def num_params(self) -> int:
        """Patch embedding without bias; blocks with biased qkv, proj, fc1, fc2 and two LayerNorms;
        LayerNorm.
        """
        d, wide = self.embed_dim, self.intermediate_size
        block = 4 * d * d + 4 * d + 2 * d * wide + wide + d + 4 * d
        return d * self.patch_elements + self.depth * block + 2 * d

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], origin: str = "config.json") -> VisionConfig:
        """Read `vision_config` of either published layout, or of transformers 5.

        Raises ConfigError where the tower is not the family's.
        """
        raw = dict(raw)
        turn = (raw.get("rope_parameters") or {}).get("rope_theta", 10000)
        for key, given, wanted in (
            ("hidden_act", raw.get("hidden_act", "quick_gelu"), "quick_gelu"),
            ("temporal_merge_size", raw.get("temporal_merge_size", 2), 2),
            ("rope_theta", turn, 10000),
        ):
            if given != wanted:
                raise ConfigError(
                    f"{origin}: vision_config.{key}={given!r} is not part of the family; "
                    f"only {wanted!r} is"
                )
        if "embed_dim" not in raw and "hidden_size" in raw:  # transformers 5
            raw["embed_dim"] = raw["hidden_size"]
            if "intermediate_size" in raw:
                raw["mlp_ratio"] = raw["intermediate_size"] / raw["hidden_size"]
        names = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        sizes = {k: v for k, v in raw.items() if k in names and v is not None}
        return cls(**sizes, extra={k: v for k, v in raw.items() if k not in names})
