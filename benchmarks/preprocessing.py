"""How many pictures a second become the rows of the vision tower, here and by transformers?

    python benchmarks/preprocessing.py            about two minutes; writes a record

The same JPEG files, from bytes in memory to patch rows, in one process each, taking turns. Sides:

    ours            uint8 rows, which is what our model takes
    ours float32    normalised, the same numbers as transformers gives
    transformers    Ernie4_5_VLMoeImageProcessorPil, float32, on pictures opened with Pillow
    pillow          decoding and resizing alone, in as many threads: the ceiling
"""

from __future__ import annotations

import argparse
import io
import json
import math
import time

import numpy as np
from harness import peak_memory_gb, take_turns, write_record
from PIL import Image

from ernie.vision.processor import image_picture, in_threads, normalized, opened, target_size
from ernie.vision.settings import VisionSettings

SIDES = ("ours", "ours float32", "transformers", "pillow")
SIZES = ((480, 640), (768, 1024), (1080, 1920), (1500, 1000), (336, 336), (900, 1600))
SETTINGS = VisionSettings()


def jpegs(count: int) -> list[bytes]:
    """Pictures of several sizes with smooth parts and edges, about as large as photographs."""
    rng = np.random.default_rng(0)
    files = []
    for i in range(count):
        height, width = SIZES[i % len(SIZES)]
        coarse = rng.integers(0, 256, (height // 32 + 1, width // 32 + 1, 3), np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        grain = rng.integers(-12, 13, (height, width, 3))
        pixels = (np.asarray(image).astype(int) + grain).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=85)
        files.append(file.getvalue())
    return files


def ours(files: list[bytes]) -> int:
    pictures = in_threads(lambda file: image_picture(file, SETTINGS), files)
    return sum(len(picture.rows) for picture in pictures)


def ours_float32(files: list[bytes]) -> int:
    def rows(file: bytes) -> np.ndarray:
        return normalized(image_picture(file, SETTINGS).rows)

    return sum(map(len, in_threads(rows, files)))


def transformers_side(files: list[bytes]) -> int:
    from transformers.models.ernie4_5_vl_moe import image_processing_pil_ernie4_5_vl_moe as peer

    processor = peer.Ernie4_5_VLMoeImageProcessorPil()
    images = [Image.open(io.BytesIO(file)) for file in files]
    return len(processor(images, return_tensors="np")["pixel_values"])


def pillow(files: list[bytes]) -> int:
    def work(file: bytes) -> int:
        image = opened(file)
        low, high = SETTINGS.image_min_pixels, SETTINGS.image_max_pixels
        height, width = target_size(image.height, image.width, low, high)
        image.resize((width, height), Image.Resampling.BICUBIC)
        return height * width // 14**2

    return sum(in_threads(work, files))


def run_side(side: str, count: int, repeats: int) -> None:
    work = dict(zip(SIDES, (ours, ours_float32, transformers_side, pillow)))[side]
    files = jpegs(count)
    num_rows = work(files)  # imports and caches
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        assert work(files) == num_rows
        best = min(best, time.perf_counter() - start)
    numbers = {"pictures_per_s": count / best, "peak_gb": peak_memory_gb(), "rows": num_rows}
    print(json.dumps(numbers))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if given.side:
        run_side(given.side, given.pictures, given.repeats)
        return
    passed = ["--pictures", str(given.pictures), "--repeats", str(given.repeats)]
    seen = take_turns(__file__, SIDES, given.rounds, passed)
    assert len({side["rows"] for side in seen.values()}) == 1, "the sides made different rows"
    speed = {side: numbers["pictures_per_s"] for side, numbers in seen.items()}
    times = {side: speed[side] / speed["transformers"] for side in SIDES}
    share = {side: speed[side] / speed["pillow"] for side in SIDES}
    table = [["side", "pictures/s", "x transformers", "of Pillow alone", "peak GB"]]
    for side, numbers in seen.items():
        peak = f"{numbers['peak_gb']:.2f}"
        table.append([side, f"{speed[side]:.1f}", f"{times[side]:.2f}", f"{share[side]:.0%}", peak])
    reading = (
        f"With uint8 rows, as the model takes them, {times['ours']:.1f} times as many pictures a "
        f"second as transformers, and {share['ours']:.0%} of what decoding and resizing alone "
        f"allow; the same float32 numbers come {times['ours float32']:.1f} times as fast."
    )
    settings = {"pictures": given.pictures, "sizes": SIZES, "repeats": given.repeats}
    question = (__doc__ or "").splitlines()[0]
    command = "python benchmarks/preprocessing.py"
    write_record("preprocessing", question, command, settings, seen, table, reading)


if __name__ == "__main__":
    main()
