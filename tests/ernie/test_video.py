"""Clips to patch rows: which frames, against loops and a full decode; stamps; hostile files."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import io
import socket
import struct
import threading
from pathlib import Path
from types import SimpleNamespace

import av
import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageDraw, ImageFont

from ernie.vision import video
from ernie.vision.processor import picture_of, resized
from ernie.vision.settings import VisionSettings
from ernie.vision.sources import MediaError
from ernie.vision.video import clip_picture, frame_indices, frames_picture, stamped, timestamp
from tests.helpers_vision import grey_clip, png

SMALL = VisionSettings(
    video_min_pixels=784, video_max_pixels=28 * 28 * 12, video_min_frames=2, render_timestamp=False
)


def slow_indices(num_frames, duration_s, s, sample):
    """The published rule in integers and loops."""
    n = s.video_target_frames
    if n < 1:
        n = max(s.video_min_frames, min(s.video_max_frames, int(duration_s * s.video_fps)))
    n = min(n, num_frames)
    found = []
    for i in range(n):
        first, after = int(num_frames / n * i), int(num_frames / n * (i + 1))
        if i == n - 1:
            after = num_frames
        found.append(first if sample == "leading" else (first + after - 1) // 2)
    return found


@given(
    st.integers(1, 3000),
    st.floats(0, 400),
    st.floats(0.1, 40),
    st.integers(1, 20),
    st.integers(20, 400),
    st.sampled_from([-1, 1, 7, 64]),
)
@settings(max_examples=100)
def test_frames_are_those_of_the_published_rule(total, duration_s, fps, low, high, target) -> None:
    for sample in ("leading", "middle", "rand"):
        s = VisionSettings(
            video_fps=fps,
            video_min_frames=low,
            video_max_frames=high,
            video_target_frames=target,
            video_frames_sample=sample,
        )
        chosen = frame_indices(total, duration_s, s, seed=5)
        slow = slow_indices(total, duration_s, s, sample)
        assert len(chosen) == len(slow) and len(set(chosen)) == len(chosen)
        assert chosen == sorted(chosen) and chosen[0] >= 0 and chosen[-1] < total
        if sample != "rand":  # linspace and a product may round a border to either side
            assert max(abs(a - b) for a, b in zip(chosen, slow)) <= 1
        assert chosen == frame_indices(total, duration_s, s, seed=5)


def test_frames_of_a_known_clip() -> None:
    s = VisionSettings()  # 2 frames a second, at least 16
    assert frame_indices(300, 10.0, s) == list(range(0, 300, 15))
    middle = dataclasses.replace(s, video_frames_sample="middle")
    assert frame_indices(300, 10.0, middle) == list(range(7, 300, 15))
    assert len(frame_indices(300, 1.0, s)) == 16
    assert frame_indices(5, 0.2, s) == [0, 1, 2, 3, 4]
    assert len(frame_indices(100_000, 3600.0, s)) == 180


@pytest.fixture(scope="module")
def peer():
    """transformers' own functions of the video processor, taken out of its file: the module itself
    needs torchvision.
    """
    package = importlib.util.find_spec("transformers")
    path = Path(package.origin).parent / "models" / "ernie4_5_vl_moe"
    tree = ast.parse((path / "video_processing_ernie4_5_vl_moe.py").read_text("utf-8"))
    wanted = {"sample_frames", "_convert_timestamp", "_render_image_with_timestamp"}
    functions = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in wanted
    ]
    assert len(functions) == 3
    names = {
        "torch": torch,
        "ImageDraw": ImageDraw,
        "ImageFont": ImageFont,
        "VideoMetadata": object,
        "to_pil_image": Image.fromarray,
        "pil_to_tensor": np.asarray,
    }
    future = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module([*future, *functions], []), str(path), "exec"), names)
    return SimpleNamespace(**{name: names[name] for name in wanted})


def test_leading_frames_are_those_of_transformers(peer) -> None:
    s = VisionSettings()
    bounds = SimpleNamespace(num_frames=None, min_frames=16, max_frames=180)
    compared = different = 0
    for total in range(1, 2000, 7):
        for frame_rate in (10, 24, 25, 30):
            metadata = SimpleNamespace(total_num_frames=total, fps=frame_rate)
            theirs = peer.sample_frames(bounds, metadata, fps=2).tolist()
            ours = frame_indices(total, total / frame_rate, s)
            # They keep a broken number of frames, and one frame too many where sums round up
            is_whole = (total / frame_rate * 2) % 1 == 0 or not 16 < total / frame_rate * 2 < 180
            if is_whole and len(theirs) == len(ours):
                compared += 1
                different += ours != theirs
                assert max(abs(x - y) for x, y in zip(ours, theirs)) <= 1
    assert compared > 300 and different <= compared // 20, (different, compared)


def test_times_are_drawn_as_transformers_draws_them(peer) -> None:
    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    own = SimpleNamespace(font=str(font))
    for size, seconds in (((200, 300), 0.0), ((57, 91), 61.25), ((640, 480), 36123.999)):
        frame = np.full((*size, 3), 120, np.uint8)
        text = peer._convert_timestamp(own, seconds)
        assert timestamp(seconds) == text
        theirs = peer._render_image_with_timestamp(own, frame, text)
        np.testing.assert_array_equal(stamped(Image.fromarray(frame), text, font), theirs)


LEVELS = [(i * 37) % 250 for i in range(50)]


@pytest.mark.parametrize(
    ("codec", "form"),
    [
        ("mpeg4", "mp4"),
        ("libx264", "mp4"),
        ("libvpx-vp9", "webm"),
        ("mpeg4", "avi"),
        ("mpeg4", "matroska"),
        ("mpeg2video", "mpegts"),
    ],
)
@pytest.mark.parametrize("keyframe_every", [1, 5, 50])
def test_chosen_frames_equal_those_of_a_full_decode(codec, form, keyframe_every) -> None:
    """Seeking, where frames are stored in another order than they are shown, loses nothing."""
    data = grey_clip(LEVELS, codec=codec, form=form, keyframe_every=keyframe_every)
    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    assert len(frames) == 50
    for sample, target in (("leading", -1), ("middle", -1), ("rand", 7), ("leading", 50)):
        s = dataclasses.replace(SMALL, video_frames_sample=sample, video_target_frames=target)
        picture = clip_picture(data, s, seed=3)
        chosen = frame_indices(50, 5.0, s, seed=3)
        pixels = [resized(frames[i], 56, 84) for i in chosen]
        pixels += pixels[-1:] * (len(pixels) % 2)
        np.testing.assert_array_equal(picture.rows, picture_of("video", pixels, s).rows)
        assert picture.grid == (len(pixels), 4, 6)
        assert picture.num_tokens == len(pixels) // 2 * 6


def test_an_odd_number_of_frames_repeats_the_last() -> None:
    frames = [Image.new("RGB", (84, 56), color) for color in ("red", "lime", "blue")]
    odd = frames_picture(frames, SMALL)
    assert odd.grid == (4, 4, 6) and odd.num_tokens == 12
    assert odd.digest == frames_picture([*frames, frames[-1]], SMALL).digest
    single = clip_picture(grey_clip([100]), SMALL)
    assert single.grid[0] == 2 and (single.rows[:24] == single.rows[24:]).all()


def test_frames_of_varying_rate_and_size() -> None:
    data = grey_clip([0, 50, 100, 150, 200, 249], times=[0, 1, 2, 30, 31, 90])
    picture = clip_picture(data, dataclasses.replace(SMALL, video_target_frames=6))
    means = picture.rows.reshape(6, -1).mean(1)
    assert np.abs(means - [0, 50, 100, 150, 200, 249]).max() < 5
    mixed = frames_picture([png("red", (84, 56)), png("red", (300, 100))], SMALL)
    assert (mixed.rows[0] == mixed.rows[-1]).all() and mixed.grid == (2, 4, 6)


def test_times_are_written_on_the_frames() -> None:
    assert timestamp(0) == "time: 00:00:00.00"
    assert timestamp(3723.456) == "time: 01:02:03.46"
    frame = Image.new("RGB", (400, 200), (90, 90, 90))
    drawn = stamped(frame, timestamp(1.5))
    box = ImageChops.difference(frame, drawn).getbbox()
    assert box is not None and box[0] <= 3 and box[2] < 200 and 10 < box[3] < 30  # 20 px letters
    colors = {pixel for _, pixel in drawn.getcolors(100_000)}
    assert (0, 0, 0) in colors and (255, 255, 255) in colors
    assert frame.getcolors() == [(400 * 200, (90, 90, 90))], "the frame given was changed"
    assert np.asarray(drawn).tobytes() != np.asarray(stamped(frame, timestamp(2.5))).tobytes()


def test_the_time_on_a_frame_is_that_of_its_number() -> None:
    data = grey_clip([120] * 40, size=(112, 112))  # 4 s
    s = dataclasses.replace(
        SMALL, render_timestamp=True, video_min_pixels=112 * 112, video_max_pixels=112 * 112
    )
    picture = clip_picture(data, s)
    assert picture.grid == (8, 8, 8)
    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    drawn = [np.asarray(stamped(frames[i], f"time: 00:00:0{i / 10:.2f}")) for i in range(0, 40, 5)]
    np.testing.assert_array_equal(picture.rows, picture_of("video", drawn, s).rows)
    no_times = frames_picture([frames[0]], s)
    assert no_times.digest != frames_picture([frames[0]], s, times_s=[0.0]).digest


def turned(data: bytes) -> bytes:
    """An MP4 whose track header says: show it a quarter turn to the right."""
    start = data.index(b"tkhd") + 4 + 40
    matrix = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    return data[:start] + matrix + data[start + 36 :]


def test_clips_of_a_turned_phone_stand_upright() -> None:
    with av.open(file := io.BytesIO(), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = 56, 112, "yuv420p"
        pixels = np.zeros((56, 112, 3), np.uint8)
        pixels[:, :56] = 250  # white on the left: above, after a turn to the right
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode(None))
    data = file.getvalue()
    assert clip_picture(data, SMALL).grid == (2, 4, 8)
    upright = clip_picture(turned(data), SMALL)
    assert upright.grid == (2, 8, 4)
    tokens = upright.rows[:32].reshape(4, -1).mean(1)  # token rows of the first frame
    assert tokens[0] > 200 and tokens[-1] < 50


def test_files_that_are_no_clips_are_refused_in_a_sentence() -> None:
    whole = grey_clip(LEVELS)
    avi = grey_clip(LEVELS, form="avi")
    vp9 = grey_clip(LEVELS, form="matroska", codec="libvpx-vp9")
    refused = {
        "empty": (b"", "cannot be decoded"),
        "noise": (bytes(range(256)) * 40, "cannot be decoded"),
        "cut before its index": (whole[: len(whole) // 2], "cannot be decoded"),
        "cut": (avi[: len(avi) // 2], r"ends after \d+ of 50 frames"),
        "playlist": (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n", "cannot be"),
        "sound only": (sound(), "no video"),
        "unknown code": (vp9.replace(b"V_VP9", b"V_XYZ"), "in a code that is not read"),
    }
    for name, (data, message) in refused.items():
        with pytest.raises(MediaError, match=message) as caught:
            clip_picture(data, SMALL)
        assert "\n" not in str(caught.value), name


def sound() -> bytes:
    with av.open(file := io.BytesIO(), "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{url}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{url}'\nduration 5\n",
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'mediaPresentationDuration="PT9S"><Period><BaseURL>{url}</BaseURL></Period></MPD>',
        "[playlist]\nFile1={url}\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96",
    ],
)
def test_playlists_reach_nothing(playlist) -> None:
    with socket.create_server(("127.0.0.1", 0)) as trap:
        port = trap.getsockname()[1]
        text = playlist.format(url=f"http://127.0.0.1:{port}/secret.ts", port=port)
        with pytest.raises(MediaError):
            clip_picture(text.encode(), SMALL)
        trap.settimeout(0.05)
        with pytest.raises(TimeoutError):
            trap.accept()


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_damaged_clips_are_read_or_refused(data) -> None:
    form = data.draw(st.sampled_from(["mp4", "matroska", "avi"]))
    file = bytearray(grey_clip(LEVELS[:6], form=form))
    for _ in range(data.draw(st.integers(1, 8))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    try:
        picture = clip_picture(bytes(file), SMALL, max_seconds=10)
    except MediaError:
        return
    assert len(picture.rows) == np.prod(picture.grid)


def test_decoding_ends_at_its_time_limit() -> None:
    with pytest.raises(MediaError, match="longer than 0 s"):
        clip_picture(grey_clip(LEVELS), SMALL, max_seconds=0)


def test_large_frames_are_refused_before_they_are_decoded(monkeypatch) -> None:
    monkeypatch.setattr(video, "MAX_SOURCE_PIXELS", 64 * 96 - 1)
    with pytest.raises(MediaError, match="96 x 64 pixels"):
        clip_picture(grey_clip(LEVELS), SMALL)


def test_memory_holds_a_few_frames_at_a_time(monkeypatch) -> None:
    alive, most = [0], [0]
    lock = threading.Lock()
    original = video.put_patches

    def frames():
        for _ in range(100):
            with lock:
                alive[0] += 1
                most[0] = max(most[0], alive[0])
            yield Image.new("RGB", (84, 56))

    def put(*arguments):
        original(*arguments)
        with lock:
            alive[0] -= 1

    monkeypatch.setattr(video, "put_patches", put)
    picture = video._clip(frames(), [None] * 100, SMALL, None)
    assert picture.grid[0] == 100 and most[0] <= video._BATCH
