"""A picture to the rows that the vision tower reads.

    bytes -> RGB, upright, over white -> both sides multiples of 28 -> patches of 14 x 14

    P patches, each a row of 588 = 3 channels x 14 x 14 pixels, uint8. The four patches of a token
    (2 x 2) stand together; tokens go row by row, frames one after the other:

        frame, token row, token column, patch row, patch column | channel, pixel row, pixel column

    grid = (t, h, w): frames, and patches down and across; P = t * h * w

Pixels stay uint8, as published: the model normalises them in float32 (`normalized` is its table).
Source: the image processor of ERNIE-4.5-VL (PaddleFormers) and that of transformers.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from ernie.vision.settings import MEAN, RESCALE, STD, VisionSettings
from ernie.vision.sources import MediaError

MAX_SOURCE_PIXELS = 48 << 20  # 50 megapixels: at 8 bytes each, Pillow then needs 400 MiB
MAX_RATIO = 200
_ORIENTATION = 0x0112  # of EXIF
_MAX_SCANS = 100  # of a progressive JPEG: each costs a pass over all pixels, and a few bytes
# Formats whose readers start programs, read other files, only know a header, or decode the picture
# within (ICO, ICNS) before they tell its size.
_REFUSED_FORMATS = {"EPS", "WMF", "FPX", "MIC", "BUFR", "GRIB", "HDF5", "MPEG", "ICO", "ICNS"}
# What Pillow's readers raise on bytes that are not what they claim to be.
_BROKEN = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    ArithmeticError,
    TypeError,
    AttributeError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture or clip as the model takes it.

    kind: "image" or "video". rows: (P, 588) uint8. grid: (t, h, w) with t * h * w = P.
    num_tokens: placeholders that stand for it in a prompt.
    digest: sha256 of pixels and shape: equal for equal results of the vision tower.
    """

    kind: str
    rows: np.ndarray
    grid: tuple[int, int, int]
    num_tokens: int
    digest: str


def image_picture(source: bytes | Image.Image, settings: VisionSettings) -> Picture:
    """One picture, from a file's bytes or an opened image. Raises MediaError."""
    image = opened(source)
    low, high = settings.image_min_pixels, settings.image_max_pixels
    width, height = image.size
    return picture_of("image", [resized(image, *target_size(height, width, low, high))], settings)


def picture_of(kind: str, frames: Sequence[np.ndarray], settings: VisionSettings) -> Picture:
    """Frames (H, W, 3) uint8 of one size, which is a multiple of 28, as one picture or clip."""
    patch, merge = settings.patch_size, settings.merge_size
    height, width, _ = frames[0].shape
    t, h, w = len(frames), height // patch, width // patch
    rows = np.empty((t * h * w, 3 * patch * patch), np.uint8)
    for i, frame in enumerate(frames):
        put_patches(frame, rows[i * h * w : (i + 1) * h * w], patch, merge)
    return finished(kind, rows, (t, h, w), settings)


def finished(
    kind: str, rows: np.ndarray, grid: tuple[int, int, int], settings: VisionSettings
) -> Picture:
    t, h, w = grid
    num_tokens = -(-t // 2) * h * w // settings.merge_size**2  # two frames share their tokens
    digest = hashlib.sha256(repr((grid, settings.patch_size, settings.merge_size)).encode())
    digest.update(rows.data)
    return Picture(kind, rows, grid, num_tokens, digest.hexdigest())


def opened(source: bytes | Image.Image) -> Image.Image:
    """The picture in RGB, 8 bits a channel. Raises MediaError for what cannot be decoded.

    The first frame of an animation. Turned upright as its EXIF says. 16-bit grey is divided by 256;
    other wide modes are cut at 0 and 255, as Pillow does. Transparent pixels are laid over white.
    Source: ERNIE's data pipeline; turning: transformers' `load_image`.
    """
    if not isinstance(source, (bytes, Image.Image)):
        raise MediaError(f"a picture is given as {type(source).__name__}; expected bytes")
    try:
        image = source if isinstance(source, Image.Image) else _identified(source)
        width, height = image.size
        if width * height > MAX_SOURCE_PIXELS or not width * height:
            raise MediaError(
                f"the picture has {width} x {height} pixels; the limit is {MAX_SOURCE_PIXELS}"
            )
        image.load()
        return _over_white(_upright(image))
    except MediaError:
        raise
    except _BROKEN as error:
        raise MediaError(f"the picture cannot be decoded: {_cause(error)}") from None


def target_size(
    height: int, width: int, min_pixels: int, max_pixels: int, factor: int = 28
) -> tuple[int, int]:
    """(height, width) to resize to: multiples of `factor` with about the same proportions and an
    area between the limits.

    A picture that is over 200 times as long as it is wide is taken for one of exactly that.
    Source: `smart_resize` of ERNIE-4.5-VL; transformers refuses such pictures instead.
    """
    if max(height, width) > MAX_RATIO * min(height, width):
        short = max(factor, round(min(height, width) / factor) * factor)
        long = math.floor(short * MAX_RATIO / factor) * factor
        height, width = (long, short) if height > width else (short, long)
    high = max(factor, round(height / factor) * factor)
    wide = max(factor, round(width / factor) * factor)
    if high * wide > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        high = max(factor, math.floor(height / shrink / factor) * factor)
        wide = max(factor, math.floor(width / shrink / factor) * factor)
    elif high * wide < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        high = math.ceil(height * grow / factor) * factor
        wide = math.ceil(width * grow / factor) * factor
    if not min_pixels <= high * wide <= max_pixels:
        raise MediaError(
            f"a picture of {width} x {height} pixels cannot be resized to between {min_pixels} and "
            f"{max_pixels} pixels with sides of multiples of {factor}; widen the limits"
        )
    return high, wide


def resized(image: Image.Image, height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8, by Pillow's bicubic filter on uint8, which the model was trained
    with.
    """
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def put_patches(pixels: np.ndarray, rows: np.ndarray, patch: int = 14, merge: int = 2) -> None:
    """Write one frame, (H, W, 3) uint8, as patches into `rows`, (H * W / patch**2, 3 * patch**2).

    In two steps that each copy long runs: whole lines of patches, then the channels apart.
    """
    height, width, _ = pixels.shape
    down, across = height // (patch * merge), width // (patch * merge)
    line = np.dtype((np.void, patch * 3))
    lines = np.ascontiguousarray(pixels).reshape(down, merge, patch, across, merge, -1).view(line)
    together = np.ascontiguousarray(lines[..., 0].transpose(0, 3, 1, 4, 2))
    interleaved = together.view(np.uint8).reshape(len(rows), patch * patch, 3)
    apart = rows.reshape(len(rows), 3, patch * patch)
    for channel in range(3):
        apart[:, channel] = interleaved[:, :, channel]


def normalized(rows: np.ndarray) -> np.ndarray:
    """(P, 588) float32 of uint8 rows: (x / 255 - mean) / std, in float32, as transformers has it.

    For models that do not normalise themselves; the 3 x 256 possible values are computed once.
    """
    mean, std = (np.array(values, np.float32)[:, None] for values in (MEAN, STD))
    scaled = (np.arange(256, dtype=np.float64) * RESCALE).astype(np.float32)
    table = (scaled - mean) / std
    out = np.empty(rows.shape, np.float32)
    size = rows.shape[1] // 3
    for channel in range(3):
        span = slice(channel * size, (channel + 1) * size)
        np.take(table[channel], rows[:, span], out=out[:, span], mode="clip")
    return out


def in_threads(
    function: Callable[[T], R], items: Sequence[T], num_threads: int | None = None
) -> list[R]:
    """`function` of every item, in order, one thread a core: decoding and resizing hold no lock."""
    if num_threads is None:
        has_affinity = hasattr(os, "sched_getaffinity")
        num_threads = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    num_threads = min(num_threads, len(items))
    if num_threads < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(function, items))


def _identified(data: bytes) -> Image.Image:
    if not data:
        raise MediaError("the picture has 0 bytes")
    if data.count(b"\xff\xda") > _MAX_SCANS and data.startswith(b"\xff\xd8"):
        raise MediaError(f"the picture is a JPEG of more than {_MAX_SCANS} scans")
    Image.init()
    formats = [name for name in Image.ID if name not in _REFUSED_FORMATS]
    return Image.open(BytesIO(data), formats=formats)


def _upright(image: Image.Image) -> Image.Image:
    try:
        is_turned = image.getexif().get(_ORIENTATION, 1) != 1
        return ImageOps.exif_transpose(image) if is_turned else image
    except _BROKEN:  # EXIF that cannot be read turns nothing
        return image


def _of_8_bits(image: Image.Image) -> Image.Image:
    """The upper bytes of grey integers of 16 bits, as which Pillow also opens those of 9 to 15;
    other numbers as they are, where they are in the range of 8 bits.
    """
    pixels = np.asarray(image)
    low, high = pixels.min(), pixels.max()
    has_16 = image.mode != "F" and (image.mode != "I" or high > 255)
    is_unit = image.mode == "F" and 0 < high <= 1
    if not 0 <= low <= high < (1 << 16 if has_16 else 256) or is_unit:
        raise MediaError(f"the picture has pixels from {low} to {high}; give it in 8 or 16 bits")
    return Image.fromarray((pixels >> 8 if has_16 else pixels).astype(np.uint8))


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        image = _of_8_bits(image)
    if image.has_transparency_data:
        layer = image if image.mode == "RGBA" else image.convert("RGBA")
        if layer.getchannel("A").getextrema() != (255, 255):
            white = Image.new("RGB", image.size, (255, 255, 255))
            white.paste(layer, mask=layer)
            return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _cause(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is in no format that is read here"
    return str(error).split("\n")[0][:120] or type(error).__name__
