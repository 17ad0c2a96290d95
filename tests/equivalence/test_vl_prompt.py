"""From messages to logits: our processor and model beside transformers' processor and model."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import (
    Ernie4_5_VLMoeImageProcessorPil,
)

import ernie
from ernie.chat import VL
from ernie.generate import generate
from ernie.tokenizer import Tokenizer
from ernie.vision.prompt import Processor
from ernie.vision.settings import VisionSettings
from tests.helpers import VL_TOKENS, hf_vl, saved
from tests.helpers_vision import grey_clip, png, vl_folder

SETTINGS = VisionSettings(
    image_max_pixels=28 * 28 * 40, video_min_pixels=784, video_max_pixels=28 * 28 * 8
)
NUM_TEXT_IDS = 199  # of the tiny model; those of the tokenizer are folded into them


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vl")
    theirs = hf_vl(0)
    return theirs, ernie.load(saved(theirs, folder / "model"), dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.from_folder(vl_folder(tmp_path_factory.mktemp("tokenizer")))


def folded(tokenizer: Tokenizer, token_ids: list[int]) -> list[int]:
    """The ids of the tiny model for those of the tokenizer; pictures keep their marks."""
    marks = {
        tokenizer.id_of(f"<|{kind.upper()}_{end.upper()}|>"): VL_TOKENS[f"{kind}_{end}_token_id"]
        for kind in ("image", "video")
        for end in ("start", "end")
    }
    marks[tokenizer.id_of("<|IMAGE_PLACEHOLDER|>")] = VL_TOKENS["image_token_id"]
    return [marks.get(i, i % NUM_TEXT_IDS) for i in token_ids]


def photo(height: int, width: int) -> bytes:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack([x * 255 // width, y * 255 // height, (x * y) % 256], -1)
    file = io.BytesIO()
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(file, "JPEG")
    return file.getvalue()


def test_logits_of_a_dialogue_equal_those_of_transformers(models, tokenizer) -> None:
    theirs, ours = models
    files = [photo(120, 75), png("teal", (300, 61)), photo(500, 900)]
    content: list[dict[str, object]] = [{"type": "text", "text": "Which is the odd one?"}]
    content += [{"type": "image", "image": file} for file in files]
    messages = [{"role": "user", "content": content}]
    inputs = Processor(settings=SETTINGS).inputs(VL, tokenizer, messages)
    ids = torch.tensor(folded(tokenizer, inputs.token_ids))
    size = {"shortest_edge": 3136, "longest_edge": SETTINGS.image_max_pixels}
    images = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
    pixels = Ernie4_5_VLMoeImageProcessorPil(size=size)(images, return_tensors="pt")
    image, *marks = (VL_TOKENS[f"image{part}_token_id"] for part in ("", "_start", "_end"))
    kinds = torch.isin(ids, torch.tensor([image, *marks])).long()
    with torch.no_grad():
        wanted = theirs(
            input_ids=ids[None],
            mm_token_type_ids=(ids == image).long()[None],
            moe_mm_token_type_ids=kinds[None],
            **pixels,
        ).logits[0]
        found = ours.logits(ids, inputs.pixel_values, inputs.grid_thw)
    worst = float((found - wanted).abs().max())
    assert worst < 1e-4, f"logits are off by {worst:.2e}"


def test_a_dialogue_with_clips_is_read_and_answered(models, tokenizer) -> None:
    """Frames of another clip change the answer's logits; the same clip in another file does not."""
    _, ours = models
    levels = [(40 * i) % 256 for i in range(20)]
    clips = [grey_clip(levels, codec="mpeg4", form=form) for form in ("mp4", "avi")]
    clips.append(grey_clip(levels[::-1]))
    found = []
    for clip in clips:
        content = [{"type": "video", "video": clip}, {"type": "image", "image": png()}]
        messages = [{"role": "user", "content": content}]
        inputs = Processor(settings=SETTINGS).inputs(VL, tokenizer, messages)
        ids = folded(tokenizer, inputs.token_ids)
        pictures = {"pixel_values": inputs.pixel_values, "grid_thw": inputs.grid_thw}
        with torch.no_grad():
            found.append(ours.logits(ids, **pictures)[-1])
        assert len(list(generate(ours, ids, max_tokens=3, **pictures))) == 3
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
