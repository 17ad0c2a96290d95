"""How a model wants its pictures and clips: limits of size, sampling of frames.

Three layouts of files are read (`VisionSettings.from_folder`). Field names are those of the
published processor and of `mm_processor_kwargs`. How the model normalises pixels is part of the
model; a folder that says otherwise is refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie.json_files import read_object
from ernie.vision.sources import MediaError

SAMPLES = ("leading", "middle", "rand")
_PIXELS = 28 * 28  # of one token of an image
# Sections of transformers' files: name of a limit there, and ours.
_HF_IMAGE = {"shortest_edge": "image_min_pixels", "longest_edge": "image_max_pixels"}
_HF_VIDEO = {"shortest_edge": "video_min_pixels", "longest_edge": "video_max_pixels"}
# Options that cost memory and time, and the setting that bounds them.
_LIMITS = {
    "image_max_pixels": "image_max_pixels",
    "video_max_pixels": "video_max_pixels",
    "video_max_frames": "video_max_frames",
    "video_target_frames": "video_max_frames",
}
_FIXED = ("patch_size", "merge_size")  # by the weights
# What the model computes with uint8 pixels: (x * RESCALE - MEAN) / STD by channel, that of CLIP.
RESCALE = 1 / 255
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
_NORMALISATION: dict[str, Any] = {"rescale_factor": RESCALE, "image_mean": MEAN, "image_std": STD}


@dataclass(frozen=True, kw_only=True)
class VisionSettings:
    """Pixels are counted after resizing; those of a clip are those of one frame.

    video_frames_sample: the frame that stands for its part of the clip: its first ("leading", as
    FastDeploy and transformers serve), its middle one (as ERNIEKit trains) or a random one.
    video_target_frames: exactly so many frames, whatever the rate and its limits; -1 for none.

    Source of the numbers: the published processor of ERNIE-4.5-VL.
    """

    image_min_pixels: int = 4 * _PIXELS
    image_max_pixels: int = 6177 * _PIXELS
    video_min_pixels: int = 299 * _PIXELS
    video_max_pixels: int = 1196 * _PIXELS
    video_fps: float = 2.0
    video_min_frames: int = 16
    video_max_frames: int = 180
    video_target_frames: int = -1
    video_frames_sample: str = "leading"
    render_timestamp: bool = True
    patch_size: int = 14
    merge_size: int = 2

    def __post_init__(self) -> None:
        for kind in ("image", "video"):
            low, high = getattr(self, f"{kind}_min_pixels"), getattr(self, f"{kind}_max_pixels")
            if not self.factor**2 <= low <= high:
                raise MediaError(
                    f"{kind}_min_pixels={low} and {kind}_max_pixels={high} must be "
                    f"{self.factor**2} or more, and the first no larger than the second"
                )
        if not 0 < self.video_min_frames <= self.video_max_frames:
            raise MediaError(
                f"video_min_frames={self.video_min_frames} and video_max_frames="
                f"{self.video_max_frames} must be 1 or more, the first no larger than the second"
            )
        if self.video_frames_sample not in SAMPLES:
            raise MediaError(
                f"video_frames_sample={self.video_frames_sample!r}; expected one of {SAMPLES}"
            )
        if not 0 < self.video_fps <= 1000 or self.video_target_frames == 0:
            raise MediaError(
                f"video_fps={self.video_fps} and video_target_frames={self.video_target_frames} "
                "must be above 0 (at most 1000 frames a second)"
            )

    @property
    def factor(self) -> int:
        """Both sides of a resized picture are multiples of this: the pixels of one token."""
        return self.patch_size * self.merge_size

    def changed(self, options: Mapping[str, Any]) -> VisionSettings:
        """With what a request asks for (`mm_processor_kwargs`). What the weights fix stays, and so
        do the upper limits: a request may lower them.
        """
        known = {f.name for f in dataclasses.fields(self)} - set(_FIXED)
        for name in options:
            if name not in known:
                listed = ", ".join(sorted(known))
                raise MediaError(
                    f"{name!r} is not an option of pictures and clips; known: {listed}"
                )
        _check_types(options)
        for name, limit in _LIMITS.items():
            if options.get(name, 0) > getattr(self, limit):
                raise MediaError(f"{name}={options[name]} is above {getattr(self, limit)}")
        return dataclasses.replace(self, **options)

    @classmethod
    def from_folder(cls, path: str | Path) -> VisionSettings:
        """Those of a model folder; the published ones where it says nothing.

        transformers writes one section for images and one for clips, in processor_config.json or in
        a file each. The original layout is one flat file; its `min_pixels` and `max_pixels` are
        not used, because the published processor replaces them by the limits above (keys such as
        `image_max_pixels`).
        """
        folder = Path(path)
        whole, image, video = (
            read_object(folder / name, MediaError)
            for name in (
                "processor_config.json",
                "preprocessor_config.json",
                "video_preprocessor_config.json",
            )
        )
        image = whole.get("image_processor") or image
        video = whole.get("video_processor") or video
        values = {f.name: image[f.name] for f in dataclasses.fields(cls) if f.name in image}
        values |= _sizes(image, _HF_IMAGE) | _sizes(video, _HF_VIDEO)
        for theirs, ours in (
            ("min_frames", "video_min_frames"),
            ("max_frames", "video_max_frames"),
        ):
            if theirs in video:
                values[ours] = video[theirs]
        if "draw_on_frames" in video:
            values["render_timestamp"] = video["draw_on_frames"]
        _refuse_other_kinds(folder, image, video)
        try:
            _check_types(values)
            return cls(**values)
        except MediaError as error:
            raise MediaError(f"{folder}: {error}") from None


def font_of(folder: str | Path) -> Path | None:
    """The published font (Roboto) where a model folder brings it."""
    path = Path(folder) / "Roboto-Regular.ttf"
    return path if path.is_file() else None


def _check_types(values: Mapping[str, Any]) -> None:
    types = {f.name: str(f.type) for f in dataclasses.fields(VisionSettings)}
    fits = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
    for name, value in values.items():
        good = isinstance(value, fits[types[name]])
        if not good or isinstance(value, bool) != (types[name] == "bool"):
            raise MediaError(f"{name} is {value!r}; expected a value of type {types[name]}")


def _sizes(section: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, int]:
    size = section.get("size")
    return {names[key]: size[key] for key in names if isinstance(size, dict) and key in size}


def _refuse_other_kinds(folder: Path, image: Mapping[str, Any], video: Mapping[str, Any]) -> None:
    """Steps that are always done here, and numbers that belong to the model."""
    for section in (image, video):
        for step in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
            if section.get(step) is False:
                raise MediaError(f"{folder} says {step} is false; pictures are not read like that")
        if section.get("resample", 3) != 3:
            raise MediaError(
                f"{folder} says resample={section['resample']}; pictures are resized with 3 "
                "(bicubic) here"
            )
        for name, wanted in _NORMALISATION.items():
            if not _are_close(section.get(name, wanted), wanted):
                raise MediaError(
                    f"{folder} says {name}={section[name]}; models of this family have {wanted}"
                )
    for name in _FIXED:
        if name in image and name in video and image[name] != video[name]:
            raise MediaError(
                f"{folder} has {name}={image[name]} for images and {video[name]} for clips; the "
                "vision tower takes one"
            )


def _are_close(value: Any, wanted: Any) -> bool:
    if not isinstance(wanted, tuple):
        return isinstance(value, (int, float)) and math.isclose(value, wanted, rel_tol=1e-5)
    same_length = isinstance(value, (list, tuple)) and len(value) == len(wanted)
    return same_length and all(_are_close(a, b) for a, b in zip(value, wanted))
