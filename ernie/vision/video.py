"""A clip to the rows that the vision tower reads: which frames, their time written on them.

    bytes -> frames chosen -> "time: HH:MM:SS.ss" drawn -> even number -> resized -> patches

Decoded with PyAV (the extra `vision`), imported where it is used. Only the groups of pictures that
hold a chosen frame are decoded. Containers that can name other files (playlists) are not opened.
Bytes are limited by `Sources`, pixels and time here.

The published processor draws the time in Roboto. Where the model folder brings that font it is
used (`settings.font_of`), else Pillow's own, whose letters differ by a few pixels.

Source: the video processor of ERNIE-4.5-VL (PaddleFormers, FastDeploy).
"""

from __future__ import annotations

import random
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ernie.vision.processor import (
    MAX_SOURCE_PIXELS,
    Picture,
    finished,
    in_threads,
    opened,
    put_patches,
    resized,
    target_size,
)
from ernie.vision.settings import VisionSettings
from ernie.vision.sources import MediaError

MAX_SECONDS = 60.0  # of decoding one clip
_FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,ogg,gif"
# What PyAV raises, beside its own errors, on headers that hold no sense.
_BROKEN = (
    *(OSError, ValueError, ArithmeticError, LookupError),
    *(TypeError, AttributeError, RuntimeError, MemoryError),
)
_BATCH = 16  # frames held at their original size


@dataclass(frozen=True)
class _Index:
    """What demuxing tells: the times of all frames, in order, and of those that decoding can begin
    with, in units of the stream; `duration_s` as the published reader has it.
    """

    times: list[int]
    keys: list[int]
    duration_s: float


def clip_picture(
    data: bytes,
    settings: VisionSettings,
    *,
    font: Path | None = None,
    seed: int | None = None,
    max_seconds: float = MAX_SECONDS,
) -> Picture:
    """A clip from a file's bytes. `seed` is for frames drawn at random. Raises MediaError."""
    av = _pyav()
    deadline = time.monotonic() + max_seconds
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "none"}
    try:
        with av.open(
            BytesIO(data),
            options=options,
            io_open=_refuse_other_files,
            metadata_errors="replace",
        ) as container:
            if not container.streams.video:
                raise MediaError("the clip holds no video")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise MediaError("the clip is written in a code that is not read here")
            _check_size(stream.width, stream.height)
            stream.thread_type = "AUTO"
            index = _index(container, stream, deadline, max_seconds)
            chosen = frame_indices(len(index.times), index.duration_s, settings, seed)
            spacing_s = index.duration_s / len(index.times)
            frames = _decoded(container, stream, index, chosen, deadline, max_seconds)
            stamps = [i * spacing_s for i in chosen]
            return _clip(frames, stamps, settings, font)
    except MediaError:
        raise
    except (av.error.FFmpegError, *_BROKEN) as error:
        told = getattr(error, "strerror", None) or type(error).__name__
        raise MediaError(f"the clip cannot be decoded: {told}") from None


def frames_picture(
    frames: Sequence[bytes | Image.Image],
    settings: VisionSettings,
    *,
    times_s: Sequence[float] | None = None,
    font: Path | None = None,
) -> Picture:
    """A clip given as its frames, all of which are used; `times_s` are drawn on them if given."""
    if not frames or (times_s is not None and len(times_s) != len(frames)):
        raise MediaError(
            f"a clip of {len(frames)} frames has {len(times_s or ())} times; expected a frame or "
            "more, and a time for each or for none"
        )
    check_num_frames(len(frames), settings)
    return _clip(map(opened, frames), times_s or [None] * len(frames), settings, font)


def check_num_frames(num_frames: int, settings: VisionSettings) -> None:
    """Refuse more frames than a clip may have."""
    if num_frames > settings.video_max_frames:
        raise MediaError(
            f"a clip is given as {num_frames} frames; the limit is {settings.video_max_frames}"
        )


def frame_indices(
    num_frames: int, duration_s: float, settings: VisionSettings, seed: int | None = None
) -> list[int]:
    """The frames that stand for a clip: ascending numbers below `num_frames`.

    n = duration x rate, within the limits of frames and no more than there are; the clip is cut
    into n parts at linspace(0, num_frames, n + 1), and one frame of each part is taken.
    """
    wanted = settings.video_target_frames
    if wanted < 1:
        wanted = int(duration_s * settings.video_fps)
        wanted = min(max(wanted, settings.video_min_frames), settings.video_max_frames)
    wanted = min(wanted, num_frames)
    borders = np.linspace(0, num_frames, wanted + 1).astype(int).tolist()
    parts = [(first, after - 1) for first, after in pairwise(borders)]
    if settings.video_frames_sample == "leading":
        return [first for first, _ in parts]
    if settings.video_frames_sample == "middle":
        return [(first + last) // 2 for first, last in parts]
    draw = random.Random(seed)
    return [draw.randint(first, last) for first, last in parts]


def timestamp(seconds: float) -> str:
    """`time: 00:01:02.50`."""
    minutes, rest = seconds // 60, seconds % 60
    return f"time: {int(minutes // 60):02d}:{int(minutes % 60):02d}:{rest:05.02f}"


def stamped(frame: Image.Image, text: str, font: Path | None = None) -> Image.Image:
    """A copy with `text` in the upper left corner, black with a white edge, a tenth of the shorter
    side high.
    """
    size = max(1, int(min(frame.size) * 0.1))
    frame = frame.copy()
    ImageDraw.Draw(frame).text(
        (0, 0),
        text,
        font=_font(font, size),
        fill=(0, 0, 0),
        stroke_width=int(size * 0.1),
        stroke_fill=(255, 255, 255),
    )
    return frame


def _clip(
    frames: Iterator[Image.Image],
    stamps: Sequence[float | None],
    settings: VisionSettings,
    font: Path | None,
) -> Picture:
    """Frames, as they come, into the rows of one clip; memory for a batch of them at a time."""
    patch, merge = settings.patch_size, settings.merge_size
    t = len(stamps) + len(stamps) % 2
    rows, h, w = np.empty((0, 0), np.uint8), 0, 0

    def put(work: tuple[int, Image.Image]) -> None:
        i, frame = work
        stamp = stamps[i]
        if settings.render_timestamp and stamp is not None:
            frame = stamped(frame, timestamp(stamp), font)
        pixels = resized(frame, h * patch, w * patch)
        put_patches(pixels, rows[i * h * w : (i + 1) * h * w], patch, merge)

    batch: list[tuple[int, Image.Image]] = []
    for i, frame in enumerate(frames):
        if not i:
            low, high = settings.video_min_pixels, settings.video_max_pixels
            height, width = target_size(frame.height, frame.width, low, high, settings.factor)
            h, w = height // patch, width // patch
            rows = np.empty((t * h * w, 3 * patch * patch), np.uint8)
        batch.append((i, frame))
        if len(batch) == _BATCH:
            in_threads(put, batch)
            batch = []
    in_threads(put, batch)
    if t > len(stamps):  # the resampler joins two frames at a time
        rows[-h * w :] = rows[-2 * h * w : -h * w]
    return finished("video", rows, (t, h, w), settings)


def _index(container: Any, stream: Any, deadline: float, max_seconds: float) -> _Index:
    times: list[int] = []
    keys: list[int] = []
    num_packets = 0
    for packet in container.demux(stream):
        if num_packets % 256 == 0:
            _check_clock(deadline, max_seconds)
        if packet.size == 0 and packet.pts is None:  # the end
            continue
        num_packets += 1
        when = packet.pts if packet.pts is not None else packet.dts
        if when is None:
            raise MediaError("the clip has frames without a time; convert it to MP4 or WebM")
        if packet.is_keyframe:
            keys.append(when)
        if not packet.is_discard:
            times.append(when)
    if not times:
        raise MediaError("the clip has no frames")
    if num_packets < stream.frames:
        raise MediaError(f"the clip ends after {num_packets} of {stream.frames} frames")
    rate = stream.average_rate
    span_s = float((max(times) - min(times)) * stream.time_base)
    return _Index(sorted(times), sorted(keys), len(times) / float(rate) if rate else span_s)


def _decoded(
    container: Any,
    stream: Any,
    index: _Index,
    chosen: Sequence[int],
    deadline: float,
    max_seconds: float,
) -> Iterator[Image.Image]:
    """The chosen frames; a frame that the decoder leaves out is replaced by the next one, or the
    last there is.
    """
    container.seek(0, backward=True)
    decoder, frame = container.decode(stream), None
    for i in chosen:
        wanted = index.times[i]
        before = bisect_right(index.keys, wanted)
        key = index.keys[before - 1] if before else None
        if key is not None and (frame is None or frame.pts < key):
            container.seek(key, stream=stream, backward=True)
            decoder = container.decode(stream)
            frame = next(decoder, None)
            if frame is None or frame.pts > wanted:  # some containers seek only roughly
                container.seek(0, backward=True)
                decoder, frame = container.decode(stream), None
        while frame is None or frame.pts < wanted:
            _check_clock(deadline, max_seconds)
            following = next(decoder, None)
            if following is None:
                break
            frame = following
        if frame is None:
            raise MediaError("the clip has no frame that can be decoded")
        _check_size(frame.width, frame.height)
        image = frame.to_image()
        yield image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _check_size(width: int, height: int) -> None:
    if not 0 < width * height <= MAX_SOURCE_PIXELS:
        raise MediaError(
            f"the clip has frames of {width} x {height} pixels; the limit is {MAX_SOURCE_PIXELS}"
        )


def _check_clock(deadline: float, max_seconds: float) -> None:
    if time.monotonic() > deadline:
        raise MediaError(
            f"decoding the clip takes longer than {max_seconds:g} s; send a part of it"
        )


def _refuse_other_files(url: str, flags: int, options: dict[str, str]) -> Any:
    raise MediaError("the clip names another file, and those are not opened")


@lru_cache(maxsize=32)
def _font(path: Path | None, size: int) -> Any:
    try:
        return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)
    except OSError:
        raise MediaError(f"{path} is not a font that can be read") from None


def _pyav() -> Any:
    try:
        import av
    except ModuleNotFoundError:
        raise MediaError("reading clips needs PyAV: pip install 'ernie-open[vision]'") from None
    return av
