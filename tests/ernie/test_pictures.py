"""Pictures to patch rows: transformers' processor, the inverse, every mode, and hostile files."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import (
    Ernie4_5_VLMoeImageProcessorPil,
    smart_resize,
)

from ernie.vision import processor
from ernie.vision.processor import image_picture, normalized, opened, picture_of, target_size
from ernie.vision.settings import VisionSettings, font_of
from ernie.vision.sources import MediaError

DEFAULT = VisionSettings()
LOW, HIGH = DEFAULT.image_min_pixels, DEFAULT.image_max_pixels


def noise(height, width, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    # Smooth enough that a wrong filter differs by a little, rough enough that it differs everywhere
    coarse = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, channels), np.uint8)
    fine = rng.integers(0, 64, (height, width, channels), np.uint8)
    large = coarse.repeat(4, 0).repeat(4, 1)[:height, :width]
    return (large // 2 + fine).astype(np.uint8)


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def unpatched(rows, grid, patch=14, merge=2):
    """The frames (T, H, W, 3) that rows were made of: written from the definition, in loops."""
    t, h, w = grid
    frames = np.zeros((t, h * patch, w * patch, 3), np.uint8)
    row = iter(rows)
    for frame in range(t):
        for token_y in range(0, h, merge):
            for token_x in range(0, w, merge):
                for y in range(token_y, token_y + merge):
                    for x in range(token_x, token_x + merge):
                        pixels = next(row).reshape(3, patch, patch)
                        place = frames[frame, y * patch :, x * patch :]
                        place[:patch, :patch] = pixels.transpose(1, 2, 0)
    return frames


SIZES = [(10, 10), (28, 28), (30, 500), (41, 43), (333, 777), (1000, 700), (56, 84)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_rows_equal_those_of_transformers(height, width) -> None:
    image = Image.fromarray(noise(height, width))
    ours = image_picture(encoded(image), DEFAULT)
    theirs = Ernie4_5_VLMoeImageProcessorPil()(image, return_tensors="np")
    assert list(ours.grid) == theirs["image_grid_thw"][0].tolist()
    np.testing.assert_array_equal(normalized(ours.rows), theirs["pixel_values"])
    assert ours.num_tokens == math.prod(ours.grid) // 4


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV", "I", "F"])
def test_opaque_modes_equal_those_of_transformers(mode) -> None:
    source = Image.fromarray(noise(60, 90))
    image = (source.convert("L") if mode in "IF" else source).convert(mode)
    ours = image_picture(image, DEFAULT)
    theirs = Ernie4_5_VLMoeImageProcessorPil()(image.convert("RGB"), return_tensors="np")
    np.testing.assert_array_equal(normalized(ours.rows), theirs["pixel_values"])


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("WEBP", {"lossless": True}),
        ("PPM", {}),
        ("TGA", {}),
        ("QOI", {}),
        ("JPEG2000", {}),
        ("PCX", {}),
    ],
)
def test_lossless_formats_give_their_pixels(form, options) -> None:
    pixels = noise(50, 70)
    np.testing.assert_array_equal(opened(encoded(Image.fromarray(pixels), form, **options)), pixels)


def test_jpeg_is_decoded_as_pillow_does_also_in_cmyk() -> None:
    for mode in ("RGB", "L", "CMYK"):
        data = encoded(Image.fromarray(noise(50, 70)).convert(mode), "JPEG", quality=80)
        with Image.open(io.BytesIO(data)) as plain:
            np.testing.assert_array_equal(opened(data), plain.convert("RGB"))


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_the_inverse_gives_the_frames_back(high, wide, num_frames, seed) -> None:
    frames = [noise(high * 28, wide * 28, seed=seed + i) for i in range(num_frames)]
    picture = picture_of("video", frames, DEFAULT)
    assert picture.grid == (num_frames, high * 2, wide * 2)
    np.testing.assert_array_equal(unpatched(picture.rows, picture.grid), np.stack(frames))


@given(st.integers(1, 9000), st.integers(1, 9000))
@settings(max_examples=300)
def test_sizes_are_multiples_within_limits_and_keep_proportions(height, width) -> None:
    high, wide = target_size(height, width, LOW, HIGH)
    assert high % 28 == 0 and wide % 28 == 0 and LOW <= high * wide <= HIGH
    if max(height, width) <= 200 * min(height, width):
        if min(height, width) > 14:  # below, see the next test
            assert (high, wide) == smart_resize(height, width, 28, LOW, HIGH)
    else:
        assert max(high, wide) <= 201 * min(high, wide)


def test_thin_pictures_count_a_whole_token_across() -> None:
    """transformers takes the thin side for 0 tokens here and enlarges the picture."""
    assert target_size(1, 150, LOW, HIGH) == (28, 140)
    assert smart_resize(1, 150, 28, LOW, HIGH) == (28, 700)


def test_over_long_pictures_are_cut_to_a_ratio_of_200() -> None:
    assert target_size(28 * 500, 28, LOW, HIGH) == (28 * 200, 28)
    assert target_size(30, 9000, LOW, HIGH) == (28, 28 * 200)
    with pytest.raises(MediaError, match="widen the limits"):
        target_size(28 * 300, 28, LOW, 28 * 28 * 100)


def test_exif_turns_the_picture_upright() -> None:
    pixels = noise(40, 64)
    turned = {
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        6: np.rot90(pixels, -1),
        8: np.rot90(pixels, 1),
    }
    for orientation, upright in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(Image.fromarray(pixels), exif=exif)
        np.testing.assert_array_equal(opened(data), upright, err_msg=str(orientation))


def test_transparency_lies_over_white() -> None:
    pixels = noise(30, 40, 4)
    alpha = pixels[..., 3:].astype(int)
    seen = np.asarray(opened(encoded(Image.fromarray(pixels, "RGBA")))).astype(int)
    wanted = (pixels[..., :3] * alpha + 255 * (255 - alpha)) / 255
    assert np.abs(seen - wanted).max() <= 1
    palette = Image.fromarray(pixels[..., :3]).quantize(8)
    data = encoded(palette, transparency=0)
    holes = np.asarray(palette) == 0
    assert holes.any() and (np.asarray(opened(data))[holes] == 255).all()
    clear = Image.new("LA", (5, 5), (0, 0))
    assert np.asarray(opened(encoded(clear))).min() == 255


def test_16_bit_grey_keeps_its_upper_byte() -> None:
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    for image in (Image.fromarray(values), Image.fromarray(values.astype(">u2"))):
        for form in ("PNG", "TIFF"):
            seen = np.asarray(opened(encoded(image, form)))
            np.testing.assert_array_equal(seen[..., 0], values >> 8, err_msg=f"{image.mode} {form}")


@pytest.mark.parametrize("most", [65535, 4095, 1023])
def test_grey_files_of_more_than_8_bits_keep_their_upper_byte(most: int) -> None:
    values = np.linspace(0, most, 64 * 64).astype(">u2").reshape(64, 64)
    seen = np.asarray(opened(b"P5\n64 64\n%d\n" % most + values.tobytes()))
    wanted = values.astype(np.int64) * 65535 // most >> 8
    assert np.abs(seen[..., 0] - wanted).max() <= 1 and seen.max() == 255


@pytest.mark.parametrize(
    "values",
    [np.linspace(0, 1, 4096, dtype=np.float32), np.arange(4096, dtype=np.int32) * 1000 - 9],
)
def test_grey_numbers_of_no_known_range_are_refused(values: np.ndarray) -> None:
    with pytest.raises(MediaError, match=r"pixels from .* give it in 8 or 16 bits"):
        opened(encoded(Image.fromarray(values.reshape(64, 64)), "TIFF"))


def test_the_first_frame_of_an_animation_is_read() -> None:
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "lime", "blue")]
    for form in ("GIF", "WEBP", "PNG", "TIFF"):
        lossless = {"lossless": True} if form == "WEBP" else {}
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **lossless)
        assert np.asarray(opened(data))[3, 3].tolist() == [255, 0, 0], form


def bomb(width, height):
    """A PNG whose header claims a size, with next to no pixels."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 100)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_files_that_cannot_be_read_are_refused_in_a_sentence() -> None:
    whole = encoded(Image.fromarray(noise(200, 200)), "JPEG")
    png = encoded(Image.fromarray(noise(200, 200)))
    refused = {
        "empty": (b"", "0 bytes"),
        "bomb": (bomb(50_000, 50_000), "pixels"),
        "smaller bomb": (bomb(8192, 6145), "the limit is 50331648"),
        "truncated": (whole[: len(whole) // 2], "truncated"),
        "truncated png": (png[: len(png) // 2], "cannot be decoded"),
        "too few pixels": (bomb(300, 300), "cannot be decoded"),
        "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"><script/></svg>', "no format"),
        "html": (b"<html>404</html>", "no format"),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no format"),
        "icon": (encoded(Image.fromarray(noise(32, 32)), "ICO"), "no format"),
        "text": ("text", "expected bytes"),
    }
    for name, (data, message) in refused.items():
        with pytest.raises(MediaError, match=message) as caught:
            image_picture(data, DEFAULT)
        assert "\n" not in str(caught.value) and "0x" not in str(caught.value), name


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded() -> None:
    data = encoded(Image.fromarray(noise(64, 64)), "JPEG", progressive=True)
    assert np.asarray(opened(data)).shape == (64, 64, 3)
    last = data.rindex(b"\xff\xda")
    many = data[:last] + data[last:-2] * 100 + data[-2:]
    with pytest.raises(MediaError, match="more than 100 scans"):
        opened(many)


def test_a_picture_that_was_opened_by_the_caller_is_not_changed() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(io.BytesIO(encoded(Image.new("RGBA", (40, 60), "red"), exif=exif))) as image:
        assert opened(image).size == (60, 40)
        assert (image.size, image.mode) == ((40, 60), "RGBA")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(st.data())
@settings(deadline=None, max_examples=80)
def test_damaged_files_are_read_or_refused(data) -> None:
    form = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "TGA"]))
    file = bytearray(encoded(Image.fromarray(noise(40, 40)), form))
    for _ in range(data.draw(st.integers(1, 6))):
        file[data.draw(st.integers(0, min(len(file) - 1, 400)))] = data.draw(st.integers(0, 255))
    file = file[: data.draw(st.integers(1, len(file)))]
    try:
        picture = image_picture(bytes(file), DEFAULT)
    except MediaError:
        return
    assert len(picture.rows) == math.prod(picture.grid)


def test_the_digest_tells_pixels_and_shapes_apart() -> None:
    image = Image.new("RGB", (56, 112), "white")
    same = image_picture(encoded(image), DEFAULT)
    assert same.digest == image_picture(encoded(image, "BMP"), DEFAULT).digest
    others = [
        image_picture(image.transpose(Image.Transpose.ROTATE_90), DEFAULT),  # the same bytes
        image_picture(Image.new("RGB", (56, 112), (255, 255, 254)), DEFAULT),
    ]
    assert len({same.digest, *(other.digest for other in others)}) == 3


def test_threads_change_nothing() -> None:
    images = [Image.fromarray(noise(90 + 13 * i, 120, seed=i)) for i in range(7)]

    def digest(image):
        return image_picture(image, DEFAULT).digest

    together = processor.in_threads(digest, images, num_threads=4)
    assert together == [digest(image) for image in images]


# --- settings ---


def test_folders_of_both_layouts_are_read(tmp_path) -> None:
    assert VisionSettings.from_folder(tmp_path) == DEFAULT
    flat = {
        "image_processor_type": "Ernie4_5_VLImageProcessor",
        "patch_size": 14,
        "merge_size": 2,
        "min_pixels": 3136,
        "max_pixels": 1003520,  # replaced by the published processor
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "rescale_factor": 0.00392156862745098,
        "video_max_frames": 99,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(flat))
    read = VisionSettings.from_folder(tmp_path)
    assert read == dataclasses.replace(DEFAULT, video_max_frames=99)
    Ernie4_5_VLMoeImageProcessorPil(
        size={"shortest_edge": 5000, "longest_edge": 60000}
    ).save_pretrained(tmp_path)
    video = {"size": {"shortest_edge": 4000, "longest_edge": 50000}, "min_frames": 3}
    video |= {"draw_on_frames": False}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(video))
    split = VisionSettings.from_folder(tmp_path)
    image = json.loads((tmp_path / "preprocessor_config.json").read_text())
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (tmp_path / name).unlink()
    nested = {"image_processor": image, "video_processor": video}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    wanted = dataclasses.replace(
        DEFAULT,
        image_min_pixels=5000,
        image_max_pixels=60000,
        video_min_pixels=4000,
        video_max_pixels=50000,
        video_min_frames=3,
        render_timestamp=False,
    )
    assert split == wanted == VisionSettings.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ('{"patch_size": "14"}', "patch_size is '14'; expected a value of type int"),
        ('{"image_mean": [0.5, 0.5, 0.5]}', "image_mean="),
        ('{"image_std": 7}', "image_std=7"),
        ('{"rescale_factor": 1}', "rescale_factor=1; models of this family have"),
        ('{"do_resize": false}', "do_resize"),
        ('{"resample": 2}', "resample=2"),
        ("[]", "expected an object"),
        ("{", "not JSON"),
    ],
)
def test_settings_that_cannot_hold_are_refused(tmp_path, file, message) -> None:
    (tmp_path / "preprocessor_config.json").write_text(file)
    with pytest.raises(MediaError, match=message):
        VisionSettings.from_folder(tmp_path)


def test_a_request_lowers_limits_and_cannot_raise_them() -> None:
    lower = DEFAULT.changed({"image_max_pixels": 28 * 28 * 100, "video_fps": 0.5})
    assert (lower.image_max_pixels, lower.video_fps) == (28 * 28 * 100, 0.5)
    for options, message in (
        ({"image_max_pixels": HIGH + 1}, "above"),
        ({"video_target_frames": 10**6}, "above 180"),
        ({"image_max_pixels": 100}, "784 or more"),
        ({"video_fps": float("nan")}, "above 0"),
        ({"video_max_frames": True}, "type int"),
        ({"patch_size": 7}, "is not an option"),
        ({"colour": 7}, "is not an option"),
    ):
        with pytest.raises(MediaError, match=message):
            DEFAULT.changed(options)


def test_the_font_of_a_folder_is_found(tmp_path) -> None:
    assert font_of(tmp_path) is None
    (tmp_path / "Roboto-Regular.ttf").touch()
    assert font_of(tmp_path) == tmp_path / "Roboto-Regular.ttf"
