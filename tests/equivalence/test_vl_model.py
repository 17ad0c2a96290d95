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
from ernie.model import Embeds, ErnieModel
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
    grids: list[tuple[int, int, int]]  # of images and videos, in order of appearance
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
    return Case(torch.tensor(ids), torch.tensor(kinds), grids, patches)


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


# Two models meet every prompt, the others the one that has everything.
PAIRS = [(row, prompt) for row in ("plain", "wide heads") for prompt in PROMPTS]
PAIRS += [(row, "images and videos") for row in MODELS if row not in ("plain", "wide heads")]


@pytest.mark.parametrize(("row", "prompt"), PAIRS)
def test_every_layer_the_experts_and_the_logits_equal_transformers(
    row: str, prompt: str, tmp_path: Path
) -> None:
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


@pytest.mark.parametrize("prompt", ["text", "several images", "images and videos"])
def test_greedy_tokens_equal_transformers(prompt: str, tmp_path: Path) -> None:
    theirs = hf_vl(1, **MODELS["untied"])
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "layers" in name and weight.dim() > 1 and "gate.weight" not in name:
                weight *= 4  # so that what is generated is not one token for ever
    ours = ernie.load(saved(theirs, tmp_path), dtype=torch.float32)
    c = PROMPTS[prompt]
    reference = theirs.generate(
        **c.inputs, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    tokens = list(generate(ours, c.ids.tolist(), max_tokens=24, **c.pictures))
    assert tokens == reference[0, len(c.ids) :].tolist()
    assert len(set(tokens)) > 3, "tokens that never change would agree by chance"


def test_generating_with_a_cache_equals_reading_everything_anew(tmp_path: Path) -> None:
    _, ours = pair("plain", tmp_path, seed=2)
    c = PROMPTS["video"]
    tokens = list(generate(ours, c.ids.tolist(), max_tokens=6, **c.pictures))
    ids = c.ids.tolist()
    for token in tokens:
        assert int(ours.logits(ids, **c.pictures)[-1].argmax()) == token
        ids.append(token)


@pytest.mark.parametrize("prompt", ["one image", "images and videos"])
def test_gradients_of_one_step_equal_transformers(prompt: str, tmp_path: Path) -> None:
    theirs, ours = pair("plain", tmp_path)
    c = PROMPTS[prompt]
    theirs(**c.inputs, labels=c.ids[None]).loss.backward()
    for parameter in ours.parameters():
        assert parameter.requires_grad == (parameter.shape != (2, 8)), (
            "all but the bias are trained"
        )
    p = ours.prompt(c.ids, **c.pictures)
    bounds = torch.tensor([0, len(c.ids)], dtype=torch.int32)
    logits = ours.head(ours.read(p, packed_causal(bounds)))
    torch.nn.functional.cross_entropy(logits[:-1], c.ids[1:]).backward()
    expected = gradients_by_our_names(theirs)
    for name, parameter in ours.named_parameters():
        if name.endswith("e_score_correction_bias"):
            continue
        assert parameter.grad is not None, name
        other = expected.pop(name)
        scale = float(other.abs().max())
        assert scale > 0, f"{name} has no gradient"
        worst = gap(parameter.grad, other) / scale
        assert worst < 1e-3, f"{name} is off by {worst:.2e} of its largest gradient"
    assert not expected


def gradients_by_our_names(theirs: PreTrainedModel) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    renamed = {}
    for name, gradient in found.items():
        for old, new in (
            ("model.language_model.", "model."), ("model.vision_tower.", "vision_model."),
            ("text_moe.gate.", "gate."), ("vision_moe.gate.", "vision_gate."),
            ("text_moe.experts.", "experts."), ("vision_moe.experts.", "vision_experts."),
            ("_linear.fc1.", "_linear.0."), ("_linear.fc2.", "_linear.2."),
            ("_linear.ln.", "_linear.3."),
        ):  # fmt: skip
            name = name.replace(old, new)
        renamed[name] = gradient
    return renamed


def test_packed_sequences_equal_separate_ones(tmp_path: Path) -> None:
    _, ours = pair("plain", tmp_path)
    cases = [PROMPTS[name] for name in ("one image", "text", "video")]
    prompts = [ours.prompt(c.ids, **c.pictures) for c in cases]
    lengths = [len(c.ids) for c in cases]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    grids = [grid for c in cases for grid in c.grids]
    patches = torch.cat([rows for c in cases for rows in c.patches])
    places, start = [], 0
    for prompt, length in zip(prompts, lengths):
        if prompt.embeds is not None:
            places.append(prompt.embeds.places_L + start)
        start += length
    with torch.no_grad():
        hidden = ours.hidden(
            torch.cat([p.token_ids_T for p in prompts]),
            torch.cat([p.positions for p in prompts], 1),
            packed_causal(bounds),
            modality=torch.cat([p.modality_T for p in prompts if p.modality_T is not None]),
            embeds=Embeds(ours.picture_rows(patches, grids), torch.cat(places)),
        )
        packed = ours.head(hidden)
    separate = torch.cat([ours.logits(c.ids, **c.pictures) for c in cases])
    assert gap(packed, separate) < 1e-4


def test_one_placeholder_for_both_kinds_of_picture_is_the_same_as_two(tmp_path: Path) -> None:
    _, ours = pair("plain", tmp_path)
    c = PROMPTS["images and videos"]
    ids = c.ids.clone()
    ids[ids == VIDEO] = IMAGE
    assert torch.equal(ours.logits(ids, **c.pictures), ours.logits(c.ids, **c.pictures))


def test_long_video_of_small_frames_goes_on_behind_its_last_pair(tmp_path: Path) -> None:
    """Where transformers and the training differ in positions, the networks still agree."""
    theirs, ours = pair("plain", tmp_path)
    c = case(4, (12, 4, 4), 5)
    p = ours.prompt(c.ids, **c.pictures)
    following = p.positions[:, -5:]
    assert following[0].tolist() == list(range(5 + 6 + 1, 5 + 6 + 6)), "6 pairs behind 5 tokens"
    grid = torch.tensor([[12, 4, 4]])
    published, _ = theirs.model.get_rope_index(c.ids[None], c.kinds[None], video_grid_thw=grid)
    assert published[0, 0, -1] == p.positions[0, -1] - 4, "transformers goes on among the frames"
    with torch.no_grad():
        reference = theirs(**c.inputs, position_ids=p.positions[:, None])
        other = theirs(**c.inputs)
    logits = ours.logits(c.ids, **c.pictures)
    assert gap(logits, reference.logits[0]) < 1e-4
    assert gap(logits, other.logits[0]) > 1e-3


@pytest.mark.parametrize("is_original", [True, False])
def test_transformers_to_us_and_back(is_original: bool, tmp_path: Path) -> None:
    """Both forms of names that transformers writes are read, to the bit; it reads what we write."""
    theirs = hf_vl(3, **MODELS["untied"])
    folder = saved(theirs, tmp_path / "theirs", save_original_format=is_original)
    ours = ernie.load(folder, dtype=torch.float32)
    assert ours.layout == ("pt" if is_original else "transformers")
    ernie.save(ours, tmp_path / "ours", layout="transformers")
    again, info = type(theirs).from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    for (name, p), (other, q) in zip(theirs.named_parameters(), again.named_parameters()):
        assert name == other and torch.equal(p, q), name
    c = PROMPTS["one image"]
    again.set_experts_implementation("eager")
    with torch.no_grad():
        assert gap(ours.logits(c.ids, **c.pictures), again(**c.inputs).logits[0]) < 1e-4
