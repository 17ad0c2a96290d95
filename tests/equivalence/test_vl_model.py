"""The multimodal network equals transformers' in float32: tower, resampler, every layer, the choice
of experts, logits, greedy tokens, gradients.

Rows of `MODELS` bend one size each, rows of `PROMPTS` are what may stand in a sequence. Where
transformers differs from how the released models were trained (`ernie.vision.positions`), both are
tested: ours against numbers written out, and transformers' network when it is given ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import ernie
from ernie.attention import packed_causal
from ernie.generate import generate
from ernie.model import ErnieModel
from ernie.moe.router import Routing
from ernie.vision.grids import num_rows
from tests.helpers import VL_TOKENS, hf_vl, saved

IMAGE, START, END = (VL_TOKENS[f"image{part}_token_id"] for part in ("", "_start", "_end"))
VIDEO, VIDEO_START, VIDEO_END = (
    VL_TOKENS[f"video{part}_token_id"] for part in ("", "_start", "_end")
)

MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tied": False},
    "no shared expert": {"moe_num_shared_experts": 0},
    "two dense layers": {"mlp_layer_types": ["dense", "dense", "sparse"]},
    "vision experts as large": {"moe_intermediate_size": [24, 24]},
    "wide heads": {
        "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
        "mrope_section": [5, 5, 6],
    },
    "narrow tower": {"tower": {"hidden_size": 32, "intermediate_size": 56, "num_heads": 8}},
    "all experts chosen": {"moe_k": 8},
}  # fmt: skip


@dataclass
class Case:
    """One sequence, for both programs."""

    ids: Tensor
    kinds: Tensor  # 0 text, 1 image, 2 video, without the markers
    images: list[tuple[int, int, int]]
    videos: list[tuple[int, int, int]]
    grids: list[tuple[int, int, int]]  # of both, in order of appearance
    patches: list[Tensor]  # of each grid

    @property
    def pictures(self) -> dict[str, Tensor]:
        """For ours."""
        if not self.grids:
            return {}
        return {"pixel_values": torch.cat(self.patches), "grid_thw": torch.tensor(self.grids)}

    @property
    def inputs(self) -> dict[str, Any]:
        """For theirs."""
        markers = torch.isin(self.ids, torch.tensor([START, END, VIDEO_START, VIDEO_END]))
        inputs: dict[str, Any] = {
            "input_ids": self.ids[None],
            "mm_token_type_ids": self.kinds[None],
            "moe_mm_token_type_ids": (self.kinds.bool() | markers).long()[None],
        }
        for pixels, grid, is_image in (
            ("pixel_values", "image_grid_thw", True),
            ("pixel_values_videos", "video_grid_thw", False),
        ):
            chosen = [g for g, p in enumerate(self.grids) if (p[0] == 1) == is_image]
            if chosen:
                inputs[pixels] = torch.cat([self.patches[g] for g in chosen])
                inputs[grid] = torch.tensor([self.grids[g] for g in chosen])
        return inputs


def case(*parts: int | tuple[int, int, int], seed: int = 0) -> Case:
    """Numbers are tokens of text, grids are pictures with markers around them."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    kinds: list[int] = []
    grids = [part for part in parts if isinstance(part, tuple)]
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(0, 199, (part,), generator=generator).tolist()
            kinds += [0] * part
            continue
        is_video, rows = part[0] > 1, num_rows(part)
        start, token, end = (VIDEO_START, VIDEO, VIDEO_END) if is_video else (START, IMAGE, END)
        ids += [start, *[token] * rows, end]
        kinds += [0, *[2 if is_video else 1] * rows, 0]
    patches = [torch.randn(t * h * w, 588, generator=generator) for t, h, w in grids]
    images, videos = ([g for g in grids if (g[0] == 1) == wanted] for wanted in (True, False))
    return Case(torch.tensor(ids), torch.tensor(kinds), images, videos, grids, patches)


PROMPTS = {
    "text": case(31),
    "one image": case(7, (1, 4, 6), 9),
    "image at both ends": case((1, 2, 2), 5, (1, 6, 4)),
    "several images": case(3, (1, 4, 4), 2, (1, 2, 8), (1, 6, 2), 5),
    "video": case(4, (4, 4, 6), 6),
    "images and videos": case(4, (1, 4, 2), 1, (2, 4, 4), 2, (6, 8, 6), (1, 2, 2), 3),
}


def pair(row: str, folder: Path, seed: int = 0) -> tuple[PreTrainedModel, ErnieModel]:
    """A random transformers model, and ours as the real loader reads its folder; float32."""
    theirs = hf_vl(seed, **MODELS[row])
    return theirs, ernie.load(saved(theirs, folder), dtype=torch.float32)


def gap(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} is not {tuple(theirs.shape)}"
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("row", MODELS)
def test_tower_and_resampler_equal_transformers(row: str, tmp_path: Path) -> None:
    theirs, ours = pair(row, tmp_path)
    for name in ("one image", "several images", "video", "images and videos"):
        c = PROMPTS[name]
        grids, patches = torch.tensor(c.grids), torch.cat(c.patches)
        with torch.no_grad():
            tower = theirs.model.vision_tower(patches, grids).last_hidden_state
            rows = theirs.model.resampler_model(tower, grids)
            assert ours.vision_model is not None
            worst = gap(ours.vision_model(patches, c.grids, torch.float32), tower)
            assert worst < 1e-4, f"{name}: the tower is off by {worst:.2e}"
            worst = gap(ours.picture_rows(patches, c.grids), rows)
            assert worst < 1e-4, f"{name}: the resampler is off by {worst:.2e}"


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("row", MODELS)
def test_every_layer_the_experts_and_the_logits_equal_transformers(
    row: str, prompt: str, tmp_path: Path
) -> None:
    if row not in ("plain", "wide heads") and prompt != "images and videos":
        pytest.skip("the other models meet the prompt that has everything")
    theirs, ours = pair(row, tmp_path)
    c = PROMPTS[prompt]
    with torch.no_grad():
        reference = theirs(**c.inputs, output_hidden_states=True, output_router_logits=True)
        routings: list[Routing | None] = []
        p = ours.prompt(c.ids, **c.pictures)
        bounds = torch.tensor([0, len(c.ids)], dtype=torch.int32)
        hidden = ours.hidden(
            p.token_ids_T, p.positions, packed_causal(bounds),
            modality=p.modality_T, embeds=p.embeds, routings=routings,
        )  # fmt: skip
        logits = ours.head(hidden)
    worst = gap(logits, reference.logits[0])
    assert reference.logits.std() > 0.1 and worst < 1e-4, f"logits are off by {worst:.2e}"
    layers = hidden_by_layer(ours, c)
    for i, (own, other) in enumerate(zip(layers[:-1], reference.hidden_states[1:-1], strict=True)):
        worst = gap(own, other[0])
        assert worst < 1e-4, f"layer {i} is off by {worst:.2e}"
    vision = c.inputs["moe_mm_token_type_ids"][0].bool()
    routed = [routing for routing in routings if routing is not None]
    for routing, scores in zip(routed, reference.router_logits, strict=True):
        parts = [routing.logits_TE] if not vision.any() else [b.logits_TE for b in routing.banks]
        expected = [scores[~vision], scores[vision]][: len(parts)]
        for own, other in zip(parts, expected, strict=True):
            assert gap(own, other) < 1e-4


def hidden_by_layer(model: ErnieModel, c: Case) -> list[Tensor]:
    """The stream behind every block."""
    layers: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _block, _args, out: layers.append(out[0]))
        for block in model.model.layers
    ]
    model.logits(c.ids, **c.pictures)
    for hook in hooks:
        hook.remove()
    return layers
