"""Clips, pictures and a tokenizer folder of the multimodal kind for the tests."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from PIL import Image

from ernie.tokenizer import Tokenizer
from tests import helpers_tokenizer

VL_SPECIAL = (
    "<|IMAGE_START|>",
    "<|IMAGE_END|>",
    "<|VIDEO_START|>",
    "<|VIDEO_END|>",
    "<think>",
    "</think>",
)


def vl_folder(folder: Path) -> Path:
    """A trained SentencePiece tokenizer with the special tokens of ERNIE-4.5-VL."""
    special = [*helpers_tokenizer.ERNIE_SPECIAL, *VL_SPECIAL]
    symbols = [token for token in special if token != "<mask:1>"]
    return helpers_tokenizer.sentencepiece_folder(folder, user_defined_symbols=symbols)


def vl_marks(tokenizer: Tokenizer) -> dict[str, int | None]:
    """The fields of a config that name the tokens of pictures."""
    marks = {
        f"{kind}_{end}_token_id": tokenizer.id_of(f"<|{kind.upper()}_{end.upper()}|>")
        for kind in ("image", "video")
        for end in ("start", "end")
    }
    return marks | {
        "im_patch_id": tokenizer.id_of("<|IMAGE_PLACEHOLDER|>"),
        "video_token_id": None,
    }


def grey_clip(
    levels: Sequence[int],
    *,
    size: tuple[int, int] = (64, 96),
    fps: int = 10,
    codec: str = "mpeg4",
    form: str = "mp4",
    keyframe_every: int = 12,
    times: Sequence[int] | None = None,
) -> bytes:
    """A clip whose frame i is grey of `levels[i]`, shown at `times[i]` / fps."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.gop_size = keyframe_every
        for i, level in enumerate(levels):
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), level, np.uint8), "rgb24")
            frame.pts = times[i] if times else i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def png(color: str | tuple[int, ...] = "red", size: tuple[int, int] = (60, 80)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()
