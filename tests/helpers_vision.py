"""Clips, pictures and a tokenizer folder of the multimodal kind for the tests."""

from __future__ import annotations

import base64
import dataclasses
import io
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

import ernie
from ernie.models import TINY
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


def vl_model_folder(folder: Path, **changes: Any) -> Path:
    """A random multimodal model in float32, whose config has `changes`, with a tokenizer."""
    tokenizer = Tokenizer.from_folder(vl_folder(folder))
    changes |= {"vocab_size": tokenizer.vocab_size, **vl_marks(tokenizer)}
    model = ernie.ErnieModel(dataclasses.replace(TINY["tiny-vl"], **changes), dtype=torch.float32)
    model.init_weights(seed=1, std=0.3)
    ernie.save(model, folder)
    return folder


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


@contextmanager
def serving(content: bytes) -> Iterator[tuple[str, list[str]]]:
    """A web server on loopback, its address, and the paths it was asked for."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}", paths
    finally:
        server.shutdown()


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
