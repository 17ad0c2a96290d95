"""docs/vision.md: its blocks run, and its limits are those of the code."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from ernie.vision import processor, sources, video
from ernie.vision.settings import VisionSettings
from tests.helpers_vision import grey_clip, png

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "vision.md").read_text("utf-8")


def test_the_blocks_of_the_page_run_without_torch(folders, tmp_path) -> None:
    shutil.copytree(folders("vl"), tmp_path / "model")
    (tmp_path / "red.b64").write_bytes(base64.b64encode(png(size=(600, 800))))
    (tmp_path / "clip.mp4").write_bytes(grey_clip([90] * 20))
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE, re.S | re.M))
    code += "\nimport sys; assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_numbers_of_the_page_are_those_of_the_code() -> None:
    s, limits = VisionSettings(), sources.Sources()
    for words in (
        f"`image_min_pixels` ({s.image_min_pixels:,})",
        f"`image_max_pixels` ({s.image_max_pixels:,})",
        f"`video_fps` ({s.video_fps:g})",
        f"`video_min_frames` ({s.video_min_frames}) and `video_max_frames` ({s.video_max_frames})",
        f"more than {processor.MAX_SOURCE_PIXELS:,} pixels",
        f"{processor.MAX_RATIO} times as long as wide",
        f"{video.MAX_SECONDS:g} s long; {video._BATCH} frames are held",
        f"{limits.max_image_bytes >> 20} MiB for an image, {limits.max_video_bytes >> 20} MiB for",
        f"{limits.timeout_s:g} s for a whole fetch",
        f"At most {limits.max_redirects};",
    ):
        assert words in " ".join(PAGE.split()), words
